"""What is read and what is left out add up to what is there, and a command says so: tars and directories of any kind.
"""

import io
import os
import tarfile

import pytest
from imagenet_files import tar_bytes
from small_shards import encoded, make_images, plain_tar

from gigatok_ds.cli.main import main
from gigatok_ds.errors import InputError
from gigatok_ds.packing.checking import check_shards
from gigatok_ds.packing.image_sources import open_source
from gigatok_ds.packing.pack_shards import Packing, pack
from gigatok_ds.shards.index import ShardIndex

IMAGE = encoded(0)


def refused(function, *words):
    with pytest.raises(InputError) as caught:
        function()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def samples_of(*keys):
    return [member for number, key in enumerate(keys) for member in ((f"{key}.jpg", encoded(number)),
                                                                    (f"{key}.cls", str(number).encode()))]


def keys(index):
    return [index.key(i) for i in range(len(index))]


def make_shards(source, out, *options):
    return main(["make-shards", str(source), "--out", str(out), "--workers", "0", *map(str, options)])


# Zeros, and tars behind tars ---


def unfinished(data, keep=0.6):
    """A file that was given its size first, and of which the last part never came."""
    kept = int(len(data) * keep) // 512 * 512
    return data[:kept] + bytes(len(data) - kept)


CLASS_TARS = {f"n0000000{number}.tar": tar_bytes({f"n0000000{number}_{i}.JPEG": encoded(i) for i in range(8)})
              for number in range(6)}


