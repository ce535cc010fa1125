"""Saving: complete or ignored, whatever happens in between; what stays; how long training waits."""

import json
import multiprocessing
import random
import shutil
import threading
import time

import pytest
import torch
from one_rank import ALONE
from rank_runs import RanksFailed, run_ranks

from gigatok_ds.checkpoint import fragments
from gigatok_ds.checkpoint.fragments import Fragment, SavedEngine, SavedLayout, Snapshot
from gigatok_ds.checkpoint.retention import steps_to_keep
from gigatok_ds.checkpoint.run_directory import complete_checkpoints, load_checkpoint, read_state, remove_leftovers
from gigatok_ds.checkpoint.writer import CheckpointWriter
from gigatok_ds.config.checkpoint import CheckpointConfig
from gigatok_ds.errors import InputError


class Part:
    """What an engine is to a checkpoint: here, one parameter whose values are the step."""

    def __init__(self, elements=1000, topology=ALONE):
        self.weights, self.topology = torch.zeros(elements), topology

    def at(self, step):
        self.weights = torch.full_like(self.weights, step)
        return {"net": self}

    def snapshot(self):
        size = len(self.weights) // self.topology.data_size
        start = size * self.topology.data_rank
        layout = SavedLayout(tensor_size=1, data_size=self.topology.data_size, parameters={"w": [len(self.weights)]},
                             cuts={},
                        kinds=["weights"], adam_steps={"w": 0}, counters={})
        return Snapshot(tensor_rank=0, data_rank=self.topology.data_rank, layout=layout,
                        fragments={"weights": {"w": Fragment(start, self.weights[start : start + size].clone())}})

    def load(self, folder):
        self.weights = SavedEngine(folder).read("weights", "w")


def writer(out, topology=ALONE, **settings):
    return CheckpointWriter(out, CheckpointConfig(**{"every": 1, **settings}), topology, stage=0)


def save_steps(out, steps, metrics=lambda step: {}, **settings):
    part = Part()
    with writer(out, **settings) as saving:
        for step in steps:
            saving.save(step, step, part.at(step), metrics(step))
    return [step for step, _ in complete_checkpoints(out)]


def save_until_killed(out, asynchronous):
    remove_leftovers(out)
    start = max((step for step, _ in complete_checkpoints(out)), default=0)
    part = Part(200_000)
    with writer(out, keep=2, asynchronous=asynchronous) as saving:
        for step in range(start + 1, 1_000_000):
            saving.save(step, step, part.at(step), {})


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_25_random_moments_a_run_keeps_complete_checkpoints_only(tmp_path, asynchronous):
    """Twice 25 times SIGKILL, each time after new checkpoints: all load, and `latest`, written after the first of
    them, names one.
    """
    draw, context, newest = random.Random(int(asynchronous)), multiprocessing.get_context("forkserver"), 0
    latest, seen = tmp_path / "checkpoints" / "latest", 0
    for _ in range(25):
        process = context.Process(target=save_until_killed, args=(tmp_path, asynchronous), daemon=True)
        process.start()
        while not any(step > newest for step, _ in complete_checkpoints(tmp_path)):
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        process.join()
        found = complete_checkpoints(tmp_path)
        for step, folder in found:
            part = Part(200_000)
            assert load_checkpoint(folder, {"net": part}, ALONE).step == step
            assert len(part.weights) == 200_000 and (part.weights == step).all()
        assert found[-1][0] > newest
        newest = found[-1][0]
        if latest.exists():
            assert (latest.parent / latest.read_text().strip() / "state.json").is_file()
            seen += 1
        else:
            assert not seen
    assert seen


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    save_steps(tmp_path, [1])
    for name in ("step-0000002.partial", "step-0000001.removed"):
        (tmp_path / "checkpoints" / name).mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-0000001"]


def test_a_flipped_byte_anywhere_is_detected_and_named(tmp_path):
    save_steps(tmp_path, [1, 2])
    folder = tmp_path / "checkpoints" / "step-0000002"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 4
    draw = random.Random(0)
    for path in files:
        full = path.read_bytes()
        for place in draw.sample(range(len(full)), min(20, len(full))):
            path.write_bytes(full[:place] + bytes([full[place] ^ 0x01]) + full[place + 1 :])
            with pytest.raises(InputError, match=path.name):
                load_checkpoint(folder, {"net": Part()}, ALONE)
        path.write_bytes(full)
    load_checkpoint(folder, {"net": Part()}, ALONE)
    (folder / "net" / "tensor-000-data-00000.safetensors").unlink()
    with pytest.raises(InputError,
                       match=r"tensor-000-data-00000.safetensors is missing; restore it from a copy, or remove"):
        load_checkpoint(folder, {"net": Part()}, ALONE)


def test_a_name_outside_of_the_checkpoint_is_refused(tmp_path):
    """Even when its checksum is right, and the state's own, too."""
    save_steps(tmp_path, [1])
    folder = tmp_path / "checkpoints" / "step-0000001"
    state = read_state(folder)
    (tmp_path / "secret").write_text("x")
    for name in ("../../secret", str(tmp_path / "secret")):
        state.files[name] = "0" * 64
        (folder / "state.json").write_text(state.to_json())
        with pytest.raises(InputError, match=r"secret.*outside of the checkpoint"):
            load_checkpoint(folder, {"net": Part()}, ALONE)
        del state.files[name]


