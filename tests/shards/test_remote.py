"""Shards from URLs and commands: what is fetched when, and what happens when that goes wrong."""

import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
from one_rank import ALONE
from shard_server import Server, copies, only_error
from small_models import small_tokenizer
from small_shards import CLASSES, samples, tree, write
from training_runs import prepare

from gigatok_ds.checkpoint.standalone import save_standalone
from gigatok_ds.cli.main import main
from gigatok_ds.config.load import differing_keys, load_recipe
from gigatok_ds.data.codes import CodeDataset, CodeSample, write_code_shards
from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.loader import ImageBatches
from gigatok_ds.data.reader import ReadingPlan
from gigatok_ds.packing.checking import check_shards
from gigatok_ds.sampling.augmented_views import views_of
from gigatok_ds.sampling.extract import Extraction, extract_codes
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.patterns import expanded
from gigatok_ds.shards.remote import check_data, open_shards, short_name
from gigatok_ds.shards.shard_cache import ShardCache
from gigatok_ds.training.code_sources import open_source
from gigatok_ds.training.environment import write_environment
from gigatok_ds.training.run_checks import check_run
from gigatok_ds.transport import http_client, transports

pytestmark = pytest.mark.usefixtures("remote_settings")

TARS = [f"demo-{number:06d}.tar" for number in range(5)]
PATTERN = "demo-{000000..000004}.tar"


@pytest.fixture
def bare(shards, tmp_path):
    """The same tars without an index."""
    (tmp_path / "bare").mkdir()
    for name in TARS:
        shutil.copy(shards / name, tmp_path / "bare")
    return tmp_path / "bare"


@pytest.fixture
def serve():
    with contextlib.ExitStack() as servers:
        yield lambda folder: servers.enter_context(contextlib.closing(Server(folder)))


def assert_same(index, reference):
    assert index.shards == reference.shards and index.identity() == reference.identity()
    assert len(index) == len(reference) and index.labels.tolist() == reference.labels.tolist()
    assert all((index.key(i), index.read(i)) == (reference.key(i), reference.read(i)) for i in range(len(index)))


# What is fetched when ---


def test_a_directory_with_an_index_is_fetched_tar_by_tar(shards, serve, cache):
    server = serve(shards)
    index = open_shards(server.url, cache=cache)
    assert server.fetched() == [] and index.classes == CLASSES and index.location == server.url
    index.read(7)
    assert server.fetched() == copies(cache) == ["demo-000001.tar"]
    assert_same(index, ShardIndex.open(shards))
    assert server.fetched() == copies(cache) == TARS
    assert_same(pickle.loads(pickle.dumps(index)), ShardIndex.open(shards))


@pytest.mark.parametrize("path", ["", "/", "/" + PATTERN])
def test_tars_without_an_index_are_fetched_once_and_indexed(path, shards, bare, serve, cache):
    server = serve(bare)
    for _ in range(2):
        index = open_shards(server.url + path, cache=cache)
        assert index.shards == ShardIndex.open(shards).shards and index.classes == []
        assert server.fetched() == TARS
    assert index.labels.tolist() == ShardIndex.open(shards).labels.tolist()
    assert [index.read(i) for i in range(23)] == [sample.image_bytes for sample in samples(23)]
    assert server.fetched() == TARS


def test_a_pattern_keeps_its_order_and_may_be_one_tar(bare, serve, cache):
    url = serve(bare).url
    index = open_shards(url + "/demo-00000{3,1}.tar", cache=cache)
    assert [shard.name for shard in index.shards] == ["demo-000003.tar", "demo-000001.tar"] and index.key(0) == "s0015"
    assert len(open_shards(url + "/demo-000004.tar", cache=cache)) == 3


