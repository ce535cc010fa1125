"""Folders, shards, their index, and the command that makes them."""

import argparse
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import webdataset
from small_shards import CLASSES, encoded, incomplete_tars, make_images, plain_tar, samples, tree, without_end, write

from gigatok_ds.cli.data import make_shards
from gigatok_ds.data.folder import scan_image_folder
from gigatok_ds.errors import InputError
from gigatok_ds.packing.shard_writer import Sample, write_shards
from gigatok_ds.shards import contents
from gigatok_ds.shards import index as index_module
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.tar_scan import is_safe_key, safe_key, scan_tar

# Folders ---


def test_scan_takes_classes_by_name_and_images_at_any_depth(tmp_path):
    images = ["b/2.JPEG", "b/deep/1.webp", "b/10.png", "a/x.bmp"]
    ignored = ["a/notes.txt", "a/._x.jpg", ".cache/y.jpg", "a/jpg", "a/.hidden/z.jpg"]
    root = make_images(tmp_path / "data", dict.fromkeys(images + ignored, b""))
    folder = scan_image_folder(root)
    assert folder.classes == ["a", "b"] and folder.labels == [0, 1, 1, 1]
    found = [str(path.relative_to(root)) for path in folder.paths]
    assert found == ["a/x.bmp", "b/10.png", "b/2.JPEG", "b/deep/1.webp"]


def test_a_flat_directory_is_one_class(tmp_path):
    folder = scan_image_folder(make_images(tmp_path / "holiday", {"2.jpg": b"", "1.png": b""}))
    assert folder.classes == ["holiday"] and folder.labels == [0, 0]
    assert [path.name for path in folder.paths] == ["1.png", "2.jpg"]


@pytest.mark.parametrize("layout, message", [
    ({"a/notes.txt": b""}, "no images.*jpg, jpeg, png, webp, bmp"),
    ({"notes.txt": b""}, "no images"),
    ({"a/1.jpg": b"", "b/notes.txt": b""}, "class directory .*b holds no images"),
    ({"a/1.jpg": b"", "2.jpg": b""}, "both images"),
])
def test_scan_refuses(tmp_path, layout, message):
    with pytest.raises(InputError, match=message):
        scan_image_folder(make_images(tmp_path / "data", layout))