def test_a_checkpoint_of_another_kind_of_run_is_refused(tmp_path):
    save_steps(tmp_path, [1])
    with pytest.raises(InputError, match="holds net, but this recipe trains generator, net"):
        load_checkpoint(tmp_path / "checkpoints" / "step-0000001", {"net": Part(), "generator": Part()}, ALONE)


def test_what_stays_is_new_or_round_or_good():
    steps = range(1, 13)
    metrics = {step: {"psnr": abs(step - 6.4), "loss": -step} for step in steps}

    def kept(**settings):
        return sorted(steps_to_keep(metrics, CheckpointConfig(**{"every": 1, "keep": 2, **settings})))

    assert kept() == [11, 12]
    assert kept(keep_every=5) == [5, 10, 11, 12]
    assert kept(keep_best=2, best_metric="psnr") == [6, 7, 11, 12]
    assert kept(keep_best=2, best_metric="psnr", best="highest") == [1, 11, 12]
    metrics[6] = {}
    assert kept(keep_best=1, best_metric="psnr") == [7, 11, 12], "a step that was not validated cannot be best"


def test_saving_prunes_and_latest_follows(tmp_path):
    figures = {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: 6.0, 6: 7.0}
    steps = save_steps(tmp_path, range(1, 7), lambda step: {"loss": figures[step]}, keep=1, keep_every=3, keep_best=1,
                       best_metric="loss")
    assert steps == [2, 3, 6]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-0000006\n"
    assert read_state(tmp_path / "checkpoints" / "step-0000002").metrics == {"loss": 1.0}


@pytest.mark.parametrize("settings, message", [
    ({"keep_best": 2}, "they go together"),
    ({"best_metric": "loss"}, "they go together"),
    ({"every": 4, "keep_every": 6}, "must be a multiple of checkpoint.every, which is 4"),
    ({"keep": 0}, "checkpoint.keep is 0"),
])
def test_retention_that_cannot_be_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        CheckpointConfig(**settings)


def test_in_the_background_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """save() returns after the copy: what is written is the state at that moment, though training has gone on."""
    may_write, write = threading.Event(), Snapshot.write

    def held_write(self, folder):
        assert may_write.wait(30)
        return write(self, folder)

    monkeypatch.setattr(fragments.Snapshot, "write", held_write)
    part = Part()
    with writer(tmp_path, asynchronous=True) as saving:
        saving.save(1, 1, part.at(1), {})
        part.weights.fill_(99)
        assert complete_checkpoints(tmp_path) == []
        saving.check()
        may_write.set()
        saving.save(2, 2, part.at(2), {})
    for step, folder in complete_checkpoints(tmp_path):
        load_checkpoint(folder, {"net": part}, ALONE)
        assert (part.weights == step).all()
    assert [step for step, _ in complete_checkpoints(tmp_path)] == [1, 2]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_write_that_fails_is_told_and_leaves_earlier_checkpoints(tmp_path, monkeypatch, asynchronous):
    save_steps(tmp_path, [1])

    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fragments.Snapshot, "write", full)
    message = "checkpoint of step 2 could not be written.*No space left on device.*earlier checkpoints are untouched"
    with pytest.raises(InputError, match=message), writer(tmp_path, asynchronous=asynchronous) as saving:
        saving.save(2, 2, Part().at(2), {})
        while True:  # training steps: one of them tells
            saving.check()
            time.sleep(0.001)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-0000001"]


def save_on_a_rank(out, asynchronous, failing):
    from gigatok_ds.parallel.topology import start_process_group, stop_process_group

    topology = start_process_group()
    part = Part(topology=topology)
    if topology.rank == failing:
        part.snapshot = lambda: Failing()
    with writer(out, topology, asynchronous=asynchronous) as saving:
        saving.save(1, 1, part.at(1), {})
    stop_process_group(topology)


class Failing:
    def write(self, folder):
        time.sleep(0.2)
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_ranks_complete_a_checkpoint_together_or_fail_together(tmp_path, asynchronous):
    run_ranks(save_on_a_rank, 2, tmp_path / "good", asynchronous, None)
    (_, folder), = complete_checkpoints(tmp_path / "good")
    part = Part()
    load_checkpoint(folder, {"net": part}, ALONE)
    assert (part.weights == 1).all() and json.loads((folder / "state.json").read_text())["world_size"] == 2
    for failing in (0, 1):
        out = tmp_path / f"failing-{failing}"
        with pytest.raises(RanksFailed, match=r"could not be written.*No space left on device"):
            run_ranks(save_on_a_rank, 2, out, asynchronous, failing, timeout=60)
        assert not complete_checkpoints(out)


def test_a_missing_part_of_a_parameter_is_named(tmp_path):
    save_steps(tmp_path, [1])
    folder = tmp_path / "checkpoints" / "step-0000001" / "net"
    described = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps(described | {"parameters": {"w": [1001]}}))
    with pytest.raises(InputError, match="elements from 1000 on of weights of w are missing"):
        SavedEngine(folder).read("weights", "w")
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="holds no training state"):
        SavedEngine(folder)