def cuts(data):
    """Behind each member of a tar, and in the middle of one."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in tar][:-1]
    return [end / len(data) for end in ends] + [0.3, 0.77]


def test_a_zero_filled_tail_is_refused_wherever_it_begins(tmp_path):
    outer = tar_bytes(CLASS_TARS)
    big = tar_bytes({f"ILSVRC2012_val_{i}.JPEG": encoded(i, "PNG", (120, 90)) for i in range(6)})
    (tmp_path / "labels.txt").write_text("".join(f"ILSVRC2012_val_{i}.JPEG {i}\n" for i in range(6)))
    for data, labels in ((outer, None), (big, tmp_path / "labels.txt")):
        for keep in cuts(data):
            (tmp_path / "x.tar").write_bytes(unfinished(data, keep))
            refused(lambda: open_source(tmp_path / "x.tar", labels), "x.tar")  # noqa: B023
    inner = {name: unfinished(data, 0.5) if name == "n00000003.tar" else data for name, data in CLASS_TARS.items()}
    (tmp_path / "x.tar").write_bytes(tar_bytes(inner))
    refused(lambda: open_source(tmp_path / "x.tar"), "n00000003.tar")


def test_a_zero_filled_shard_is_refused(tmp_path):
    directory = plain_tar(tmp_path / "in/x.tar", samples_of(*"abcdefghijklmnop"))
    full = (directory / "x.tar").read_bytes()
    for keep in (cut for cut in cuts(full) if (1 - cut) * len(full) > 12_000):  # a tar may end in as many zeros
        (directory / "x.tar").write_bytes(unfinished(full, keep))
        refused(lambda: ShardIndex.open(directory), "x.tar")
    (directory / "x.tar").write_bytes(full + b"x" * 100)
    refused(lambda: ShardIndex.open(directory), "not a whole uncompressed tar")
    (directory / "x.tar").write_bytes(full + b"anything but zeros" + bytes(10_222))
    refused(lambda: ShardIndex.open(directory), "x.tar")


def test_tars_behind_each_other_are_read_on(tmp_path):
    for name, group in (("a", "abc"), ("b", "de"), ("c", "f")):
        plain_tar(tmp_path / f"parts/{name}.tar", samples_of(*group))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.tar").write_bytes(b"".join((tmp_path / f"parts/{name}.tar").read_bytes() for name in "abc"))
    index = ShardIndex.open(tmp_path / "in")
    assert keys(index) == list("abcdef") and [index.read(i) for i in range(6)] == [encoded(i) for i
                                                                                   in (0, 1, 2, 0, 1, 0)]
    first, second = (dict(list(CLASS_TARS.items())[part]) for part in (slice(3), slice(3, 6)))
    (tmp_path / "train.tar").write_bytes(tar_bytes(first) + tar_bytes(second))
    assert len(open_source(tmp_path / "train.tar").images) == 48


def test_other_numbers_than_imagenets_are_told(tmp_path, capsys):
    (tmp_path / "train.tar").write_bytes(tar_bytes(CLASS_TARS))
    assert make_shards(tmp_path / "train.tar", tmp_path / "out") == 0
    assert "6 classes and 48 images; ImageNet's are 1,000 and 1,281,167" in capsys.readouterr().err


# Keys ---


def test_keys_end_at_the_first_dot_and_what_is_dropped_is_told(tmp_path, caplog, capsys):
    directory = plain_tar(tmp_path / "in/x.tar", samples_of("a.b", "v1.0/c", "d"))
    index = ShardIndex.open(directory)
    assert keys(index) == ["v1.0/c", "d"]
    assert "1 images with two dots in their names" in caplog.text and "2 are the data of samples" in caplog.text
    assert main(["check-shards", str(directory), "--workers", "0"]) == 0
    assert "1 images with two dots" in capsys.readouterr().out


def test_keys_stay_what_they_are(tmp_path):
    names = ["\N{GRINNING FACE}", "\N{CAT FACE}", "!", "?", "a b", "a_b", "a/b", "\N{MAN}\u200d\N{WOMAN}",
             "\N{HIRAGANA LETTER A}", "x\ny"]
    directory = plain_tar(tmp_path / "in/x.tar", samples_of(*names))
    index = ShardIndex.open(directory)
    assert keys(index) == names and index.labels.tolist() == list(range(10))
    pack(open_source(directory), tmp_path / "out", Packing(samples_per_shard=4), workers=0)
    again = ShardIndex.open(tmp_path / "out")
    assert keys(again) == names and [again.read(i) for i in range(10)] == [encoded(i) for i in range(10)]
    assert check_shards(tmp_path / "out").problems == []


def test_names_that_are_no_utf8_stay_apart(tmp_path):
    path = tmp_path / "in/x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for number, key in enumerate("éèü"):
            for extension, data in (("jpg", encoded(number)), ("cls", b"0")):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    assert keys(ShardIndex.open(path.parent)) == ["\\xe9", "\\xe8", "\\xfc"]


def test_empty_files_are_no_images(tmp_path, caplog):
    members = samples_of(*"abcdefgh")
    members[4] = ("c.jpg", b"")
    directory = plain_tar(tmp_path / "in/x.tar", members)
    refused(lambda: ShardIndex.open(directory), "'c' has no data: its file is empty")
    index = ShardIndex.open(directory, max_bad_fraction=0.2)
    assert len(index) == 8 and "'c' has no data" in caplog.text
    report = check_shards(directory)
    assert any("'c' has no data: its file is empty" in problem for problem in report.problems)
    (tmp_path / "val.tar").write_bytes(tar_bytes({"a.jpg": IMAGE, "b.jpg": b""}))
    (tmp_path / "labels.txt").write_text("a.jpg 0\n")
    source = open_source(tmp_path / "val.tar", tmp_path / "labels.txt")
    assert len(source.images) == 1 and source.left_out == {"empty files": 1}


# Links, and files of other kinds ---


def linked(name, target, kind=tarfile.LNKTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def test_hard_links_are_followed_within_the_tar(tmp_path, capsys):
    plain_tar(tmp_path / "tars/n00000001.tar",
              [("a.JPEG", encoded(1)), linked("b.JPEG", "a.JPEG"), linked("c.JPEG", "b.JPEG")])
    plain_tar(tmp_path / "tars/n00000002.tar", [("a.JPEG", encoded(2)), linked("b.JPEG", "elsewhere.JPEG"),
                                                linked("c.JPEG", "a.JPEG", tarfile.SYMTYPE)])
    source = open_source(tmp_path / "tars")
    assert [image.read() for image in source.images] == [encoded(1)] * 3 + [encoded(2)]
    assert source.left_out == {"links out of the tar": 1, "symbolic links": 1}
    assert make_shards(tmp_path / "tars", tmp_path / "out") == 0
    assert "left out 2 other files: 1 links out of the tar, 1 symbolic links" in capsys.readouterr().out
    directory = plain_tar(tmp_path / "in/x.tar", [*samples_of("a"), linked("b.jpg", "a.jpg"), linked("b.cls", "a.cls")])
    index = ShardIndex.open(directory)
    assert keys(index) == ["a", "b"] and index.read(1) == encoded(0)


@pytest.mark.parametrize("name", ["y.tar.gz", "y.tgz", "y.tar.zst", "Y.TAR.GZ"])
def test_compressed_tars_beside_others_are_named(tmp_path, name):
    directory = plain_tar(tmp_path / "in/x.tar", samples_of("a"))
    (directory / name).write_bytes(b"anything")
    refused(lambda: ShardIndex.open(directory), name, "compressed")
    refused(lambda: open_source(directory), name, "compressed")
    classes = make_images(tmp_path / "classes", {"n00000001.tar": tar_bytes({"a.JPEG": IMAGE}), name: b"x"})
    refused(lambda: open_source(classes), name, "compressed")


def test_tars_in_capitals_are_read(tmp_path):
    plain_tar(tmp_path / "in/x.tar", samples_of("a"))
    directory = plain_tar(tmp_path / "in/Y.TAR", samples_of("b"))
    for _ in range(2):
        assert sorted(keys(ShardIndex.open(directory))) == ["a", "b"]
    (tmp_path / "train.tar").write_bytes(tar_bytes({"n00000001.TAR": tar_bytes({"a.JPEG": IMAGE})}))
    assert len(open_source(tmp_path / "train.tar").images) == 1


def test_only_regular_files_are_images(tmp_path, capsys):
    root = make_images(tmp_path / "data",
                       {"cat/a.jpg": IMAGE, "cat/notes.txt": b"", "cat/.x.jpg": b"", "cat/deep/b.jpg": encoded(1)})
    (root / "cat/broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "cat/linked.jpg").symlink_to(root / "cat/a.jpg")
    (root / "cat/directory").symlink_to(root)
    os.mkfifo(root / "cat/pipe.jpg")
    assert make_shards(root, tmp_path / "out", "--skip-bad") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("wrote 3 images of 1 classes") and "left out 5 other files" in printed
    assert all(f"1 {kind}" in printed for kind
               in ("broken links", "special files", "links to directories", "hidden files",
                                                   ".txt files"))


# Labels ---


def labelled(tmp_path, members, text):
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    (tmp_path / "labels.txt").write_text(text)
    return open_source(tmp_path / "x.tar", tmp_path / "labels.txt")


def test_lines_that_contradict_each_other_are_refused(tmp_path):
    one = {"a.jpg": IMAGE, "b.jpg": IMAGE}
    refused(lambda: labelled(tmp_path, one, "a.jpg 1\nb.jpg 2\na.jpg 3\n"), "line 1", "line 3", "a.jpg")
    assert len(labelled(tmp_path, one, "a.jpg 1\nb.jpg 2\na.jpg 1\n").images) == 2


def test_images_of_the_same_name_need_lines_with_their_paths(tmp_path):
    two = {"cat/0.JPEG": encoded(0), "dog/0.JPEG": encoded(1), "dog/1.JPEG": encoded(2)}
    refused(lambda: labelled(tmp_path, two, "0.JPEG x\n1.JPEG y\n"), "cat/0.JPEG", "dog/0.JPEG")
    source = labelled(tmp_path, two, "cat/0.JPEG x\n./dog/0.JPEG y\n1.JPEG y\n")
    assert [source.classes[image.label] for image in source.images] == ["x", "y", "y"]


def test_the_same_member_twice_is_refused(tmp_path):
    (tmp_path / "labels.txt").write_text("a.jpg 1\n")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for seed in (0, 1):
            member = tarfile.TarInfo("a.jpg")
            member.size = len(encoded(seed))
            tar.addfile(member, io.BytesIO(encoded(seed)))
    refused(lambda: open_source(tmp_path / "x.tar", tmp_path / "labels.txt"), "a.jpg occurs 2 times")


def test_lines_without_an_image_are_told(tmp_path):
    source = labelled(tmp_path, {"a.jpg": IMAGE}, "a.jpg 0\nb.jpg 1\n")
    note, = source.notes
    assert "1 of 2 lines" in note and "b.jpg" in note


def test_classes_that_are_numbers_are_the_labels(tmp_path):
    images = {f"{i:02d}.jpg": encoded(i) for i in range(12)}
    source = labelled(tmp_path, images, "".join(f"{i:02d}.jpg {i}\n" for i in range(12)))
    assert [image.label for image in source.images] == list(range(12)) and source.classes == [str(i) for i in range(12)]
    folder = make_images(tmp_path / "folder", {f"{i}/x.jpg": encoded(i) for i in (2, 10, 5)})
    source = open_source(folder)
    assert [(image.label, image.read()) for image in source.images] == [(i, encoded(i)) for i in (2, 5, 10)]
    assert source.classes[10] == "10" and len(source.classes) == 11
    refused(lambda: open_source(make_images(tmp_path / "twice", {"1/x.jpg": IMAGE, "01/x.jpg": IMAGE})), "01",
            "same number")
    refused(lambda: open_source(make_images(tmp_path / "years", {"1/x.jpg": IMAGE, "20240131/x.jpg": IMAGE})),
            "20240131")


def test_kaggles_flat_directory_takes_labels_by_file_name(tmp_path, capsys):
    flat = make_images(tmp_path / "val", {f"ILSVRC2012_val_{i}.JPEG": encoded(i) for i in range(3)})
    refused(lambda: open_source(flat), "val", "--labels")
    (tmp_path / "names.txt").write_text("".join(f"ILSVRC2012_val_{i}.JPEG n{i % 2}\n" for i in range(3)))
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(
        f"ILSVRC2012_val_{i},n{i % 2} 85 1 499 272 n{i % 2} 1 2 3 4 \n" for i in (2, 0, 1)))
    for labels in ("names.txt", "LOC_val_solution.csv"):
        source = open_source(flat, tmp_path / labels)
        assert [(source.classes[image.label], image.read()) for image in source.images] == [
            (f"n{i % 2}", encoded(i)) for i in range(3)]
    assert make_shards(flat, tmp_path / "out", "--labels", tmp_path / "names.txt") == 0
    assert "3 images of 2 classes" in capsys.readouterr().out