def test_scan_refuses_a_missing_directory(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        scan_image_folder(tmp_path / "nowhere")


# Writing ---


def test_what_is_written_is_read_back(tmp_path):
    written = write(tmp_path / "out")
    assert [(shard.name, shard.samples) for shard in written.shards] == [
        ("demo-000000.tar", 5), ("demo-000001.tar", 5), ("demo-000002.tar", 5), ("demo-000003.tar", 5),
        ("demo-000004.tar", 3)]
    index = ShardIndex.open(written.directory)
    assert len(index) == written.count == 23 and index.classes == CLASSES
    for i, sample in enumerate(samples(23)):
        assert (index.key(i), index.label(i), index.read(i)) == (sample.key, sample.label, sample.image_bytes)
    for shard in written.shards:
        data = (written.directory / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.size, shard.sha256)


def test_webdataset_reads_the_shards(shards):
    urls = [str(shards / f"demo-{number:06d}.tar") for number in range(5)]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [(item["__key__"], int(item["cls"]), item.get("jpg", item.get("png"))) for item in read] == [
        (sample.key, sample.label, sample.image_bytes) for sample in samples(23)]


def test_the_same_samples_give_the_same_bytes(tmp_path):
    first, second = tree(write(tmp_path / "a").directory), tree(write(tmp_path / "b").directory)
    assert first == second and len(first) == 5 + 2
    with tarfile.open(tmp_path / "a/demo-000000.tar") as tar:
        stamps = {(m.mtime, m.mode, m.uid, m.gid, m.uname, m.gname) for m in tar}
    assert stamps == {(0, 0o444, 0, 0, "gigatok", "gigatok")}


@pytest.mark.parametrize("change, message", [
    ({"image_bytes": without_end(encoded(3))}, "photo 3"),
    ({"image_bytes": without_end(encoded(3, "PNG")), "extension": "png"}, "photo 3"),
    ({"image_bytes": b"text"}, "photo 3"),
    ({"image_bytes": b""}, "photo 3"),
    ({"label": 3}, "photo 3: label 3 has no class; there are 3"),
    ({"label": -1}, "photo 3: label -1"),
    ({"extension": "gif"}, "'gif'"),
    ({"key": "s0001"}, "'s0001' occurs twice"),
    ({"key": "../s"}, r"'\.\./s'"), ({"key": "a/b"}, "'a/b'"), ({"key": "a.b"}, "'a.b'"), ({"key": ""}, "''"),
    ({"key": "k" * 91}, "at most 90 bytes"),
])
def test_a_bad_sample_leaves_nothing_behind(tmp_path, change, message):
    def with_bad_one():
        for i, sample in enumerate(samples(9)):
            yield sample if i != 7 else Sample(**{**vars(sample), "source": "photo 3"} | change)

    with pytest.raises(InputError, match=message):
        write_shards(with_bad_one(), tmp_path / "out", prefix="demo", samples_per_shard=3, classes=CLASSES)
    assert list(tmp_path.iterdir()) == []


def test_the_longest_key_fits(tmp_path):
    sample = Sample(key="k" * 90, image_bytes=encoded(0), extension="jpg", label=0)
    write_shards([sample], tmp_path / "out", prefix="demo", classes=CLASSES)
    assert ShardIndex.open(tmp_path / "out").key(0) == "k" * 90


def test_nothing_to_write_and_bad_settings_are_refused(tmp_path):
    for arguments, message in (({"samples": []}, "no samples"), ({"prefix": "../x"}, "prefix"),
                               ({"samples_per_shard": 0}, "at least 1")):
        arguments = {"samples": samples(2), "prefix": "demo", "classes": CLASSES} | arguments
        with pytest.raises(InputError, match=message):
            write_shards(arguments.pop("samples"), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_output_directory_in_use_is_left_untouched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/thesis.txt").read_text() == "mine"


def test_an_empty_output_directory_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    write(tmp_path / "some/where/out")
    assert tree(tmp_path / "out") == tree(tmp_path / "some/where/out")


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    def interrupted():
        yield from samples(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), tmp_path / "out", prefix="demo", samples_per_shard=2, classes=CLASSES)
    assert list(tmp_path.iterdir()) == []


# The index ---


def test_plain_tars_are_indexed_once(tmp_path, monkeypatch):
    members = [("./a.0.jpg", b"has the extension 0.jpg"), ("./a.PNG", encoded(0, "PNG")),
               ("./a.cls", b" 2\n"), ("sub/b.json", b"{}"), ("sub/b.cls", b"0"), ("sub/b.jpeg", encoded(1)),
               ("._a.jpg", b"resource fork")]
    folder = tarfile.TarInfo("sub/")
    folder.type = tarfile.DIRTYPE
    directory = plain_tar(tmp_path / "in/x.tar", [(folder, b""), *members])
    plain_tar(tmp_path / "in/y.tar", [("long" * 40 + ".jpg", encoded(2)), ("long" * 40 + ".cls", b"1")])
    index = ShardIndex.open(directory)
    assert [index.key(i) for i in range(3)] == ["a", "sub/b", "long" * 40]
    assert index.labels.tolist() == [2, 0, 1] and index.classes == []
    assert [index.read(i) for i in range(3)] == [encoded(0, "PNG"), encoded(1), encoded(2)]
    monkeypatch.setattr(index_module, "scan_tar", None)
    again = ShardIndex.open(directory)
    assert again.labels.tolist() == [2, 0, 1] and again.read(1) == encoded(1)
    assert sorted(path.name for path in directory.iterdir()) == ["index.json", "index.npz", "x.tar", "y.tar"]


def test_scanning_finds_what_writing_indexed(tmp_path, shards):
    other = tmp_path / "bare"
    other.mkdir()
    for tar in shards.glob("*.tar"):
        shutil.copy(tar, other)
    written, scanned = ShardIndex.open(shards), ShardIndex.open(other)
    assert written.shards == scanned.shards and written.labels.tolist() == scanned.labels.tolist()
    assert (other / "index.npz").read_bytes() == (shards / "index.npz").read_bytes()


def test_a_directory_that_cannot_be_written_is_indexed_in_memory(tmp_path, monkeypatch, caplog):
    directory = plain_tar(tmp_path / "in/x.tar", [("a.jpg", encoded(0)), ("a.cls", b"0")])

    def refuse(*_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(contents, "written_aside", refuse)
    assert ShardIndex.open(directory).read(0) == encoded(0)
    assert "in memory only" in caplog.text
    assert [path.name for path in directory.iterdir()] == ["x.tar"]


def link(name, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


IMAGE = encoded(0)
THREE_SAMPLES = [(f"{key}.{kind}", data) for key in "abc" for kind, data in (("cls", b"0"), ("jpg", IMAGE))]


@pytest.mark.parametrize("members, message", [
    ([("../a.jpg", IMAGE), ("../a.cls", b"0")], r"'\.\./a.jpg' leads outside"),
    ([("/a.jpg", IMAGE), ("/a.cls", b"0")], "'/a.jpg' leads outside"),
    ([("x/../../a.jpg", IMAGE)], "leads outside"),
    ([("x/..", b"")], "leads outside"),
    ([(link("a.jpg", tarfile.SYMTYPE), b""), ("a.cls", b"0")], "links are not followed"),
    ([(link("a.jpg", tarfile.LNKTYPE), b""), ("a.cls", b"0")], "links are not followed"),
    ([("a.cls", b"1")], r"'a' has no data \(KEY.jpg or"),
    ([("a.jpg", IMAGE), ("a.cls", b"cat"), ("b.jpg", IMAGE), ("b.cls", b"1")], "label of sample 'a' is b'cat'"),
    ([("a.jpg", IMAGE), ("a.cls", b"")], "label of sample 'a'"),
    ([("a.jpg", IMAGE), ("a.cls", b"1.5")], "label of sample 'a'"),
    ([("a.jpg", IMAGE), ("a.cls", b"9" * 30)], "label of sample 'a'"),
    ([("a.jpg", IMAGE), ("a.png", IMAGE), ("a.cls", b"1")], "'a' occurs twice"),
    ([("x/a.jpg", IMAGE), ("./x/a.jpg", IMAGE)], "'x/a' occurs twice"),
    ([("a.jpg", b""), ("a.cls", b"1")], "'a' has no data: its file is empty"),
    ([("notes.txt", b"")], "no samples"),
])
def test_a_bad_tar_is_refused(tmp_path, members, message):
    directory = plain_tar(tmp_path / "in/x.tar", members)
    with pytest.raises(InputError, match=message) as caught:
        ShardIndex.open(directory)
    assert str(tmp_path / "in") in str(caught.value)
    assert [path.name for path in directory.iterdir()] == ["x.tar"]


def test_a_key_in_two_shards_is_refused(tmp_path):
    for name in "xy":
        directory = plain_tar(tmp_path / f"in/{name}.tar", [("a.jpg", IMAGE), ("a.cls", b"0")])
    with pytest.raises(InputError, match=r"'a' occurs in both x.tar and y.tar"):
        ShardIndex.open(directory)


def test_a_tar_cut_off_anywhere_is_refused(tmp_path):
    path = tmp_path / "in/x.tar"
    plain_tar(path, THREE_SAMPLES)
    data, found = path.read_bytes(), len(scan_tar(path))
    assert found == 3
    end = data.rstrip(b"\0")
    lengths = {*range(0, len(end), 173), *range(0, len(end) // 512 * 512 + 512, 512)}
    for length in lengths:
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"x.tar"):
            scan_tar(path)


def test_a_damaged_header_is_refused(tmp_path):
    path = tmp_path / "in/x.tar"
    plain_tar(path, THREE_SAMPLES)
    data = path.read_bytes()
    for entry in scan_tar(path):
        path.write_bytes(data[: entry.offset - 400] + b"?" + data[entry.offset - 399 :])
        with pytest.raises(InputError, match=r"x.tar"):
            scan_tar(path)


def test_a_compressed_tar_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(InputError, match="not a whole uncompressed tar"):
        ShardIndex.open(tmp_path)


def test_directories_without_shards_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no shards: looked for uncompressed \*\.tar"):
        ShardIndex.open(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        ShardIndex.open(tmp_path / "nowhere")


def test_a_changed_missing_or_added_shard_is_named(shards):
    tar = shards / "demo-000002.tar"
    data = tar.read_bytes()
    tar.write_bytes(data + bytes(512))
    with pytest.raises(InputError, match=r"demo-000002.tar has changed since it was indexed"):
        ShardIndex.open(shards)
    tar.unlink()
    with pytest.raises(InputError, match=r"demo-000002.tar is missing"):
        ShardIndex.open(shards)
    tar.write_bytes(data)
    (shards / "new.tar").write_bytes(data)
    with pytest.raises(InputError, match=r"new.tar is not in the index"):
        ShardIndex.open(shards)


def test_a_shard_changed_while_it_is_used_is_named(shards):
    index = ShardIndex.open(shards)
    index.read(0)
    flipped = shards / "demo-000000.tar"
    data = bytearray(flipped.read_bytes())
    data[index.place(1)[1] + 30] ^= 1
    flipped.write_bytes(data)
    with pytest.raises(InputError, match=r"'s0001' in .*demo-000000.tar is damaged or has changed"):
        index.read(1)
    (shards / "demo-000001.tar").write_bytes(b"short")
    with pytest.raises(InputError, match=r"demo-000001.tar has changed since it was indexed"):
        index.read(5)


def test_labels_are_checked_against_the_model(shards):
    index = ShardIndex.open(shards)
    index.check_labels(3)
    with pytest.raises(InputError, match=r"'s0002' has label 2; .*num_classes 2 allows 0 to 1 \(7 such"):
        index.check_labels(2)


def test_negative_labels_are_found(tmp_path):
    index = ShardIndex.open(plain_tar(tmp_path / "in/x.tar", [("a.jpg", IMAGE), ("a.cls", b"-2")]))
    with pytest.raises(InputError, match="'a' has label -2"):
        index.check_labels(1000)


def edit_json(shards, change):
    description = json.loads((shards / "index.json").read_text())
    change(description)
    (shards / "index.json").write_text(json.dumps(description))


def replace_table(shards, **columns):
    """Exchange columns of index.npz and make index.json agree, as an attacker would."""
    with np.load(shards / "index.npz") as arrays:
        columns = dict(arrays) | columns
    np.savez(shards / "index.npz", **columns)
    digest = hashlib.sha256((shards / "index.npz").read_bytes()).hexdigest()
    edit_json(shards, lambda description: description.update(table_sha256=digest))


@pytest.mark.parametrize("change", [
    lambda d: d.update(format="other/9"), lambda d: d.pop("shards"), lambda d: d["shards"].pop(),
    lambda d: d.update(count=22), lambda d: d["shards"][0].update(name="../demo-000000.tar"),
    lambda d: d["shards"][0].update(surprise=1), lambda d: d["shards"][0].update(size="big"),
])
def test_a_damaged_index_is_refused(shards, change):
    edit_json(shards, change)
    with pytest.raises(InputError, match=r"index of .* is damaged.*delete index.json") as caught:
        ShardIndex.open(shards)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, value", [
    ("offset", np.full(23, 10**9)), ("offset", np.full(23, -1)), ("shard", np.full(23, 5, np.int32)),
    ("shard", np.full(23, -1, np.int32)), ("size", np.full(23, -5)), ("label", np.zeros(22, np.int32)),
    ("label", np.zeros(23)), ("label", np.array([{}] * 23, dtype=object)),
])
def test_a_table_that_leads_astray_is_refused(shards, name, value):
    replace_table(shards, **{name: value})
    with pytest.raises(InputError, match=r"index of .* is damaged"):
        ShardIndex.open(shards)


def test_a_pickle_in_the_table_is_not_executed(shards, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    replace_table(shards, key=np.array([Malicious()] * 23, dtype=object))
    with pytest.raises(InputError, match=r"index of .* is damaged"):
        ShardIndex.open(shards)
    assert not (tmp_path / "executed").exists()


def test_a_table_of_another_directory_is_refused(shards, tmp_path):
    shutil.copy(write(tmp_path / "other", count=22).directory / "index.npz", shards / "index.npz")
    with pytest.raises(InputError, match="does not belong"):
        ShardIndex.open(shards)
    (shards / "index.npz").unlink()
    with pytest.raises(InputError, match=r"index of .* is damaged"):
        ShardIndex.open(shards)


def test_an_unsafe_key_in_the_table_is_not_handed_out(shards):
    replace_table(shards, key=np.array([b"../../escape", b"\xff"] + [f"é{i}".encode() for i in range(21)]))
    index = ShardIndex.open(shards)
    for i in range(2):
        with pytest.raises(InputError, match="not a safe name"):
            index.key(i)
    assert index.key(2) == "é0"


def test_safe_keys():
    for text in ("a b", "../x", "a/b.c", "é ü", "\0", "..", "\udcff", "a\\b"):
        assert is_safe_key(safe_key(text))
    assert safe_key("n01440764_10026") == "n01440764_10026"
    assert not is_safe_key("") and not is_safe_key("..") and not is_safe_key("a\n")


def test_few_files_stay_open(shards, monkeypatch):
    monkeypatch.setattr(index_module, "most_open", lambda: 2)
    index = ShardIndex.open(shards)
    for i in np.random.default_rng(0).permutation(23):
        index.read(int(i))
        assert len(index._files) <= 2
    assert all(not file.closed for file in index._files.values())


def _digest(index, order, queue):
    queue.put(hashlib.sha256(b"".join(index.read(i) for i in order)).hexdigest())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_index_may_be_used_by_other_processes(shards, method):
    index = ShardIndex.open(shards)
    order = list(range(23)) * 20
    expected = hashlib.sha256(b"".join(index.read(i) for i in order)).hexdigest()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=_digest, args=(index, order, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    here = hashlib.sha256(b"".join(index.read(i) for i in order)).hexdigest()
    assert [queue.get(timeout=60) for _ in workers] + [here] == [expected] * 3
    for worker in workers:
        worker.join()
    assert pickle.loads(pickle.dumps(index)).read(3) == index.read(3)


# The command ---


def run_command(*arguments):
    parser = argparse.ArgumentParser()
    make_shards.add_arguments(parser)
    return make_shards.run(parser.parse_args([str(argument) for argument in arguments]))


def test_make_shards(tmp_path, capsys):
    root = make_images(tmp_path / "data", {"cat/a b.v2.png": encoded(0, "PNG"), "cat/deep/a.jpeg": encoded(1),
                                           "ant/a.JPG": encoded(2)})
    assert run_command(root, "--out", tmp_path / "out", "--prefix", "pets", "--samples-per-shard", 2) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("wrote 3 images of 2 classes in 2 shards") and printed.count("\n") == 1
    index = ShardIndex.open(tmp_path / "out")
    assert [index.key(i) for i in range(3)] == ["00000000_a", "00000001_a_b_v2", "00000002_a"]
    assert index.classes == ["ant", "cat"] and index.labels.tolist() == [0, 1, 1]
    assert [index.read(i) for i in range(3)] == [encoded(2), encoded(0, "PNG"), encoded(1)]
    tars = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert tars == ["pets-000000.tar", "pets-000001.tar"]


def test_make_shards_names_the_bad_file(tmp_path):
    images = {"cat/good.png": encoded(0, "PNG"), "cat/bad.jpg": without_end(encoded(1))}
    root = make_images(tmp_path / "data", images)
    with pytest.raises(InputError, match=r"data/cat/bad.jpg: cannot decode"):
        run_command(root, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_samples_lack_is_tolerated_up_to_a_fraction(tmp_path, caplog):
    directory = incomplete_tars(tmp_path)
    with pytest.raises(InputError, match="sample 's0002' has no data"):
        ShardIndex.open(directory)
    with pytest.raises(InputError, match=r"'s0000' is b'cat'.*and 1 more problems"):
        ShardIndex.open(directory, max_bad_fraction=0.1)
    assert not (directory / "index.json").exists()
    for _ in range(2):  # indexed, then from its index
        caplog.clear()
        index = ShardIndex.open(directory, max_bad_fraction=0.3)
        assert "and 1 more problems" in caplog.text and "such samples are replaced" in caplog.text
        keys = [index.key(i) for i in range(len(index))]
        assert keys == [f"s{i:04d}" for i in (0, 1, 3, 4, 5, 6, 7, 8, 9, 2)] + ["t0005", "t0006"]
        assert index.labels[[0, 8]].tolist() == [-1, -1] and index.label(9) == 2
        assert index.read(9) == b"" and index.read(1) == list(samples(2))[1].image_bytes
    problems = json.loads((directory / "index.json").read_bytes())["problems"]
    assert [key for problem, key in zip(problems, ("'s0000'", "'s0002'"), strict=True) if key in problem] == [
        "'s0000'", "'s0002'"]
    with pytest.raises(InputError, match="'s0000' is b'cat'"):  # strict readers still refuse it
        ShardIndex.open(directory)


@pytest.mark.parametrize("tolerated", [0.0, 1.0])
def test_a_tar_that_has_lost_samples_is_never_tolerated(tmp_path, tolerated):
    directory = incomplete_tars(tmp_path)
    data = (directory / "b.tar").read_bytes()
    (directory / "b.tar").write_bytes(data[: data.index(b"t0006") + 600])
    (directory / "a.tar").unlink()
    with pytest.raises(InputError, match=r"b.tar"):
        ShardIndex.open(directory, max_bad_fraction=tolerated)


def test_an_index_whose_numbers_overflow_is_refused(shards):
    replace_table(shards, offset=np.full(23, 2**62), size=np.full(23, 2**63 - 1))
    with pytest.raises(InputError, match="beyond the end"):
        ShardIndex.open(shards)
