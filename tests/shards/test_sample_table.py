"""The table of samples: mapped from its file, shared by processes, joined without a copy."""

import io
import itertools
import json
import pickle
import re
import subprocess
import sys
import zipfile
from hashlib import sha256

import numpy as np
import pytest
from small_shards import encoded, plain_tar

from gigatok_ds.data.joined import JoinedTable
from gigatok_ds.errors import InputError
from gigatok_ds.npy_files import map_npz
from gigatok_ds.shards.contents import Contents, TarShard, load_index, write_index
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.remote import open_shards
from gigatok_ds.shards.sample_table import COLUMNS, SampleTable
from gigatok_ds.shards.shard_cache import ShardCache

TARS, PER_TAR = 40, 5000


def large(directory, seed=0):
    """An index of 200,000 samples without tars."""
    rng, count = np.random.default_rng(seed), TARS * PER_TAR
    columns = {"offset": rng.integers(0, 10**9, count), "size": rng.integers(1, 10**6, count),
               "label": rng.integers(-1, 1000, count).astype(np.int32),
               "crc32": rng.integers(0, 2**32, count, dtype=np.uint32),
               "key": np.array([f"{number:09d}".encode() for number in range(count)])}
    shards = [TarShard(name=f"{number:05d}.tar", size=2 * 10**9, sha256="", samples=PER_TAR) for number in range(TARS)]
    directory.mkdir()
    write_index(directory, Contents(shards, [], SampleTable(columns, [PER_TAR] * TARS)))
    return columns


def rewrite(directory, change, compressed=False):
    """The index with other columns, and the hash of those."""
    table, description = directory / "index.npz", json.loads((directory / "index.json").read_text())
    with open(table, "rb") as file:
        columns = {name: np.array(column) for name, column in map_npz(file).items()}
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **change(columns))
    table.write_bytes(buffer.getvalue())
    description["table_sha256"] = sha256(buffer.getvalue()).hexdigest()
    (directory / "index.json").write_text(json.dumps(description))