@pytest.mark.parametrize("scheme", ["file", "memory"])
@pytest.mark.parametrize("indexed", [True, False])
def test_locations_of_fsspec(scheme, indexed, shards, bare, cache, tmp_path):
    import fsspec

    folder = shards if indexed else bare
    location = f"file://{folder}" if scheme == "file" else f"memory://{tmp_path.name}-{indexed}/train"
    if scheme == "memory":
        fsspec.filesystem("memory").put(f"{folder}/", location + "/", recursive=True)
    index = open_shards(location, cache=cache)
    assert index.classes == (CLASSES if indexed else [])
    assert copies(cache) == ([] if indexed else TARS)
    assert [index.read(i) for i in range(23)] == [sample.image_bytes for sample in samples(23)]
    assert [shard.name for shard in open_shards(f"{location}/{PATTERN}", cache=cache).shards] == TARS


def test_the_next_start_needs_no_network(shards, bare, serve, cache, caplog):
    locations = []
    for folder in (shards, bare):
        server = serve(folder)
        locations.append(server.url)
        assert len([open_shards(server.url, cache=cache).read(i) for i in range(23)]) == 23
        server.close()
    pattern = serve(bare)
    locations.append(f"{pattern.url}/{PATTERN}")
    open_shards(locations[-1], cache=cache)
    pattern.close()
    for location in locations:
        caplog.clear()
        index = open_shards(location, cache=cache)
        assert [index.read(i) for i in range(23)] == [sample.image_bytes for sample in samples(23)]
        assert "going on with the" in caplog.text and "cannot be read after 2 attempts" in caplog.text


def test_what_checks_data_before_a_run_fetches_the_index(bare, serve, cache):
    server = serve(bare)
    check_data("data.train", server.url, ("jpg", "jpeg", "png"), cache)
    assert server.fetched() == copies(cache) == TARS
    only_error(lambda: check_data("data.train", f"{bare}/none", ("jpg",), cache), "data.train is ", "not a directory")


# Failures that pass, and those that do not ---


@pytest.mark.parametrize("failures", [[503, 503], ["cut"], [429, "cut", 500, 502]])
def test_a_failure_that_passes_is_tried_again(failures, shards, serve, cache, caplog):
    server = serve(shards)
    server.failures = {"demo-000002.tar": list(failures), "index.npz": list(failures), "index.json": list(failures)}
    assert_same(open_shards(server.url, cache=cache), ShardIndex.open(shards))
    assert server.fetched() == sorted([*TARS, *["demo-000002.tar"] * len(failures)])
    assert caplog.text.count("demo-000002.tar: attempt ") == len(failures) and "attempt 1 failed" in caplog.text
    assert caplog.text.count("cut off after") == 3 * failures.count("cut")
    assert not list(cache.root.glob("*/.demo*"))


@pytest.mark.parametrize("status, attempts, words", [
    (404, 1, "does not exist"), (410, 1, "does not exist"), (403, 1, "may not be read"), (401, 1, "credentials"),
    (400, 1, "cannot be read"), (500, 6, "after 6 attempts"), ("cut", 6, "cut off after"),
])
def test_a_failure_that_stays_is_one_line(status, attempts, words, shards, serve, cache):
    server = serve(shards)
    server.failures = {"demo-000002.tar": [status] * 9}
    index = open_shards(server.url, cache=cache)
    only_error(lambda: index.read(11), f"{server.url}/demo-000002.tar", words)
    assert server.fetched() == ["demo-000002.tar"] * attempts and copies(cache) == []
    assert not list(cache.root.glob("*/.demo*"))


def test_a_server_that_is_silent_is_given_up(shards, serve, cache, monkeypatch, caplog):
    monkeypatch.setattr(http_client, "TIMEOUT", 0.2)
    server = serve(shards)
    server.failures = {"demo-000000.tar": ["slow"]}
    assert open_shards(server.url, cache=cache).read(0) == next(samples(1)).image_bytes
    assert "timed out" in caplog.text


