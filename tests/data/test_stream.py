"""The stream of samples is one and the same, for any number of ranks and workers and wherever it was interrupted."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import HELPERS
from reading_plans import planned
from small_shards import with_bad_images
from stream_ranks import GLOBAL_BATCH, image_batches, lines

from gigatok_ds.cluster.local_job import free_port
from gigatok_ds.cluster.share import Share
from gigatok_ds.data import order as order_module
from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.loader import ImageBatches, evaluation_batches
from gigatok_ds.data.order import Locality, epoch_order
from gigatok_ds.data.reader import GlobalBatches, MicroBatches, ReadingPlan
from gigatok_ds.shards.index import ShardIndex

RANKS = HELPERS / "stream_ranks.py"


@st.composite
def layouts(draw):
    """(samples, ranks, micro batch, micro steps, seed, locality, start, steps): whatever a run may be."""
    ranks, micro, accumulation = (draw(st.integers(1, most)) for most in (8, 4, 3))
    size = ranks * micro * accumulation
    count = draw(st.integers(size, size + 200))
    seed, locality = draw(st.integers(0, 2**40)), draw(st.sampled_from([None, 1, 2, 5]))
    shards = np.sort(np.random.default_rng(seed).integers(0, 10, count))
    return (count, ranks, micro, accumulation, seed, locality and Locality(np.bincount(shards), locality),
            draw(st.integers(0, 30)), draw(st.integers(1, 12)))


def addresses(batches, micro, ranks, start, stop):
    """What all ranks read together, in the order of the global stream."""
    plans = [ReadingPlan(global_batch_size=batches.global_batch_size, micro_batch_size=micro,
                         share=Share(rank=rank, size=ranks), start_step=start, stop_step=stop) for rank in range(ranks)]
    streams = [list(MicroBatches(batches, plan)) for plan in plans]
    assert len({len(stream) for stream in streams}) == 1
    return [address for turn in zip(*streams, strict=False) for part in turn for address in part]


@pytest.mark.parametrize("held", [order_module.HELD, 0], ids=["held", "computed"])
@settings(max_examples=75, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts())
def test_any_layout_reads_the_one_process_order_and_resumes_in_it(monkeypatch, held, layout):
    monkeypatch.setattr(order_module, "HELD", held)
    count, ranks, micro, accumulation, seed, locality, start, steps = layout
    size = ranks * micro * accumulation
    alone = addresses(GlobalBatches(count, size, seed, locality=locality), size, 1, 0, start + steps)
    together = addresses(GlobalBatches(count, size, seed, locality=locality), micro, ranks, 0, start + steps)
    assert together == alone and [address.position for address in alone] == list(range((start + steps) * size))
    resumed = addresses(GlobalBatches(count, size, seed, locality=locality), micro, ranks, start, start + steps)
    assert resumed == alone[start * size :]
    for epoch in {address.epoch for address in alone}:
        read = [address.sample for address in alone if address.epoch == epoch]
        assert len(set(read)) == len(read) and set(read) <= set(range(count))
        if epoch < alone[-1].epoch:  # a whole epoch: all but what does not fill a batch
            assert len(read) == count // size * size


@pytest.mark.parametrize("held", [order_module.HELD, 0], ids=["held", "computed"])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 300), shards=st.integers(1, 12), mixed=st.integers(1, 40), seed=st.integers(0, 2**30),
       epoch=st.integers(0, 4))
def test_locality_is_bounded(monkeypatch, held, count, shards, mixed, seed, epoch):
    monkeypatch.setattr(order_module, "HELD", held)
    numbers = np.sort(np.random.default_rng(seed).integers(0, shards, count))
    order = epoch_order(count, seed, epoch, Locality(np.bincount(numbers), mixed))[np.arange(count)]
    assert sorted(order.tolist()) == list(range(count))
    # From the first to the last reading of a tar only the others of its group are read, and they are at most `mixed`.
    read = numbers[order].tolist()
    spans = {tar: (read.index(tar), count - read[::-1].index(tar)) for tar in set(read)}
    assert all(len(set(read[first:end])) <= mixed for first, end in spans.values())


def test_all_tars_at_a_time_is_a_mix_of_everything():
    numbers = np.repeat(np.arange(10), 100)
    order = epoch_order(1000, 3, 0, Locality(np.bincount(numbers), 10))
    assert len(set(numbers[order[:20]].tolist())) > 5
    first = [numbers[epoch_order(1000, seed, 0, Locality(np.bincount(numbers), 1))[0]] for seed in range(30)]
    assert len(set(first)) > 5  # the order of the tars is random, too


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three tars, 45 samples, two of which cannot be decoded."""
    folder = tmp_path_factory.mktemp("stream")
    with_bad_images(folder / "shards", bad=(7, 31), count=45, tars=3)
    return folder / "shards"


