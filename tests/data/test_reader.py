"""The reading order: properties over random sizes and layouts; and the image loaders that follow it."""

import io
import os
import shutil
import subprocess
import tarfile
import time

import numpy as np
import pytest
import torch
from reading_plans import planned
from small_shards import with_bad_images, write

from gigatok_ds.cluster.share import WHOLE, Share
from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.loader import MAX_REPLACEMENTS, ImageBatches, evaluation_batches
from gigatok_ds.data.order import epoch_order
from gigatok_ds.data.reader import GlobalBatches, MicroBatches, ReadingPlan, micro_steps, rank_slice
from gigatok_ds.data.transforms import center_crop, decode_image, to_tensor
from gigatok_ds.errors import InputError
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.streams import numpy_stream


def random_cases(number):
    """(count, global batch, data ranks, micro batch, seed): the batch divides evenly, the data need not."""
    rng = np.random.default_rng(20240601)
    for _ in range(number):
        ranks, micro, repeats = (int(rng.integers(1, high, endpoint=True)) for high in (6, 5, 4))
        batch = ranks * micro * repeats
        count = int(rng.integers(batch, 6 * batch, endpoint=True))
        yield count, batch, ranks, micro, int(rng.integers(2**31))


CASES = list(random_cases(40))


def full(size):
    return ReadingPlan(global_batch_size=size, micro_batch_size=size, share=WHOLE)


def part(size, micro, rank, ranks, start=0):
    return ReadingPlan(global_batch_size=size, micro_batch_size=micro, share=Share(rank=rank, size=ranks),
                       start_step=start)


def take(sampler, number):
    iterator = iter(sampler)
    return [next(iterator) for _ in range(number)]