def check(table, columns):
    assert len(table) == TARS * PER_TAR
    for i in (0, 1, PER_TAR - 1, PER_TAR, 123_456, len(table) - 1):
        assert table.row(i) == (i // PER_TAR, *(columns[name][i] for name in COLUMNS))
        assert table.key(i) == columns["key"][i]
    assert (table.labels() == columns["label"]).all() and table.labels().dtype == np.int32


@pytest.mark.parametrize("compressed", [False, True], ids=["mapped", "compressed"])
def test_a_table_is_what_was_written(tmp_path, compressed):
    columns = large(tmp_path / "index")
    if compressed:  # as other programs, and earlier versions, write it
        rewrite(tmp_path / "index", lambda columns: {name: column.astype(np.int64) if name == "offset" else column
                                                     for name, column in columns.items()}, compressed=True)
    table = load_index(tmp_path / "index").table
    check(table, columns)
    check(pickle.loads(pickle.dumps(table)), columns)


def test_it_takes_26_bytes_a_sample_and_travels_as_its_name(tmp_path):
    large(tmp_path / "index")  # four columns of 4 bytes, the tar's number, and nine digits of the key
    assert (tmp_path / "index/index.npz").stat().st_size < 26.1 * TARS * PER_TAR
    assert len(pickle.dumps(load_index(tmp_path / "index").table)) < 5000


def test_processes_share_it(tmp_path):
    """What a process adds when it opens an index and reads all of it: memory of its own, in bytes a sample."""
    large(tmp_path / "index")
    script = """
import re, sys
from pathlib import Path
from gigatok_ds.shards.contents import load_index
def own(): return int(re.search(r"Pss_Anon: +(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) * 1024
for _ in range(3):
    load_index(Path(sys.argv[1]))  # what is freed is used again
before = own()
table = load_index(Path(sys.argv[1])).table
sums = [int(column.view("u1").sum()) for column in table.columns.values()]
print((own() - before) / len(table))
"""
    command = [sys.executable, "-c", script, tmp_path / "index"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(found.stdout) < 4, found.stderr


@pytest.mark.parametrize(("change", "message"), [
    (lambda columns: columns | {"shard": columns["shard"][::-1]}, "not in the order of their shards"),
    (lambda columns: columns | {"offset": columns["offset"] + np.uint32(2 * 10**9)}, "beyond the end of its shard"),
    (lambda columns: columns | {"offset": columns["offset"].astype(np.int64) - 2 * 10**9}, "lies in no shard"),
    (lambda columns: columns | {"label": columns["label"][1:]}, "numbers of samples disagree"),
    (lambda columns: columns | {"label": columns["label"].astype(np.int64)}, "column label has type int64"),
    (lambda columns: columns | {"size": columns["size"].astype(np.float32)}, "column size has type float32"),
    (lambda columns: columns | {"key": columns["key"].astype(str)}, "column key has type <U9"),
], ids=itertools.count())
def test_a_table_that_is_wrong_anywhere_is_refused(tmp_path, change, message):
    large(tmp_path / "index")
    rewrite(tmp_path / "index", change)
    with pytest.raises(InputError, match=message):
        load_index(tmp_path / "index")


def test_a_mapped_array_is_no_larger_than_its_file(tmp_path):
    """A header that claims more, a place outside of the file, and a member that begins elsewhere."""
    large(tmp_path / "index")
    path = tmp_path / "index/index.npz"
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
    where = members["label.npy"].header_offset
    claimed = re.compile(rb"\(200000,\)").search(data, where)
    for change in ((claimed.start(), b"(999999,)"), (where, b"PK\0\0"), (where + 26, b"\xff\xff")):
        path.write_bytes(data[: change[0]] + change[1] + data[change[0] + len(change[1]):])
        with open(path, "rb") as file, pytest.raises((ValueError, zipfile.BadZipFile)):
            map_npz(file)


def test_joined_tables_are_their_rows_one_after_the_other(tmp_path):
    first, second = (large(tmp_path / str(seed), seed) for seed in (0, 1))
    tables = [load_index(tmp_path / str(seed)).table for seed in (0, 1)]
    joined, count = JoinedTable(tables), TARS * PER_TAR
    assert joined.counts.tolist() == [PER_TAR] * 2 * TARS and len(joined) == 2 * count
    for i in (0, count - 1, count, 2 * count - 1):
        columns = first if i < count else second
        assert joined.row(i) == (i // PER_TAR, *(columns[name][i % count] for name in COLUMNS))
        assert joined.key(i) == columns["key"][i % count]
    labels = np.concatenate([first["label"], second["label"]])
    for rows in (slice(None), slice(0, 10), slice(count - 5, count + 5), slice(count, None), slice(2 * count - 1, None),
                 slice(3, 3)):
        assert (joined.labels(rows) == labels[rows]).all()
    position = np.arange(1000)[::-1].astype(np.int32)
    other, known = joined.numbered(position), labels >= 0
    assert (other.labels()[known] == 999 - labels[known]).all() and (other.labels()[~known] == -1).all()
    assert (other.numbered(position).labels() == labels).all() and other.row(7).label == other.labels()[7]
    assert {name: column.tolist() for name, column in joined.stored().items()} == {
        name: np.concatenate([first[name], second[name]]).tolist() for name in (*COLUMNS, "key")}


def test_the_next_sample_with_a_label_is_found_from_anywhere(tmp_path):
    members = [(f"{key}.jpg", encoded(number)) for number, key in enumerate("abcde")]
    labels = [(f"{key}.cls", label) for key, label in (("a", b"1"), ("c", b"5"), ("e", b"0"))]
    index = ShardIndex.open(plain_tar(tmp_path / "x/x.tar", [*members, *labels]))
    assert [index.next_labelled(i, 10) for i in range(-1, 5)] == [0, 2, 2, 4, 4, 0]
    assert [index.next_labelled(i, 1) for i in range(-1, 5)] == [4] * 6  # itself, if it is the only one
    assert index.next_labelled(3, 0) is None


def test_more_tars_than_two_bytes_count(tmp_path):
    """100 million samples at a thousand a tar are 100,000 tars."""
    tars = 70_000
    (tmp_path / "index").mkdir()
    columns = {name: np.ones(tars, kind) for name, kind in COLUMNS.items()}
    columns["key"] = np.array([f"{number}".encode() for number in range(tars)])
    shards = [TarShard(name=f"{number}.tar", size=10, sha256="", samples=1) for number in range(tars)]
    write_index(tmp_path / "index", Contents(shards, [], SampleTable(columns, [1] * tars)))
    table = load_index(tmp_path / "index").table
    assert table.row(69_999) == (69_999, 1, 1, 1, 1) and len(table) == tars


def test_a_table_that_was_replaced_is_not_taken_for_the_other(tmp_path):
    large(tmp_path / "index")
    stored = pickle.dumps(load_index(tmp_path / "index").table)
    rewrite(tmp_path / "index", lambda columns: {name: column[:10] for name, column in columns.items()})
    with pytest.raises(InputError, match="it was replaced while it was used"):
        pickle.loads(stored)


def test_tars_that_follow_each_other_are_a_view(tmp_path):
    """A pattern of tars of an indexed directory copies nothing; any others are picked out."""
    members = {number: [(f"{number}-{i}.jpg", encoded(i)) for i in range(3)] for number in range(4)}
    for number, group in members.items():
        plain_tar(tmp_path / f"in/{number}.tar", group)
    ShardIndex.open(tmp_path / "in")
    cache = ShardCache(tmp_path / "cache")
    some, others = (open_shards(tmp_path / "in" / pattern, cache=cache) for pattern in ("{1..2}.tar", "{0,3}.tar"))
    assert [some.key(i) for i in range(len(some))] == [f"{number}-{i}" for number in (1, 2) for i in range(3)]
    assert not some.table.columns["key"].flags.owndata and some.read(4) == encoded(1)
    assert [others.key(i) for i in range(len(others))] == [f"{number}-{i}" for number in (0, 3) for i in range(3)]
