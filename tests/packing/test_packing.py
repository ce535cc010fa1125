"""Packing: the same shards whatever the number of processes and interruptions; what the settings do; checking them."""

import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image
from small_shards import encoded, make_images, tree

from gigatok_ds import InputError
from gigatok_ds.packing import pack_shards as packing_module
from gigatok_ds.packing.checking import check_shards
from gigatok_ds.packing.image_sources import open_source
from gigatok_ds.packing.pack_shards import Packing, pack
from gigatok_ds.shards.index import ShardIndex

COUNT, PER_SHARD = 23, 5
SETTINGS = Packing(prefix="x", samples_per_shard=PER_SHARD)


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images", {f"c{i % 3}/{i:02d}.jpg": encoded(i) for i in range(COUNT)})


@pytest.fixture
def shards(tmp_path, images):
    pack(open_source(images), tmp_path / "shards", SETTINGS, workers=0)
    return tmp_path / "shards"


def members(directory):
    found = {}
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def test_any_number_of_processes_writes_the_same_bytes(tmp_path, images, shards):
    written = pack(open_source(images), tmp_path / "parallel", SETTINGS, workers=2)
    assert tree(tmp_path / "parallel") == tree(shards) and written.count == COUNT
    assert sorted(tree(shards)) == ["index.json", "index.npz", "packing.json", *(f"x-00000{i}.tar" for i in range(5))]
    assert len(ShardIndex.open(shards)) == COUNT


@pytest.mark.parametrize("finished", range(6))
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, images, shards, monkeypatch, finished):
    """Interrupted while it writes a shard, or with all five written while it writes the index."""
    write_shard, write_index, written = packing_module._write_shard, packing_module.write_index, []

    def write_some(path, *arguments):
        if len(written) == finished:
            path.with_name(f".{path.name}").write_bytes(b"half a tar")
            raise KeyboardInterrupt
        write_shard(path, *arguments)
        written.append(path.name)

    def no_index(*arguments):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(packing_module, "_write_shard", write_some)
    monkeypatch.setattr(packing_module, "write_index", no_index)
    with pytest.raises(KeyboardInterrupt):
        pack(open_source(images), out, SETTINGS, workers=0)
    assert not out.exists()
    again = []
    monkeypatch.setattr(packing_module, "_write_shard", lambda path, *rest: (again.append(path.name),
                                                                             write_shard(path, *rest)))
    monkeypatch.setattr(packing_module, "write_index", write_index)
    pack(open_source(images), out, SETTINGS, workers=0)
    assert sorted(written + again) == [f"x-00000{i}.tar" for i in range(5)]
    assert tree(out) == tree(shards) and not (tmp_path / "out.partial").exists()


def children(pid):
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:  # it has ended by itself
        return []


def test_a_killed_command_goes_on_where_it_was(tmp_path, images, shards):
    command = [sys.executable, "-m", "gigatok_ds", "make-shards", str(images), "--out", str(tmp_path / "out"),
               "--prefix", "x", "--samples-per-shard", str(PER_SHARD), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("out.partial/*.note.json")) and process.poll() is None:
        time.sleep(0.01)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if (tmp_path / "out").exists() and process.returncode == 0:  # it was faster than the signal
        assert "not empty" in finished.stderr
    else:
        assert finished.returncode == 0, finished.stderr
    assert tree(tmp_path / "out") == tree(shards)