def test_locations_that_hold_nothing(tmp_path, serve, cache, shards):
    (tmp_path / "empty").mkdir()
    server = serve(tmp_path / "empty")
    only_error(lambda: open_shards(server.url, cache=cache), "lists no shards", "pattern")
    only_error(lambda: open_shards(f"{server.url}/none", cache=cache), "/none does not exist")
    only_error(lambda: open_shards("memory://nowhere", cache=cache), "memory://nowhere does not exist")
    server.close()
    only_error(lambda: open_shards(server.url, cache=cache), "after 6 attempts", "refused")
    only_error(lambda: open_shards("http://host:x/data", cache=cache), "cannot be read")


@pytest.mark.parametrize("location, words", [
    ("nosuch://host/data", "Protocol not known"),
    ("https://host/x-{0..3.tar", "a brace too many or too few"),
    ("https://host/x-{0..3}.zip", "must end in .tar"),
    ("https://host/{a,b}/x.tar", "the same file name more than once"),
    *[(f"{scheme}://bucket/data", f"pip install {package}") for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs"))
      if not importlib.util.find_spec(package)],
])
def test_locations_that_make_no_sense_or_need_a_package(location, words, cache):
    only_error(lambda: open_shards(location, cache=cache), words)


def test_a_bad_tar_is_named_by_its_url_and_fetched_again_once_it_is_mended(bare, serve, cache):
    data = (bare / "demo-000003.tar").read_bytes()
    (bare / "demo-000003.tar").write_bytes(data[:3000])
    server = serve(bare)
    text = only_error(lambda: open_shards(server.url, cache=cache), f"{server.url}/demo-000003.tar")
    assert "cut off" in text or "not a whole" in text
    (bare / "demo-000003.tar").write_bytes(data)
    assert len(open_shards(server.url, cache=cache)) == 23
    assert server.fetched() == sorted([*TARS, "demo-000003.tar"])


# Patience, ranges, lists, secrets ---


