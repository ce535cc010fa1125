"""A thousand corrupted images and tars: each is read or refused with an InputError; no worker crashes or hangs."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from made_pictures import corrupted, encode, picture
from PIL import Image
from small_shards import plain_tar
from training_runs import forget_shared_memory

from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.loader import ImageBatches
from gigatok_ds.data.reader import ReadingPlan
from gigatok_ds.data.transforms import decode_image
from gigatok_ds.errors import InputError
from gigatok_ds.shards.index import ShardIndex

IMAGES, TARS, CHANGED_TARS = 700, 150, 150
SECONDS = 5  # that a single image or tar may take, on a machine that is busy with other tests


@pytest.fixture
def limit():
    """Call it before something that must not take longer than SECONDS."""

    def expire(number, frame):
        raise TimeoutError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, expire)
    yield lambda seconds=SECONDS: signal.alarm(seconds)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def whole_images():
    """One of each kind that is read."""
    exif = Image.Exif()
    exif[0x0112] = 6
    small = picture(40, 33)
    deep = np.asarray(small.convert("L")).astype(np.uint16) * 257
    yield encode(small, "JPEG")
    yield encode(small, "JPEG", progressive=True, exif=exif)
    yield encode(small.convert("L"), "JPEG")
    yield encode(small.convert("CMYK"), "JPEG")
    yield encode(picture(700, 660), "JPEG", quality=30)  # decoded at a fraction by the fast way
    yield encode(small, "PNG")
    yield encode(small.convert("RGBA"), "PNG")
    yield encode(small.convert("P"), "PNG")
    yield encode(Image.fromarray(deep), "PNG")
    yield encode(small, "WEBP")
    yield encode(small, "WEBP", lossless=True)
    yield encode(small, "WEBP", save_all=True, append_images=[small.transpose(Image.Transpose.ROTATE_180)])
    yield encode(small, "BMP")


@pytest.fixture(scope="module")
def bad_images():
    kinds = list(whole_images())
    for data in kinds:
        decode_image(data, "whole")
    return [corrupted(kinds[number % len(kinds)], np.random.default_rng(number)) for number in range(IMAGES)]


@pytest.fixture(scope="module")
def decodable(bad_images):
    """Whether each of them is an image still."""
    found = []
    for number, data in enumerate(bad_images):
        try:
            decode_image(data, str(number))
        except InputError as error:
            assert "\n" not in str(error) and str(number) in str(error)
            found.append(False)
        else:
            found.append(True)
    assert IMAGES // 10 < sum(found) < IMAGES * 9 // 10  # both happen
    return found


def test_decoding_ends_soon(bad_images, limit):
    for decoding in ("exact", "fast"):
        transform = training_transform(32, decoding=decoding)
        for number, data in enumerate(bad_images):
            limit()
            try:
                pixels = transform.decode(data, str(number), np.random.default_rng(number))
            except InputError:
                continue
            assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8


@pytest.mark.parametrize("decoding", ["exact", "fast"])
def test_workers_replace_what_cannot_be_decoded(bad_images, decodable, decoding, tmp_path, limit):
    good = next(whole_images())
    members = []
    for number, data in enumerate(bad_images):
        for key, image in ((f"{number:04d}-bad", data), (f"{number:04d}-good", good)):
            members += [(f"{key}.jpg", image), (f"{key}.cls", b"1")]
    index = ShardIndex.open(plain_tar(tmp_path / "shards" / "x.tar", members))
    plan = ReadingPlan(global_batch_size=28, micro_batch_size=28, shuffle=False, stop_step=2 * IMAGES // 28)
    batches = ImageBatches(index, training_transform(32, decoding=decoding), plan, seed=0, workers=2)
    replaced = []
    for batch in batches:
        limit(30)
        assert batch["images"].isfinite().all() and batch["images"].abs().max() <= 1
        replaced += batch["replaced"].tolist()
    assert replaced == [flag for full in decodable for flag in (not full, False)]
    assert batches.bad_samples.replaced == decodable.count(False) == len(batches.bad_samples.reasons)


@pytest.fixture(scope="module")
def small_tar(tmp_path_factory):
    rng = np.random.default_rng(0)
    members = []
    for number in range(5):
        data = encode(Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)), "PNG")
        members += [(f"k{number}.png", data), (f"k{number}.cls", str(number).encode())]
    return plain_tar(tmp_path_factory.mktemp("tar") / "x.tar", members) / "x.tar"


def read_all(index):
    """How many samples could be read; the others are refused."""
    read = 0
    for i in range(len(index)):
        try:
            decode_image(index.read(i), index.key(i))
            read += 1
        except InputError:
            pass
    return read


def test_corrupted_tars_are_indexed_or_refused(small_tar, tmp_path, limit):
    refused = read = 0
    for number in range(TARS):
        limit()
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "x.tar").write_bytes(corrupted(small_tar.read_bytes(), np.random.default_rng(number)))
        for tolerated in (0.0, 0.5):
            try:
                read += read_all(ShardIndex.open(directory, max_bad_fraction=tolerated))
            except InputError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > TARS // 10 and read > TARS // 10


def test_tars_that_change_after_indexing_are_noticed(small_tar, tmp_path, limit):
    full = small_tar.read_bytes()
    index = ShardIndex.open(shutil.copytree(small_tar.parent, tmp_path / "index"))
    original = [index.read(i) for i in range(5)]
    noticed = 0
    for number in range(CHANGED_TARS):
        limit()
        directory = shutil.copytree(tmp_path / "index", tmp_path / str(number))
        (directory / "x.tar").write_bytes(corrupted(full, np.random.default_rng(10_000 + number)))
        try:
            index = ShardIndex.open(directory)
            for i in range(5):
                assert index.read(i) == original[i]  # what is read is what was indexed
        except InputError as error:
            assert "\n" not in str(error)
            noticed += 1
    assert noticed > CHANGED_TARS // 2


def children():
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker in /proc")
def test_a_worker_that_is_killed_ends_the_run(small_tar, tmp_path, limit):
    index = ShardIndex.open(shutil.copytree(small_tar.parent, tmp_path / "shards"))
    plan, before = ReadingPlan(global_batch_size=2, micro_batch_size=2), children()
    loader = ImageBatches(index, training_transform(8), plan, seed=0, workers=1)
    batches = iter(loader)
    next(batches)
    worker, = children() - before
    limit(30)
    os.kill(int(worker), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"worker.*exited unexpectedly|killed by signal"):
        for _ in range(100):
            next(batches)
    forget_shared_memory(worker)
