"""Tars of this host: reads that fail and come back, one reading for an index, and locations that are parts of a
directory.
"""

import errno
import os
import shutil
import threading

import pytest
from small_shards import CLASSES, encoded, plain_tar, samples, write

from gigatok_ds.cli.main import main
from gigatok_ds.data.loader import evaluation_batches
from gigatok_ds.errors import InputError, MachineError, exit_code
from gigatok_ds.shards import index as index_module
from gigatok_ds.shards import local_shards, rereading
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.remote import check_data, open_shards
from gigatok_ds.shards.shard_cache import ShardCache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return ShardCache(tmp_path / "cache")


@pytest.fixture
def bare(tmp_path):
    """Shards without an index."""
    write(tmp_path / "bare")
    for name in ("index.json", "index.npz"):
        (tmp_path / "bare" / name).unlink()
    return tmp_path / "bare"


def images(index):
    return [index.read(i) for i in range(len(index))]


ALL = [sample.image_bytes for sample in samples(23)]


# Reads that fail ---


def failing(monkeypatch, times, number=errno.ESTALE):
    """os.pread fails so often, as a file handle does that the server has lost: until the file is opened anew."""
    lost, left, real_read, real_open = set(), [times], os.pread, open

    def pread(file, *arguments):
        if left[0]:
            left[0] -= 1
            lost.add(file)
        if file in lost:
            raise OSError(number, os.strerror(number))
        return real_read(file, *arguments)

    def reopened(*arguments, **options):
        file = real_open(*arguments, **options)
        lost.discard(file.fileno())
        return file

    monkeypatch.setattr(index_module.os, "pread", pread)
    monkeypatch.setattr(index_module, "open", reopened, raising=False)
    monkeypatch.setattr(rereading, "FIRST_WAIT", 0.001)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_a_lost_file_is_opened_and_read_again(number, tmp_path, monkeypatch, caplog):
    index = ShardIndex.open(write(tmp_path / "shards").directory)
    failing(monkeypatch, 3, number)
    assert images(index) == ALL
    assert caplog.text.count("it is opened and read again") == 3 and os.strerror(number) in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_what_stays_lost_is_one_line_and_restartable(workers, tmp_path, monkeypatch):
    index = ShardIndex.open(write(tmp_path / "shards").directory)
    index.patience = 0.05
    failing(monkeypatch, 10**9)
    try:
        list(evaluation_batches(index, 16, 4, workers=workers))
        raise AssertionError("no error")
    except MachineError as error:
        text, code = str(error), exit_code(error)
    assert "Stale file handle" in text and "demo-000000.tar" in text and "\n" not in text and "Traceback" not in text
    assert code == 1


def test_a_missing_file_is_the_users(tmp_path):
    index = ShardIndex.open(write(tmp_path / "shards").directory)
    (tmp_path / "shards/demo-000001.tar").unlink()
    with pytest.raises(InputError, match=r"demo-000001.tar cannot be read"):
        index.read(7)


@pytest.mark.parametrize("number, code",
                         [(errno.ESTALE, 1), (errno.ETIMEDOUT, 1), (errno.ENOSPC, 2), (errno.ENOENT, 2)])
def test_exit_codes_tell_what_may_pass(number, code, monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("gigatok_ds.packing.checking.open_shards", fail)
    assert main(["check-shards", str(tmp_path)]) == code
    assert os.strerror(number) in capsys.readouterr().err


# One reading for an index ---


def read_only(monkeypatch, directory):
    real = local_shards.write_index

    def write_index(place, contents):
        if place == directory:
            raise PermissionError(errno.EROFS, "Read-only file system")
        real(place, contents)

    monkeypatch.setattr(local_shards, "write_index", write_index)


def counted(monkeypatch):
    scanned, real = [], index_module.scan_tar
    monkeypatch.setattr(index_module, "scan_tar", lambda path, *rest: (scanned.append(path.name), real(path, *rest))[1])
    return scanned


def test_a_directory_that_cannot_be_written_is_read_once_whatever_ranks_and_starts(bare, cache, monkeypatch, caplog):
    read_only(monkeypatch, bare)
    scanned, found = counted(monkeypatch), []
    ranks = [threading.Thread(target=lambda: found.append(images(open_shards(bare, cache=cache)))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert found == [ALL] * 4 and len(scanned) == 5
    assert "they are read once" in caplog.text and "the index is kept in" in caplog.text
    assert images(open_shards(bare, cache=cache)) == ALL and len(scanned) == 5
    shutil.copy(write(bare.parent / "other", count=3, per_shard=3).directory / "demo-000000.tar",
                bare / "demo-000004.tar")
    for name in ("demo-000000.tar", "demo-000001.tar", "demo-000002.tar", "demo-000003.tar"):
        (bare / name).unlink()
    assert images(open_shards(bare, cache=cache)) == ALL[:3] and "have changed" in caplog.text


def test_a_directory_that_can_be_written_keeps_its_index(bare, cache, monkeypatch):
    scanned = counted(monkeypatch)
    for _ in range(2):
        assert images(open_shards(bare, cache=cache)) == ALL
    assert len(scanned) == 5 and (bare / "index.json").is_file()


# Parts of a directory ---


def test_a_pattern_and_a_single_tar_are_locations(tmp_path, cache, monkeypatch):
    """timm/imagenet-1k-wds keeps train and validation in one directory."""
    for number in range(4):
        plain_tar(tmp_path / f"in/set-{'train' if number < 3 else 'validation'}-{number % 3:04d}.tar", [
            (f"k{number}.jpg", encoded(number)), (f"k{number}.cls", str(number).encode())])
    scanned = counted(monkeypatch)
    for _ in range(2):
        train = open_shards(f"{tmp_path}/in/set-train-{{0000..0002}}.tar", cache=cache)
        validation = open_shards(f"{tmp_path}/in/set-validation-0000.tar", cache=cache)
        assert train.labels.tolist() == [0, 1, 2] and validation.labels.tolist() == [3]
        assert train.read(2) == encoded(2) and validation.read(0) == encoded(3)
    assert len(scanned) == 4 and sorted(os.listdir(tmp_path / "in"))[-1].endswith(".tar")
    check_data("data.train", f"{tmp_path}/in/set-train-{{0000..0002}}.tar", ("jpg",), cache)
    with pytest.raises(InputError, match=r"set-train-0003.tar does not exist"):
        check_data("data.train", f"{tmp_path}/in/set-train-{{0000..0003}}.tar", ("jpg",), cache)


def test_a_part_of_indexed_shards_keeps_classes_and_labels(tmp_path, cache):
    write(tmp_path / "shards")
    index = open_shards(f"{tmp_path}/shards/demo-00000{{1,3}}.tar", cache=cache)
    assert index.classes == CLASSES and images(index) == ALL[5:10] + ALL[15:20]
    assert index.labels.tolist() == [i % 3 for i in (*range(5, 10), *range(15, 20))]
