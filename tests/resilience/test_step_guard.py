"""A step that is not finite, or a spike, changes nothing: neither generator nor discriminator, in memory or on the
disk.
"""

import json

import pytest
import torch
from rank_runs import RanksFailed, run_ranks
from saved_runs import read_everything
from training_runs import prepare, start, train_with_faults

from gigatok_ds.checkpoint.run_directory import checkpoint_path, complete_checkpoints, read_state
from gigatok_ds.config.deepspeed import resolve_deepspeed, scaler_search, zero_settings
from gigatok_ds.config.faults import FaultConfig
from gigatok_ds.config.load import load_recipe
from gigatok_ds.errors import InputError
from gigatok_ds.monitoring.history import read_history
from gigatok_ds.monitoring.metrics import read_metrics
from gigatok_ds.parallel.topology import single_process
from gigatok_ds.resilience.step_guard import ENOUGH, StepGuard
from gigatok_ds.training.run_status import status

EVERY = ["checkpoint.every=1", "checkpoint.keep=100", "training.ema_decay=0.9"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    return folder, prepare(folder)


def saved(out, step):
    """Everything of all engines after a step."""
    folder = checkpoint_path(out, step)
    found = {}
    for part in read_state(folder).parts:
        tensors, steps = read_everything(folder / part)
        found |= {(part, *key): value for key, value in tensors.items()} | {(part, "steps"): steps}
    return found


def differing(one, other):
    assert one.keys() == other.keys()
    return [key for key in one if not (one[key] == other[key] if isinstance(one[key], dict)
                                       else torch.equal(one[key], other[key]))]


def events(out, kind):
    return [line for line in read_history(out) if line["event"] == kind]


@pytest.mark.parametrize("stage, fault, micro, said", [
    pytest.param(0, "nan:rank=1,step=6", 4, "loss, the gradient of the generator are not finite",
                 marks=pytest.mark.slow),
    (1, "nan:rank=0,step=6,part=discriminator", 2, "the gradient of the discriminator is not finite"),
    pytest.param(2, "inf:rank=1,step=6", 2, "the gradient of the generator is not finite", marks=pytest.mark.slow),
    pytest.param(3, "nan:rank=1,step=6,part=discriminator", 4, "the gradient of the discriminator is not finite",
                 marks=pytest.mark.slow),
    pytest.param(3, "nan:rank=0,step=6", 2, "loss, the gradient of the generator are not finite",
                 marks=pytest.mark.slow),
])
def test_a_step_of_one_rank_that_is_not_finite_is_left_out_of_everything(data, tmp_path, stage, fault, micro, said):
    """The discriminator trains from step 4 on. That the run which went on equals one that was started again from the
    checkpoint after the fault proves that nothing of it stayed behind in DeepSpeed either."""
    folder, names = data
    out = tmp_path / "run"
    recipe = load_recipe(folder / "tokenizer.yaml", [*names["tokenizer"], *EVERY, f"training.micro_batch_size={micro}"])
    run_ranks(train_with_faults, 2, recipe, out, stage, [fault])
    assert differing(saved(out, 5), saved(out, 6)) == []
    assert len(differing(saved(out, 6), saved(out, 7))) > 20
    skipped, = events(out, "skipped")
    assert skipped["step"] == 6 and skipped["reason"] == said
    assert [line.get("skipped_steps") for line in read_metrics(out) if "loss" in line] == [None] * 5 + [1, 1][:2]
    found = status(out)
    assert found["faults"] == [skipped] and found["state"] == "finished"
    assert (found["steps_left_out"], found["share_left_out"]) == (1, 0.125)
    assert [line["skipped_share"] for line in read_metrics(out) if "skipped_share" in line] == [1 / 6, 1 / 7, 1 / 8]
    full = saved(out, 8)
    for step in (7, 8):
        folder_of = checkpoint_path(out, step)
        folder_of.rename(tmp_path / folder_of.name)
    (out / "checkpoints" / "latest").unlink()
    run_ranks(train_with_faults, 2, recipe, out, stage, [])
    assert differing(full, saved(out, 8)) == []


@pytest.mark.parametrize("fault, kind", [("nan:rank=1,step=4,steps=2", "gpt"),
                                         pytest.param("nan:step=5,part=discriminator", "tokenizer",
                                                      marks=pytest.mark.slow)])
def test_hearing_of_a_step_late_changes_nothing(data, tmp_path, fault, kind):
    """A run that hears of each step at once, as it logs, and one whose host is a step behind the device all the time.
    """
    folder, names = data
    for name, more in (("at once", []), ("late", ["training.log_every=8", "training.validate_every=8"])):
        recipe = load_recipe(folder / f"{kind}.yaml",
                             [*names[kind], "checkpoint.every=8", "training.ema_decay=0.9", *more])
        run_ranks(train_with_faults, 2, recipe, tmp_path / name, 1, [fault])
    assert differing(saved(tmp_path / "at once", 8), saved(tmp_path / "late", 8)) == []
    states = [read_state(checkpoint_path(tmp_path / name, 8)).guard for name in ("at once", "late")]
    assert states[0] == states[1] and states[0]["skipped"] == len(events(tmp_path / "late", "skipped")) > 0
    told = [[(line["step"], line["reason"]) for line in events(tmp_path / name, "skipped")] for name
            in ("at once", "late")]
    assert told[0] == told[1]


def test_so_many_in_a_row_end_the_run_and_name_the_last_good_checkpoint(data, tmp_path):
    folder, names = data
    out = tmp_path / "run"
    recipe = load_recipe(folder / "gpt.yaml", [*names["gpt"], "checkpoint.every=2", "faults.in_a_row=3"])
    with pytest.raises(RanksFailed, match="exit code 2"):
        run_ranks(train_with_faults, 2, recipe, out, 1, ["nan:rank=1,step=3,steps=9"])
    reason = events(out, "failed")[0]["reason"]
    assert "step 5: loss, the gradient of the gpt are not finite, 3 times in a row (faults.in_a_row)" in reason
    assert "the newest checkpoint is " in reason and "step-0000004" in reason
    assert len(events(out, "skipped")) == 2
    assert differing(saved(out, 2), saved(out, 4)) == []


def test_a_run_that_cannot_recover_ends_when_started_again(data, tmp_path):
    """How many steps in a row were left out is part of a checkpoint."""
    folder, names = data
    arguments = [folder / "gpt.yaml", "--out", tmp_path / "run", *names["gpt"], *EVERY[:2], "faults.in_a_row=3"]
    code, output = start([*arguments, "--inject", "nan:step=3,steps=2", "--inject", "kill:step=5"])
    assert code == -9, output
    code, output = start([*arguments, "--inject", "nan:step=5"])
    assert code == 2 and "3 times in a row" in output


SPIKE = ["training.steps=30", "checkpoint.every=5", "checkpoint.keep=100", "training.validate_every=30",
         "faults.spike_deviations=20"]


@pytest.mark.parametrize("policy, ranks, stage", [("skip", 1, 0), ("rewind", 2, 1), ("rewind", 2, 3)])
def test_a_spike_is_left_out_or_undone(data, tmp_path, policy, ranks, stage):
    folder, names = data
    out = tmp_path / "run"
    recipe = load_recipe(folder / "gpt.yaml",
                         [*names["gpt"], *SPIKE, "checkpoint.every=1", f"faults.on_spike={policy}"])
    run_ranks(train_with_faults, ranks, recipe, out, stage, ["spike:step=25"])
    kind = {"skip": "skipped", "rewind": "rewound"}[policy]
    told, = events(out, kind)
    assert told["step"] == 25 and "is a spike" in told["reason"]
    assert differing(saved(out, 24), saved(out, 25)) == [] and differing(saved(out, 25), saved(out, 26))
    assert complete_checkpoints(out)[-1][0] == 30


def test_a_rewind_goes_back_to_the_newest_checkpoint_and_on_with_the_next_data(data, tmp_path):
    folder, names = data
    out = tmp_path / "run"
    recipe = load_recipe(folder / "gpt.yaml", [*names["gpt"], *SPIKE, "faults.on_spike=rewind"])
    run_ranks(train_with_faults, 2, recipe, out, 1, ["spike:rank=1,step=25"])
    assert differing(saved(out, 20), saved(out, 25)) == []
    assert [line["step"] for line in read_metrics(out) if "loss" in line] == [*range(1, 25), *range(26, 31)]
    assert len(read_state(checkpoint_path(out, 25)).guard["losses"]) == 20


@pytest.mark.slow
def test_a_spike_can_end_a_run(data, tmp_path):
    folder, names = data
    code, output = start([folder / "gpt.yaml", "--out", tmp_path / "run", *names["gpt"], *SPIKE, "faults.on_spike=stop",
                          "--inject", "spike:step=25"])
    assert code == 2 and "step 25: a loss of" in output and "step-0000020" in output, output
    code, output = start([folder / "gpt.yaml", "--out", tmp_path / "none", *names["gpt"], *SPIKE,
                          "faults.on_spike=rewind", "checkpoint.every=30", "--inject", "spike:step=25"])
    assert code == 2 and "nothing is saved" in output, output


class Fake:
    """An engine of which only its gradients are known."""

    decides_on_device = False

    def __init__(self, finite=True):
        self.finite, self.did = finite, []

    def gradients_finite(self):
        return torch.tensor(self.finite)

    def step(self, lr):
        self.did.append("step")

    def drop(self):
        self.did.append("drop")

    def restore_buffers(self):
        self.did.append("restore")


def decide(guard, loss=1.0, **values):
    return guard.finish(dict.fromkeys(guard.engines, 0.001),
                        {"loss": torch.tensor(loss), **{name: torch.tensor(value) for name, value in values.items()}})


def test_in_fp16_the_scaler_of_the_network_that_overflowed_hears_of_it():
    engines = {"generator": Fake(), "discriminator": Fake(finite=False)}
    guard = StepGuard(FaultConfig(in_a_row=1), engines, single_process(), fp16=True, scaler_search=17)
    verdict = decide(guard, **{"term_grad/entropy": float("inf")})
    assert (verdict.kind, verdict.expected) == ("skip", True)
    assert engines["generator"].did == ["drop", "restore"]
    assert engines["discriminator"].did == ["step", "restore"], "DeepSpeed leaves it out, and lowers the scale"
    assert guard.skipped == 1 and guard.in_a_row == 0
    assert decide(guard, loss=float("nan")).kind == "stop", "a loss is not a matter of scaling"


def test_in_fp16_the_search_for_a_scale_has_an_end():
    """From 65536 to 1, and then `faults.in_a_row` as in any precision; a run that is started again goes on counting."""
    def new():
        return StepGuard(FaultConfig(in_a_row=10), {"gpt": Fake(finite=False)}, single_process(), fp16=True,
                         scaler_search=17)

    guard = new()
    for number in range(1, 27):
        verdict = decide(guard)
        assert (verdict.kind, verdict.expected) == ("skip", number <= 17), number
        if number == 20:
            state = json.loads(json.dumps(guard.state()))
            guard = new()
            guard.restore(state)
    verdict = decide(guard)
    assert verdict.kind == "stop" and "the gradient of the gpt is not finite, 10 times in a row" in verdict.reason
    guard.engines["gpt"].finite = True
    assert decide(guard).kind == "accept" and (guard.searched, guard.in_a_row, guard.skipped) == (0, 0, 27)


def test_a_fixed_scale_that_overflows_ends_the_run():
    given = zero_settings(1) | {"fp16": {"enabled": True, "loss_scale": 1e12}}
    search = scaler_search(resolve_deepspeed(given, load_recipe("GPT-B"), data_parallel_size=1)[0])
    guard = StepGuard(FaultConfig(in_a_row=3), {"gpt": Fake(finite=False)}, single_process(), fp16=True,
                      scaler_search=search)
    assert [(verdict.kind, verdict.expected) for verdict in (decide(guard) for _ in range(3))] == [
        ("skip", False), ("skip", False), ("stop", False)]


def test_decisions_follow_from_the_saved_state():
    config = FaultConfig(spike_deviations=3.0)
    guard = StepGuard(config, {"gpt": Fake()}, single_process(), fp16=False)
    for number in range(ENOUGH - 1):
        assert decide(guard, loss=1 + 0.1 * (number % 2)).kind == "accept"
    other = StepGuard(config, {"gpt": Fake()}, single_process(), fp16=False)
    other.restore(json.loads(json.dumps(guard.state())))
    for one in (guard, other):
        assert decide(one, loss=50.0).kind == "accept", "too little is known yet"
    for one in (guard, other):
        one.losses.pop()
        assert decide(one, loss=1.05).kind == "accept"
        assert decide(one, loss=1.05 + 3.2 * 0.05).kind == "skip" and decide(one,
                                                                             loss=1.05 + 2.8 * 0.05).kind == "accept"
    assert guard.state() == other.state() and guard.state()["skipped"] == 1


@pytest.mark.parametrize("settings, said", [
    (["faults.in_a_row=0"], "faults.in_a_row is 0"),
    (["faults.spike_deviations=-1"], "faults.spike_deviations is -1"),
    (["faults.on_spike=rewind"], "without faults.spike_deviations nothing is a spike"),
])
def test_wrong_settings_are_refused(data, settings, said):
    folder, names = data
    with pytest.raises(InputError, match=said):
        load_recipe(folder / "gpt.yaml", [*names["gpt"], *settings])