@pytest.mark.parametrize("count", [1, 2, 17, 1000])
def test_epoch_order_is_a_permutation_and_a_pure_function(count):
    orders = [epoch_order(count, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for order in orders:
        assert order.dtype == np.int64 and (np.sort(order) == np.arange(count)).all()
    assert (epoch_order(count, 1, 2) == orders[-1]).all()
    if count == 1000:
        assert len({order.tobytes() for order in orders}) == len(orders)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("drop_last", [True, False])
def test_slices_put_together_are_the_batch_in_its_order(case, drop_last):
    count, size, ranks, micro, seed = case
    batches = GlobalBatches(count, size, seed, drop_last=drop_last)
    for step in (0, 1, 7):
        batch = batches.batch(step)
        assert batch.shape == (size,)
        parts = [rank_slice(batch, Share(rank=rank, size=ranks), micro, index)
                 for index in range(micro_steps(size, ranks, micro)) for rank in range(ranks)]
        assert all(len(part) == micro for part in parts)
        assert (np.concatenate(parts) == batch).all()


@pytest.mark.parametrize("case", CASES)
def test_every_layout_reads_what_one_process_reads(case):
    count, size, ranks, micro, seed = case
    batches = GlobalBatches(count, size, seed)
    steps = 5
    alone = [address for addresses in take(MicroBatches(batches, full(size)), steps) for address in addresses]
    per_rank = micro_steps(size, ranks, micro)
    layout = [take(MicroBatches(batches, part(size, micro, rank, ranks)), steps * per_rank) for rank in range(ranks)]
    together = [address for parts in zip(*layout, strict=True) for part in parts for address in part]
    assert together == alone
    assert [address.position for address in alone] == list(range(steps * size))
    assert [address.epoch for address in alone[::size]] == [batches.epoch_of(step) for step in range(steps)]


@pytest.mark.parametrize("case", CASES)
def test_no_sample_twice_in_an_epoch(case):
    count, size, _, _, seed = case
    batches = GlobalBatches(count, size, seed)
    per_epoch = count // size
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        assert {batches.epoch_of(step) for step in steps} == {epoch}
        read = np.concatenate([batches.batch(step) for step in steps])
        assert len(np.unique(read)) == per_epoch * size and read.min() >= 0 and read.max() < count


@pytest.mark.parametrize("case", CASES)
def test_without_drop_last_every_epoch_reads_everything_once(case):
    count, size, _, _, seed = case
    batches = GlobalBatches(count, size, seed, drop_last=False)
    located = [batches.locate(step) for step in range(-(-3 * count // size))]
    epochs, samples = (np.concatenate(parts)[: 3 * count] for parts in zip(*located, strict=True))
    for epoch in range(3):
        assert (np.sort(samples[epochs == epoch]) == np.arange(count)).all()
        assert (samples[epochs == epoch] == epoch_order(count, seed, epoch)).all()


@pytest.mark.parametrize("case", CASES)
def test_resuming_gives_the_same_batches(case):
    count, size, ranks, micro, seed = case
    per_step, resumed_at, steps = micro_steps(size, ranks, micro), 4, 9
    full = take(MicroBatches(GlobalBatches(count, size, seed), part(size, micro, ranks - 1, ranks)),
                 steps * per_step)
    rest = take(MicroBatches(GlobalBatches(count, size, seed), part(size, micro, ranks - 1, ranks, resumed_at)),
                (steps - resumed_at) * per_step)
    assert rest == full[resumed_at * per_step :]


def test_a_far_step_needs_no_history():
    near, far = GlobalBatches(1000, 32, 5), GlobalBatches(1000, 32, 5)
    for step in range(200):
        near.batch(step)
    assert (near.batch(10**9) == far.batch(10**9)).all()
    assert far.epoch_of(10**9) == 10**9 // (1000 // 32)


def test_without_shuffle_the_order_is_that_of_the_data():
    batches = GlobalBatches(10, 4, 0, shuffle=False)
    assert [batches.batch(step).tolist() for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]


def test_epochs_and_seeds_differ():
    def first(seed, step):
        return GlobalBatches(1000, 100, seed).batch(step).tolist()

    assert len({tuple(first(seed, step)) for seed in (0, 1, 2) for step in (0, 10, 20)}) == 9


@pytest.mark.parametrize("size", [0, -1, 11])
def test_a_batch_larger_than_the_data_is_refused_with_the_fix(size):
    message = rf"training\.global_batch_size is {size}, the data has 10 samples; set .* to 1 \.\.\. 10"
    with pytest.raises(InputError, match=message):
        GlobalBatches(10, size, 0)


@pytest.mark.parametrize("ranks, micro", [(3, 1), (2, 3), (1, 5), (1, 16), (1, 0)])
def test_a_layout_that_does_not_divide_the_batch_is_refused(ranks, micro):
    with pytest.raises(InputError, match="not a multiple"):
        micro_steps(8, ranks, micro)
    with pytest.raises(InputError, match="not a multiple"):
        rank_slice(np.arange(8), Share(size=ranks), micro, 0)


# Loaders ---

@pytest.fixture
def shards(tmp_path):
    return write(tmp_path / "shards").directory


TRANSFORM = training_transform(16, (0.8, 1.0), True)


def joined(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def image_batches(index, **arguments):
    defaults = {"global_batch_size": 8, "micro_batch_size": 8, "seed": 3}
    return planned(ImageBatches, index, TRANSFORM, **defaults | arguments)


def test_image_batches_are_what_the_addresses_say(shards):
    index = ShardIndex.open(shards)
    batches = image_batches(index)
    assert batches.micro_steps == 1 and [batches.epoch_of(step) for step in range(5)] == [0, 0, 1, 1, 2]
    read = joined(take(batches, 5))
    assert read["images"].shape == (40, 3, 16, 16) and read["images"].dtype == torch.float32
    assert read["labels"].dtype == torch.int64 and not read["replaced"].any()
    assert read["position"].tolist() == list(range(40))
    assert read["epoch"].tolist() == [i // 16 for i in range(40)]
    for image, label, epoch, sample in zip(*(read[name] for name in ("images", "labels", "epoch", "sample")),
                                           strict=True):
        rng = numpy_stream(3, "augment", int(epoch), int(sample))
        assert torch.equal(image, TRANSFORM(decode_image(index.read(int(sample)), "x"), rng))
        assert label == index.label(int(sample))


def test_augmentation_changes_with_the_epoch(shards):
    read = joined(take(image_batches(ShardIndex.open(shards)), 4))
    rows = list(zip(read["images"], read["sample"].tolist(), read["epoch"].tolist(), strict=True))
    first, second = ({sample: image for image, sample, epoch in rows if epoch == wanted} for wanted in (0, 1))
    both = first.keys() & second.keys()
    assert len(both) >= 5 and not any(torch.equal(first[sample], second[sample]) for sample in both)


@pytest.mark.parametrize("ranks, micro", [(1, 2), (2, 4), (2, 2), (4, 1), (8, 1)])
def test_images_do_not_depend_on_the_layout(shards, ranks, micro):
    index = ShardIndex.open(shards)
    expected = joined(take(image_batches(index), 3))
    parts = [image_batches(index, micro_batch_size=micro, share=Share(rank=rank, size=ranks))
             for rank in range(ranks)]
    streams = [take(part, 3 * part.micro_steps) for part in parts]
    assert_equal(joined([batch for group in zip(*streams, strict=True) for batch in group]), expected)


def test_images_do_not_depend_on_workers_or_resuming(shards):
    index = ShardIndex.open(shards)
    expected = take(image_batches(index, micro_batch_size=4), 12)
    for start_step, workers in ((0, 2), (3, 0), (3, 1)):
        torch.manual_seed(99)
        resumed = image_batches(index, micro_batch_size=4, start_step=start_step, workers=workers)
        for _ in range(2):  # iterating again starts over, with the same worker processes
            read = take(resumed, 12 - 2 * start_step)
            for batch, reference in zip(read, expected[2 * start_step :], strict=True):
                assert_equal(batch, reference)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_generator_alone(shards, workers):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    take(image_batches(ShardIndex.open(shards), workers=workers), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_undecodable_images_are_replaced_counted_and_named(tmp_path, caplog):
    bad = (4, 5, 22)
    index = with_bad_images(tmp_path / "in", bad)
    read = joined(take(image_batches(index, shuffle=False), 2))
    assert read["replaced"].nonzero().flatten().tolist() == [4, 5]
    assert read["sample"].tolist() == list(range(16))
    assert read["labels"][[3, 4, 5, 6]].tolist() == [0, 0, 0, 0]  # sample 6 stands in for 4 and 5
    assert "'s0004'" in caplog.text and "'s0005'" in caplog.text
    wrapped = joined(take(image_batches(index, global_batch_size=23, micro_batch_size=23, shuffle=False), 1))
    assert wrapped["replaced"].nonzero().flatten().tolist() == [4, 5, 22] and wrapped["labels"][22] == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_is_bad_throughout_ends_the_run_in_one_line(tmp_path, workers):
    index = with_bad_images(tmp_path / "in", range(23))
    with pytest.raises(InputError, match=f"{MAX_REPLACEMENTS} samples in a row") as caught:
        take(image_batches(index, workers=workers), 1)
    assert "\n" not in str(caught.value)


def test_a_shard_changed_during_training_is_not_papered_over(shards):
    index = ShardIndex.open(shards)
    (shards / "demo-000002.tar").write_bytes(b"short")
    with pytest.raises(InputError, match=r"demo-000002.tar has changed"):
        take(image_batches(index, workers=1), 4)


def test_too_little_data_for_a_batch(shards):
    with pytest.raises(InputError, match=r"training\.global_batch_size is 24, the data has 23 samples"):
        image_batches(ShardIndex.open(shards), global_batch_size=24)


@pytest.mark.parametrize("ranks, batch", [(1, 1), (1, 5), (1, 23), (1, 40), (2, 4), (3, 5), (7, 2), (30, 1)])
def test_evaluation_reads_everything_once_in_equal_numbers_of_batches(shards, ranks, batch):
    index = ShardIndex.open(shards)
    loaders = [evaluation_batches(index, 16, batch, Share(rank=rank, size=ranks)) for rank in range(ranks)]
    streams = [list(loader) for loader in loaders]
    number = -(-23 // (ranks * batch))
    assert {len(stream) for stream in streams} == {len(loader) for loader in loaders} == {number}
    read = joined([part for group in zip(*streams, strict=True) for part in group])
    valid = read["valid"]
    assert valid.dtype == torch.bool and valid.tolist() == [True] * 23 + [False] * (len(valid) - 23)
    assert read["sample"][valid].tolist() == list(range(23))
    assert read["labels"][valid].tolist() == index.labels.tolist()
    for i in (0, 11, 22):
        assert torch.equal(read["images"][i], to_tensor(center_crop(decode_image(index.read(i), "x"), 16)))


def test_evaluation_does_not_depend_on_workers_and_refuses_bad_images(shards, tmp_path):
    index = ShardIndex.open(shards)
    alone, together = (joined(list(evaluation_batches(index, 16, 4, workers=workers))) for workers in (0, 2))
    assert_equal(together, alone)
    with pytest.raises(InputError, match="'s0007'"):
        list(evaluation_batches(with_bad_images(tmp_path / "in", (7,)), 16, 4, workers=1))


def resident_share(path):
    """Share of a file's pages that are in memory."""
    found = subprocess.run(["fincore", "--bytes", "--noheadings", "--output", "RES,SIZE", path], check=True,
                           capture_output=True, text=True).stdout.split()
    return int(found[0]) / int(found[1])


@pytest.mark.skipif(shutil.which("fincore") is None, reason="no fincore")
def test_with_locality_a_tar_is_read_ahead_as_a_whole(tmp_path):
    directory = write(tmp_path / "shards", count=3, per_shard=3).directory
    tar, = directory.glob("*.tar")
    with tarfile.open(tar, "a") as file:  # ten megabytes that are no sample's are not read by themselves
        member = tarfile.TarInfo("filling.bin")
        member.size = 10_000_000
        file.addfile(member, io.BytesIO(bytes(member.size)))
    (directory / "index.json").unlink()
    index = ShardIndex.open(directory)
    batches = {"global_batch_size": 1, "micro_batch_size": 1, "stop_step": 1}
    with open(tar, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_share(tar) > 0.5:
        pytest.skip("this file system does not forget what it has read")
    assert len(list(image_batches(index, **batches))) == 1 and resident_share(tar) < 0.5
    assert len(list(image_batches(index, shuffle_shards=1, **batches))) == 1
    deadline = time.monotonic() + 20
    while resident_share(tar) < 0.9:
        assert time.monotonic() < deadline
        time.sleep(0.05)