def test_patience_outlasts_a_server_that_is_away_for_a_while(shards, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(transports, "LONGEST", 0.01)
    server = serve(shards)
    server.failures = {"demo-000000.tar": [503] * 25}
    index = open_shards(server.url, cache=ShardCache(tmp_path / "cache", patience=60.0))
    assert index.read(0) == next(samples(1)).image_bytes and server.fetched() == ["demo-000000.tar"] * 26


def test_a_server_that_says_when_to_come_back_is_heeded(shards, serve, tmp_path):
    server = serve(shards)
    server.failures = {"demo-000000.tar": ["busy"]}
    started = time.monotonic()
    open_shards(server.url, cache=ShardCache(tmp_path / "cache", patience=60.0)).read(0)
    assert time.monotonic() - started >= 1.0


def test_what_may_pass_is_restartable_and_data_patience_is_a_setting(shards, serve, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(transports, "LONGEST", 0.01)
    server = serve(shards)
    server.failures = {"index.json": [503] * 10_000}
    arguments = ["train", "demo_tokenizer", "--out", str(tmp_path / "run"), f"data.train={server.url}",
                 f"data.validation={server.url}", f"data.cache={tmp_path / 'cache'}"]
    assert main([*arguments, "data.patience=0.01"]) == 1
    assert "after" in capsys.readouterr().err and len(server.requests) > 6
    assert main([*arguments, "data.patience=-1"]) == 2


@pytest.mark.parametrize("ranges, changes, start", [(True, False, "half"), (False, False, 0), (True, True, 0)])
def test_an_interrupted_tar_goes_on_where_it_was(ranges, changes, start, shards, serve, cache, monkeypatch):
    server = serve(shards)
    server.ranges, server.failures = ranges, {"demo-000000.tar": ["cut"]}
    size = (shards / "demo-000000.tar").stat().st_size
    if changes:
        monkeypatch.setattr(transports.time, "sleep", lambda _: os.utime(shards / "demo-000000.tar", (1e9, 1e9)))
    index = open_shards(server.url, cache=cache)
    assert index.read(0) == next(samples(1)).image_bytes
    assert server.starts == [0, size // 2 if start == "half" else start]


def test_lists_of_patterns_are_read_one_after_the_other(shards, bare, serve, cache):
    url = serve(bare).url
    index = open_shards(f"{url}/demo-00000{{3..4}}.tar::{url}/demo-000000.tar", cache=cache)
    assert [shard.name for shard in index.shards] == ["demo-000003.tar", "demo-000004.tar", "demo-000000.tar"]
    index = open_shards(f"pipe:cat {bare}/demo-00000{{3..4}}.tar::pipe:cat {bare}/demo-000000.tar", cache=cache)
    assert len(index) == 13


@pytest.mark.parametrize("pattern", ["x-{0..9999}{0..9999}.tar", "{0..9999}.tar::https://host/{0..999999}.tar",
                                     "x-{0..99999999999}.tar", "{a,b{0..999}}{0..9999}.tar"])
def test_expansions_are_bounded_before_they_are_made(pattern, cache):
    only_error(lambda: open_shards(f"https://host/{pattern}", cache=cache), "names; at most 1,000,000")
    assert len(expanded("https://host/x-{0..9999}.tar::https://host/y-{0..9999}.tar")) == 20_000


def test_the_record_of_a_command_holds_no_secrets(tmp_path):
    write_environment(tmp_path,
                      command=["gigatok-ds", "train", "data.train=https://geheim:geheim@host/x?sig=geheim&b=geheim"])
    assert "geheim" not in (tmp_path / "environment.json").read_text()


def test_secrets_are_in_no_message_nor_log(shards, serve, cache, caplog, capsys):
    server = serve(shards)
    host = server.url.partition("//")[2]
    server.failures = {"demo-000000.tar": [503, 503, 403], "demo-000001.tar": [500] * 9}
    index = open_shards(f"{server.url}?X-Amz-Signature=geheim", cache=cache)
    text = only_error(lambda: index.read(0), "may not be read") + only_error(lambda: index.read(5), "after 6 attempts")
    text += only_error(lambda: open_shards(f"http://geheim:geheim@{host}/none-{{0..1}}.zip", cache=cache),
                       "must end in .tar")
    text += only_error(lambda: open_shards("pipe:false -H 'Authorization: Bearer geheim'", cache=cache), "attempts")
    assert main(["check-shards", f"{server.url}/none?X-Amz-Signature=geheim", "--workers", "0"]) == 2
    printed = capsys.readouterr()
    assert "attempt 1 failed" in caplog.text
    assert "geheim" not in text + caplog.text + printed.out + printed.err + index.location + index.tars.advice


# Commands ---


def test_a_command(bare, cache):
    index = open_shards(f"pipe:cat {bare}/{PATTERN}", cache=cache)
    assert [index.read(i) for i in range(23)] == [sample.image_bytes for sample in samples(23)]
    quoted = open_shards(f"pipe:sh -c 'cat \"{bare}\"/demo-00000$((2 - 1)).tar'", cache=cache)
    assert quoted.key(0) == "s0005"
    shutil.rmtree(bare)
    again = open_shards(f"pipe:cat {bare}/{PATTERN}", cache=cache)
    assert [again.read(i) for i in range(23)] == [sample.image_bytes for sample in samples(23)]


@pytest.mark.parametrize("command, words", [
    ("sh -c 'cat FILE; exit 3'", "exit code 3"), ("sh -c 'head -c 3000 FILE; kill -9 $$'", "exit code 137"),
    ("sh -c 'head -c 3000 FILE'", "pipe:sh -c"), ("cat none", "exit code 1"), ("no-such-program FILE", "cannot be run"),
    ("true", "pipe:true"),
])
def test_a_command_that_fails_or_delivers_half(command, words, bare, cache):
    command = command.replace("FILE", str(bare / TARS[0]))
    only_error(lambda: open_shards(f"pipe:{command}", cache=cache), words)
    assert copies(cache) == []


def test_a_command_that_fails_twice_is_tried_again(bare, cache, tmp_path):
    script = f"echo >> {tmp_path}/tries; [ $(wc -l < {tmp_path}/tries) -gt 2 ] && cat {bare}/{TARS[0]}"
    assert len(open_shards(f"pipe:{script}", cache=cache)) == 5
    assert (tmp_path / "tries").read_text() == "\n" * 3


# Shards that change ---


def with_other_bytes(path):
    """The tar with an image changed, of the same size."""
    data = bytearray(path.read_bytes())
    data[1200] ^= 1
    path.write_bytes(data)


def test_a_shard_that_is_not_what_was_indexed_is_refused(shards, serve, cache):
    server = serve(shards)
    index = open_shards(server.url, cache=cache)
    index.read(5)
    with_other_bytes(shards / "demo-000000.tar")
    (shards / "demo-000002.tar").write_bytes(b"short")
    only_error(lambda: index.read(0), "/demo-000000.tar has changed since it was indexed", "SHA-256")
    only_error(lambda: index.read(11), "/demo-000002.tar has changed since it was indexed: 5 bytes")
    assert copies(cache) == ["demo-000001.tar"] and len(server.fetched()) == 3


def test_a_copy_that_was_damaged_here_is_refused(shards, serve, cache):
    index = open_shards(serve(shards).url, cache=cache)
    index.read(0)
    copy, = cache.root.glob("*/*.tar")
    data = copy.read_bytes()
    copy.write_bytes(data[:-512])
    fresh = pickle.loads(pickle.dumps(index))  # which opens tars anew
    only_error(lambda: fresh.read(0), "demo-000000.tar has changed", f"remove {copy.parent}")
    copy.write_bytes(data.replace(index.read(1), bytes(len(index.read(1)))))
    only_error(lambda: index.read(1), "'s0001' in http", "is damaged or has changed", f"remove {copy.parent}")


@pytest.mark.parametrize("path, change, words", [
    ("", lambda folder: (folder / TARS[1]).write_bytes(bytes(10)), "000001.tar has 10 bytes, not 30720"),
    ("/" + PATTERN, lambda folder: (folder / TARS[1]).write_bytes(bytes(10)), "000001.tar has 10 bytes, not 30720"),
    ("", lambda folder: (folder / TARS[3]).unlink(), "demo-000003.tar is no longer there"),
    ("/" + PATTERN, lambda folder: (folder / TARS[3]).unlink(), "demo-000003.tar does not exist"),
    ("", lambda folder: shutil.copy(folder / TARS[0], folder / "new.tar"), "new.tar is new"),
])
def test_an_index_in_the_cache_is_not_used_for_other_shards(path, change, words, bare, serve, cache):
    location = serve(bare).url + path
    open_shards(location, cache=cache)
    change(bare)
    only_error(lambda: open_shards(location, cache=cache), words)


def test_removing_the_copies_indexes_changed_shards_anew(bare, serve, cache):
    location = serve(bare).url
    open_shards(location, cache=cache)
    (bare / TARS[4]).unlink()
    text = only_error(lambda: open_shards(location, cache=cache), "have changed since they were indexed")
    shutil.rmtree(text.partition("remove ")[2].partition(" to fetch")[0])
    assert len(open_shards(location, cache=cache)) == 20


def test_a_new_remote_index_is_taken_over_and_what_it_changes_fetched_again(shards, serve, cache, caplog, tmp_path):
    server = serve(shards)
    old = open_shards(server.url, cache=cache)
    assert_same(old, ShardIndex.open(shards))
    other = write(tmp_path / "other", count=18).directory  # all but the last tars are the same
    shutil.copy(other / "demo-000003.tar", shards)
    (shards / "demo-000004.tar").unlink()
    for name in ("index.json", "index.npz"):
        shutil.copy(other / name, shards)
    server.requests.clear()
    assert_same(open_shards(server.url, cache=cache), ShardIndex.open(other))
    assert "has been indexed anew" in caplog.text and server.fetched() == ["demo-000003.tar"]
    assert copies(cache) == TARS[:4]


def test_a_damaged_remote_index_is_refused_and_leaves_the_earlier_one(shards, serve, cache):
    server = serve(shards)
    open_shards(server.url, cache=cache)
    description = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps(description | {"count": 22}))
    only_error(lambda: open_shards(server.url, cache=cache), f"the index of {server.url} is damaged", "disagree")
    server.close()
    assert len(open_shards(server.url, cache=cache)) == 23


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", ".."])
def test_an_index_cannot_lead_out_of_the_cache(name, shards, serve, cache):
    description = json.loads((shards / "index.json").read_text())
    description["shards"][0]["name"] = name
    (shards / "index.json").write_text(json.dumps(description))
    only_error(lambda: open_shards(serve(shards).url, cache=cache), "leads outside")


# Many processes, little room ---


def read_in_workers(index):
    batches = ImageBatches(index, training_transform(16, (0.8, 1.0), True),
                           ReadingPlan(global_batch_size=8, micro_batch_size=8), seed=3, workers=2)
    stream = iter(batches)
    return [next(stream) for _ in range(4)]


def test_a_bounded_cache_stays_within_its_bounds_and_reads_the_same(shards, serve, tmp_path, caplog):
    size = (shards / TARS[0]).stat().st_size
    cache = ShardCache(tmp_path / "cache", limit=int(2.5 * size))
    server = serve(shards)
    most, done = [], threading.Event()

    def watch():
        while not done.is_set():
            with contextlib.suppress(FileNotFoundError):
                most.append(sum(path.stat().st_size for path in cache.root.glob("*/*.tar")))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    index = open_shards(server.url, cache=cache)
    assert "do not fit into data.cache_gb" in caplog.text
    watcher.start()
    try:
        read = read_in_workers(index)
    finally:
        done.set()
        watcher.join()
    for batch, reference in zip(read, read_in_workers(ShardIndex.open(shards)), strict=True):
        assert all(torch.equal(batch[name], reference[name]) for name in reference)
    assert len(server.fetched()) > 5 and 0 < len(copies(cache)) <= 2
    # While a tar is being added by each of two workers, the one to go is still there. Of two sums the smaller counts:
    # the files of one are not looked at in the same moment.
    assert max(map(min, itertools.pairwise(most))) <= cache.limit + 2 * size


def test_the_least_recently_used_tar_goes_and_open_ones_stay_readable(shards, serve, tmp_path):
    size = max((shards / name).stat().st_size for name in TARS)
    server = serve(shards)
    index = open_shards(server.url, cache=ShardCache(tmp_path / "cache", limit=2 * size))
    fresh = pickle.loads(pickle.dumps(index))  # which opens tars anew
    index.read(0), index.read(5)
    time.sleep(0.02)
    fresh.read(1)  # the first tar again
    index.read(10)
    assert copies(index.tars.cache) == ["demo-000000.tar", "demo-000002.tar"]
    server.close()
    assert fresh.read(0) == next(samples(1)).image_bytes
    assert index.read(6) == list(samples(7))[6].image_bytes  # removed, and still open
    only_error(lambda: fresh.read(6), "demo-000001.tar cannot be read")


def test_tars_of_the_user_beside_the_copies_are_left_alone(shards, serve, tmp_path):
    size = (shards / TARS[0]).stat().st_size
    mine = tmp_path / "cache" / "imagenet" / "mine.tar"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(bytes(10 * size))
    os.utime(mine, (0, 0))
    index = open_shards(serve(shards).url, cache=ShardCache(tmp_path / "cache", limit=int(1.5 * size)))
    for i in range(len(index)):
        index.read(i)
    assert mine.stat().st_size == 10 * size and sorted(mine.parent.iterdir()) == [mine]
    assert len(list((tmp_path / "cache").glob("*-*/*.tar"))) == 1


def test_ranks_of_a_job_rely_on_one_of_them(bare, serve, cache, monkeypatch):
    server = serve(bare)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1234"}.items():
        monkeypatch.setenv(name, value)
    for port, asks in (("1234", True), ("1234", False), ("1235", True), ("1235", False)):
        monkeypatch.setenv("MASTER_PORT", port)
        before = len(server.requests)
        assert len(open_shards(server.url, cache=cache)) == 23
        assert (len(server.requests) > before) == asks
    monkeypatch.delenv("RANK")
    before = len(server.requests)
    open_shards(server.url, cache=cache)
    assert len(server.requests) > before  # a process by itself always looks


def test_removed_tars_do_not_stay_open(shards, serve, tmp_path):
    index = open_shards(serve(shards).url, cache=ShardCache(tmp_path / "cache", limit=65_000))
    for i in range(0, 23, 5):
        index.read(i)
        removed = [file for file in index._files.values() if not os.fstat(file.fileno()).st_nlink]
        assert len(removed) == (i >= 10)  # the one that has just made room


def test_room_for_less_than_one_shard_is_refused(shards, serve, tmp_path):
    only_error(lambda: open_shards(serve(shards).url, cache=ShardCache(tmp_path / "cache", limit=1000)),
               "data.cache_gb is 1e-06", "a single shard")


def test_a_tar_in_use_is_not_removed(shards, serve, tmp_path):
    index = open_shards(serve(shards).url, cache=ShardCache(tmp_path / "cache", limit=40_000))
    with index.tars.held(TARS[0], index.shards[0]) as path:
        index.read(6), index.read(11)
        assert path.exists()
    index.read(16)
    assert copies(index.tars.cache) == [TARS[3]]


def _open_and_read(location, cache, barrier, queue):
    barrier.wait()
    index = open_shards(location, cache=cache)
    queue.put([index.read(i) for i in range(23)])


@pytest.mark.parametrize("indexed", [True, False])
def test_processes_that_open_a_location_at_once_fetch_each_tar_once(indexed, shards, bare, serve, cache):
    server = serve(shards if indexed else bare)
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(4)
    processes = [context.Process(target=_open_and_read, args=(server.url, cache, barrier, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [[sample.image_bytes for sample in samples(23)]] * 4
    for process in processes:
        process.join()
    assert server.fetched() == TARS


def test_killed_in_the_middle_of_a_download_it_leaves_no_wrong_file(shards, serve, cache):
    server = serve(shards)
    index = open_shards(server.url, cache=cache)
    server.failures = {TARS[0]: ["slow"]}
    process = multiprocessing.get_context("fork").Process(target=index.read, args=(0,))
    process.start()
    deadline = time.monotonic() + 30
    while ("GET", TARS[0]) not in server.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert copies(cache) == [] and len(list(cache.root.glob(f"*/.{TARS[0]}.*"))) == 1
    assert index.read(0) == next(samples(1)).image_bytes
    assert copies(cache) == TARS[:1] and not list(cache.root.glob(f"*/.{TARS[0]}.*"))


# Who opens locations ---


def test_code_shards(tmp_path, serve, cache):
    rng = np.random.default_rng(0)
    items = [CodeSample(key=f"c{i:03d}", codes=rng.integers(0, 64, (2, 8)), label=i % 3) for i in range(23)]
    write_code_shards(items, tmp_path / "codes", codebook_size=64, latent_tokens=8, provenance={}, samples_per_shard=10)
    server = serve(tmp_path / "codes")
    for alive in (True, False):
        if not alive:
            server.close()
        data = CodeDataset.open(server.url, cache)
        assert (data.codes == np.stack([item.codes for item in items])).all() and data.metadata["count"] == 23
    (tmp_path / "codes" / "metadata.json").rename(tmp_path / "codes" / "metadata.partial.json")
    only_error(lambda: CodeDataset.open(serve(tmp_path / "codes").url, cache), "are incomplete")
    only_error(lambda: CodeDataset.open(f"{serve(tmp_path / 'codes').url}/codes-{{000000..000002}}.tar", cache),
               "not a directory of code shards")


@pytest.mark.parametrize("workers", [0, 1])
def test_check_shards_reads_the_copies_and_names_problems(workers, shards, serve):
    server = serve(shards)
    report = check_shards(server.url, workers=workers)
    assert report.samples == 23 and report.problems == [] and server.fetched() == TARS
    with_other_bytes(shards / "demo-000001.tar")
    problem, = check_shards(serve(shards).url, workers=workers).problems
    assert "demo-000001.tar has changed since it was indexed" in problem


def test_extraction_writes_the_same_bytes_from_a_url(shards, serve, tmp_path):
    tokenizer = small_tokenizer()
    for place, out in ((shards, "local"), (f"{serve(tmp_path).url}/shards", "remote")):
        extract_codes(tokenizer, place, tmp_path / out, views=views_of("flip", 16), provenance={},
                      extraction=Extraction(workers=1))
    assert tree(tmp_path / "local") == tree(tmp_path / "remote")


def first_batch(recipe):
    return next(iter(open_source(recipe, ALONE, 4).micro_batches(0)))


def test_both_kinds_of_code_sources_read_urls(serve, tmp_path):
    prepare(tmp_path)
    tokenizer = small_tokenizer()
    save_standalone(tmp_path / "tokenizer", tokenizer.config, tokenizer.state_dict())
    for train, more in (("images", [f"data.tokenizer={tmp_path / 'tokenizer'}"]), ("codes", [])):
        place = [f"data.validation={tmp_path}/test_{train}", *more]
        local = load_recipe(tmp_path / "gpt.yaml", [f"data.train={tmp_path / train}", *place])
        server = serve(tmp_path / train)
        remote = load_recipe(tmp_path / "gpt.yaml", [f"data.train={server.url}", *place])
        assert check_run(remote, tmp_path / "run") is None
        expected, found = first_batch(local), first_batch(remote)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert ("GET", "index.json") in server.requests


def test_a_run_refuses_remote_data_that_is_not_there(shards, serve, tmp_path):
    url = serve(shards).url
    recipe = load_recipe("demo_tokenizer", [f"data.train={url}/none", f"data.validation={url}",
                                            f"data.cache={tmp_path / 'cache'}"])
    only_error(lambda: check_run(recipe, tmp_path / "run"), f"{url}/none does not exist")
    mended = load_recipe("demo_tokenizer", [f"data.train={url}", f"data.validation={url}",
                                            f"data.cache={tmp_path / 'other'}"])
    assert check_run(mended, tmp_path / "run") is None
    assert differing_keys(mended, recipe) == ["data.train"]
    assert not (tmp_path / "home").exists() and (tmp_path / "other").is_dir()


@pytest.mark.parametrize("recipe", ["VQ_SS256", "GPT-B"])
@pytest.mark.parametrize("overrides, words", [
    (["data.cache=/scratch", "data.train=a", "data.validation=b"], "data.cache is /scratch, but it does nothing"),
    (["data.cache_gb=5", "data.train=a", "data.validation=b"], "data.cache_gb is 5.0, but it does nothing"),
    (["data.cache_gb=0", "data.train=s3://a/b"], "data.cache_gb is 0.0; it must be above 0"),
])
def test_cache_settings_that_do_nothing_are_refused(recipe, overrides, words):
    only_error(lambda: load_recipe(recipe, overrides), words)
    data = load_recipe(recipe, ["data.cache=/c", "data.cache_gb=2", "data.train=s3://a/b", "data.validation=c"]).data
    assert ShardCache.of(data.cache, data.cache_gb, data.patience).limit == 2_000_000_000


def test_short_names_hold_no_secrets(shards):
    assert short_name("https://host/data/train-{0..3}.tar?token=secret") == "train-{0..3}.tar"
    assert short_name("s3://bucket/train/") == "train" and short_name(shards) == "shards"