def test_other_settings_or_images_do_not_go_on(tmp_path, images, monkeypatch):
    def interrupted(path, *arguments):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(packing_module, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(open_source(images), out, SETTINGS, workers=0)
    with pytest.raises(InputError, match="was begun with another packing; repeat the first command"):
        pack(open_source(images), out, Packing(prefix="y"), workers=0)
    (images / "c0/00.jpg").unlink()
    with pytest.raises(InputError, match="another images and source_sha256"):
        pack(open_source(images), out, SETTINGS, workers=0)


def test_a_directory_in_use_is_left_alone(tmp_path, images):
    for name in ("out", "other.partial"):
        make_images(tmp_path / name, {"thesis.txt": b"mine"})
    with pytest.raises(InputError, match="exists and is not empty"):
        pack(open_source(images), tmp_path / "out", SETTINGS, workers=0)
    with pytest.raises(InputError, match="is not an interrupted run"):
        pack(open_source(images), tmp_path / "other", SETTINGS, workers=0)
    assert [path.name for path in (tmp_path / "other.partial").iterdir()] == ["thesis.txt"]


def test_only_larger_images_are_resized(tmp_path):
    layout = {"a/large.png": encoded(1, "PNG", (90, 60)), "a/small.png": encoded(2, "PNG", (40, 30))}
    root = make_images(tmp_path / "images", layout)
    pack(open_source(root), tmp_path / "out", Packing(resize=32, quality=90), workers=0)
    found = members(tmp_path / "out")
    assert found["00000001_small.png"] == layout["a/small.png"]
    image = Image.open(io.BytesIO(found["00000000_large.jpg"]))
    assert image.size == (48, 32) and image.format == "JPEG"


def test_a_shuffled_set_holds_the_same_samples_in_another_order(tmp_path, images, shards):
    for name, seed in (("one", 1), ("two", 2), ("again", 1)):
        pack(open_source(images), tmp_path / name, Packing(samples_per_shard=5, shuffle_seed=seed), workers=0)
    one, two, again, plain = (members(tmp_path / name) for name in ("one", "two", "again", "shards"))
    assert one == two == plain and list(one) == list(again)
    assert len({tuple(one), tuple(two), tuple(plain)}) == 3


def test_metadata_says_where_an_image_came_from(tmp_path, images):
    pack(open_source(images), tmp_path / "out", Packing(metadata=True), workers=0)
    assert json.loads(members(tmp_path / "out")["00000008_01.json"]) == {
        "class": "c1", "width": 40, "height": 34, "source": "c1/01.jpg"}


def test_the_extension_is_that_of_the_content(tmp_path):
    root = make_images(tmp_path / "images", {"a/1.JPEG": encoded(1, "PNG"), "a/2.png": encoded(2)})
    pack(open_source(root), tmp_path / "out", Packing(), workers=0)
    assert set(members(tmp_path / "out")) == {"00000000_1.png", "00000000_1.cls", "00000001_2.jpg", "00000001_2.cls"}


def test_bad_images_end_it_or_are_left_out_and_listed(tmp_path, images, capsys):
    for name in ("c0/00.jpg", "c2/02.jpg"):
        (images / name).write_bytes(encoded(1)[:-300])
    with pytest.raises(InputError, match=r"c0/00.jpg: cannot decode.*--skip-bad"):
        pack(open_source(images), tmp_path / "out", SETTINGS, workers=0)
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(InputError, match="cannot decode"):
        pack(open_source(images), tmp_path / "out", SETTINGS, workers=2)
    skipping = Packing(prefix="x", samples_per_shard=PER_SHARD, skip_bad=True)
    if (tmp_path / "out.partial").exists():
        with pytest.raises(InputError, match="another packing"):
            pack(open_source(images), tmp_path / "out", skipping, workers=0)
        shutil.rmtree(tmp_path / "out.partial")
    written = pack(open_source(images), tmp_path / "out", skipping, workers=0)
    assert written.count == COUNT - 2 == len(ShardIndex.open(tmp_path / "out"))
    listed = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [line.partition(": ")[0][-9:] for line in listed] == ["c0/00.jpg", "c2/02.jpg"]


def test_only_bad_images_are_an_error(tmp_path):
    root = make_images(tmp_path / "images", {"a/1.jpg": b"no image"})
    with pytest.raises(InputError, match="no image can be decoded"):
        pack(open_source(root), tmp_path / "out", Packing(skip_bad=True), workers=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{"prefix": "../x"}, {"samples_per_shard": 0}, {"resize": 0}, {"quality": 101}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InputError):
        Packing(**settings)


# Checking ---


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sound_set_has_no_problems_and_is_summarised(shards, workers):
    report = check_shards(shards, workers=workers)
    assert report.problems == [] and report.samples == COUNT and report.shards == 5
    assert report.per_class == {0: 8, 1: 8, 2: 7} and report.classes == ["c0", "c1", "c2"]
    assert report.short_sides == {34: COUNT} and report.formats == {"JPEG RGB": COUNT}
    lines = list(report.lines())
    assert lines[0].startswith("23 images of 3 classes in 5 shards, ")
    assert lines[1] == "46 members of tars: 23 labels of samples, 23 samples"
    assert lines[2] == "labels 0 to 2; 7 images (c2) to 8 (c0) in a class"
    assert lines[3] == "shorter side 34 to 34 pixels, median 34"


def test_a_flipped_byte_is_found_in_its_shard(shards):
    path = shards / "x-000002.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1  # in the first image
    path.write_bytes(data)
    problem, = check_shards(shards, decode=False).problems
    assert "x-000002.tar is not what was indexed" in problem


def test_an_image_that_training_could_not_decode_is_named(tmp_path):
    directory = tmp_path / "in"
    make_images(directory, {})
    directory.mkdir()
    with tarfile.open(directory / "x.tar", "w") as tar:
        for name, data in (("a.jpg", encoded(1)[:-300]), ("a.cls", b"0"), ("b.jpg", encoded(2)), ("b.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    problem, = check_shards(directory).problems
    assert "x.tar: sample 'a': cannot decode this image" in problem
    assert check_shards(directory, decode=False).problems == []


def test_the_command_says_what_it_found(shards, capsys):
    from gigatok_ds.cli.main import main

    assert main(["check-shards", str(shards), "--workers", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no problems"
    data = bytearray((shards / "x-000000.tar").read_bytes())
    data[1500] ^= 1
    (shards / "x-000000.tar").write_bytes(data)
    assert main(["check-shards", str(shards), "--workers", "0"]) == 1
    printed = capsys.readouterr().out
    assert "problem: " in printed and printed.splitlines()[-1] == "1 problems"