@pytest.mark.parametrize("case", range(8))
def test_real_workers_change_nothing(shards, case):
    rng = np.random.default_rng(case)
    ranks, micro, workers = (int(rng.integers(low, high)) for low, high in ((1, 4), (1, 4), (0, 3)))
    size = ranks * micro * int(rng.integers(1, 3))
    start, stop, index = int(rng.integers(0, 6)), int(rng.integers(6, 9)), ShardIndex.open(shards)

    def batches(**arguments):
        return planned(ImageBatches, index, training_transform(16), seed=case, global_batch_size=size,
                       shuffle_shards=[None, 1, 2][case % 3], **arguments)

    alone = list(batches(micro_batch_size=size, start_step=start, stop_step=stop))
    assert len(alone) == stop - start
    parts = [list(batches(micro_batch_size=micro, share=Share(rank=rank, size=ranks), start_step=start, stop_step=stop,
                          workers=workers)) for rank in range(ranks)]
    for name in ("images", "labels", "position", "sample", "replaced"):
        together = torch.cat([part[name] for turn in zip(*parts, strict=True) for part in turn])
        assert torch.equal(together, torch.cat([batch[name] for batch in alone])), name


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 60), ranks=st.integers(1, 9), batch=st.integers(1, 9), part=st.integers(1, 60))
def test_evaluation_has_equal_numbers_of_batches(count, ranks, batch, part):
    class Index:
        def __len__(self):
            return count

    images = min(part, count)
    loaders = [evaluation_batches(Index(), 16, batch, Share(rank=rank, size=ranks), images=images)
               for rank in range(ranks)]
    assert len({len(loader) for loader in loaders}) == 1
    taken = [position for loader in loaders for rows in loader.batch_sampler for position in rows if position < images]
    assert sorted(taken) == list(range(images))


def start_ranks(shards, out, ranks, workers, steps):
    settings = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                             "OMP_NUM_THREADS": "1"}
    command = [sys.executable, RANKS, shards, out, str(workers), str(steps)]
    return [subprocess.Popen(command, env=settings | {"RANK": str(rank)}) for rank in range(ranks)]


def children(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill_during_the_run(processes, consumed, samples):
    """SIGKILL for all ranks once so many samples are consumed; their workers must end by themselves."""
    workers = []
    try:
        deadline = time.monotonic() + 120
        while not consumed.exists() or int(consumed.read_text()) < samples:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.01)
        workers = [child for process in processes for child in children(process.pid)]
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert len(workers) == 2 * len(processes)
    deadline = time.monotonic() + 30
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "data workers outlive their rank"
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the data workers in /proc")
def test_four_ranks_of_two_workers_killed_and_resumed_as_two_of_one_read_the_same(shards, tmp_path):
    consumed = tmp_path / "samples.txt"
    kill_during_the_run(start_ranks(shards, tmp_path, 4, 2, steps=10**6), consumed, 9 * GLOBAL_BATCH)
    before = int(consumed.read_text())
    logs = {path: path.read_text() for path in tmp_path.glob("rank-*.txt")}
    assert len(logs) == 4
    read = [line for text in logs.values() for line in text.splitlines() if int(line.split()[0]) < before]
    for path in logs:
        path.unlink()
    resumed = start_ranks(shards, tmp_path, 2, 1, steps=12)
    assert [process.wait(timeout=120) for process in resumed] == [0, 0]
    assert int(consumed.read_text()) == before + 12 * GLOBAL_BATCH
    read += [line for path in tmp_path.glob("rank-*.txt") for line in path.read_text().splitlines()]
    index = ShardIndex.open(shards)
    alone = list(itertools.islice(image_batches(shards, micro_batch_size=GLOBAL_BATCH), before // GLOBAL_BATCH + 12))
    expected = [line for batch in alone for line in lines(index, batch)]
    assert sorted(read, key=lambda line: int(line.split()[0])) == expected
    assert any(batch["replaced"].any() for batch in alone)
