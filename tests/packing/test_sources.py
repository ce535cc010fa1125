"""Images as people have them: each source in a small copy of its real layout, into shards and what reads these."""

import io
import json

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet
from small_models import small_tokenizer
from small_shards import encoded, make_images, plain_tar

from gigatok_ds.cli.main import main
from gigatok_ds.data.codes import CodeDataset
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.cropped import CroppedImages
from gigatok_ds.packing.checking import check_shards
from gigatok_ds.packing.image_sources import open_source
from gigatok_ds.packing.pack_shards import Packing, pack
from gigatok_ds.sampling.augmented_views import views_of
from gigatok_ds.sampling.extract import Extraction, extract_codes
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.tar_scan import NO_LABEL

CAPTIONS = [f"a photograph of {thing}, № {number}" for number, thing in enumerate(("cats", "dogs", "a house") * 4)]


def img2dataset(directory, count=7, tars=2):
    """What img2dataset writes: NNNNN.tar with KEY.jpg, KEY.txt and KEY.json, NNNNN.parquet and NNNNN_stats.json."""
    for tar in range(tars):
        keys = [f"{tar:05d}{number:04d}" for number in range(tar, count, tars)]
        rows = [{"key": key, "url": f"https://host/{key}", "caption": CAPTIONS[int(key[5:])], "status": "success",
                 "category": ("cat", "dog", "house")[int(key[5:]) % 3]} for key in keys]
        members = [(f"{row['key']}.{kind}", data) for row in rows for kind, data in (
            ("jpg", encoded(int(row["key"][5:]))), ("json", json.dumps(row).encode()),
            ("txt", row["caption"].encode()))]
        plain_tar(directory / f"{tar:05d}.tar", members)
        parquet.write_table(pyarrow.Table.from_pylist(rows), directory / f"{tar:05d}.parquet")
        (directory / f"{tar:05d}_stats.json").write_text("{}")
    return directory


def numbers(index):
    return [int(index.key(i)[5:]) for i in range(len(index))]


def packed(tmp_path, source, **options):
    pack(open_source(source, **options), tmp_path / "packed", Packing(samples_per_shard=3), workers=0)
    return ShardIndex.open(tmp_path / "packed")


def test_tars_of_img2dataset_as_they_are(tmp_path, caplog):
    index = ShardIndex.open(img2dataset(tmp_path / "cc"))
    assert len(index) == 7 and set(index.labels.tolist()) == {NO_LABEL} and index.classes == []
    assert [index.caption(i).decode() for i in range(7)] == [CAPTIONS[number] for number in numbers(index)]
    assert "7 .json files" in caplog.text and ".txt" not in caplog.text
    assert index.identity() == ShardIndex.open(tmp_path / "cc").identity()


def test_captions_stay_when_shards_are_packed_anew(tmp_path):
    index = packed(tmp_path, img2dataset(tmp_path / "cc"))
    assert set(index.labels.tolist()) == {NO_LABEL} and len(index.shards) == 3
    assert [index.caption(i).decode() for i in range(7)] == [CAPTIONS[number] for number in numbers(index)]
    assert [index.read(i) for i in range(7)] == [encoded(number) for number in numbers(index)]


@pytest.mark.parametrize("options", [
    {"field": "category"}, {"labels": "parquet", "field": "category"}, {"labels": "csv"},
])
def test_labels_from_beside(tmp_path, options):
    """From each sample's JSON, from the Parquet files that img2dataset writes, from a table."""
    cc = img2dataset(tmp_path / "cc")
    if options.get("labels") == "parquet":
        options = options | {"labels": cc}
    if options.get("labels") == "csv":
        keys = [f"{number % 2:05d}{number:04d}" for number in range(7)]
        (tmp_path / "labels.csv").write_text("﻿id,class,note\n" + "".join(
            f'{key},{("cat", "dog", "house")[int(key[5:]) % 3]},"a, b"\n' for key in keys))
        options = options | {"labels": tmp_path / "labels.csv"}
    index = packed(tmp_path, cc, **options)
    assert index.classes == ["cat", "dog", "house"]
    assert index.labels.tolist() == [number % 3 for number in numbers(index)]
    assert [index.caption(i).decode() for i in range(7)] == [CAPTIONS[number] for number in numbers(index)]


@pytest.mark.parametrize("options, said", [
    ({"field": "breed"}, r"--label-field breed: sample '000000000' .* has None there.*its fields are key, url"),
    ({"labels": "none.csv"}, "does not exist"),
    ({"labels": "few.csv"}, r"few.csv has no line for \d+ \(6 such of 7 images\)"),
    ({"labels": "two.csv"}, "one row says that 000000000 is cat, another that it is dog"),
    ({"labels": "other.csv"}, r"other.csv has no column of classes \(label, labels, class, cls; --label-field names"),
    ({"labels": "nameless.csv"}, "nameless.csv has no column of names"),
    ({"labels": "list.txt", "field": "label"}, "--label-field names a column of a table"),
    ({"labels": "few.csv", "unlabelled": True}, "--no-labels and --labels say different things"),
    ({"field": "category", "unlabelled": True}, "--no-labels and --label-field say different things"),
])
def test_labels_that_are_not_there_are_said(tmp_path, options, said):
    cc = img2dataset(tmp_path / "cc")
    for name, text in {"few.csv": "key,label\n000000000,cat\n", "two.csv": "key,label\n000000000,cat\n000000000,dog\n",
                       "other.csv": "key,kind\n000000000,cat\n", "nameless.csv": "kind,label\na,cat\n",
                       "list.txt": "000000000 cat\n"}.items():
        (tmp_path / name).write_text(text)
    if "labels" in options:
        options = options | {"labels": tmp_path / options["labels"]}
    with pytest.raises(InputError, match=said):
        open_source(cc, **options)


def test_labels_that_are_class_names(tmp_path):
    """As webdataset writes strings: a class list comes of it, the same whatever the order, also read again."""
    names = ["zebra", "n02123045", "tabby cat", "zebra"]
    tars = plain_tar(tmp_path / "in/x.tar", [(f"{key}.{kind}", data) for key, name in zip("abcd", names, strict=True)
                                             for kind, data in (("cls", name.encode()), ("jpg", encoded(3)))])
    for _ in range(2):
        index = ShardIndex.open(tars)
        assert index.classes == ["n02123045", "tabby cat", "zebra"] and index.labels.tolist() == [2, 0, 1, 2]
    assert check_shards(tars).problems == []
    plain_tar(tmp_path / "in/x.tar", [("a.cls", b"tabby cat"), ("a.jpg", encoded(3))])
    with pytest.raises(InputError):
        ShardIndex.open(tars)


def test_timms_layout(tmp_path):
    """timm/imagenet-1k-wds: KEY.jpg, KEY.cls and KEY.json; the JSON's label may be taken instead."""
    members = [(f"n0144_{number}.{kind}", data) for number in range(4) for kind, data in (
        ("cls", str(number % 2).encode()), ("jpg", encoded(number)),
        ("json", json.dumps({"label": number % 2, "class_name": ("n01", "n02")[number % 2]}).encode()))]
    directory = plain_tar(tmp_path / "wds/imagenet1k-train-0000.tar", members)
    assert ShardIndex.open(directory).labels.tolist() == [0, 1, 0, 1]
    index = packed(tmp_path, directory, field="class_name")
    assert index.classes == ["n01", "n02"] and index.labels.tolist() == [0, 1, 0, 1]


def test_kaggles_tree(tmp_path):
    """ILSVRC/Data/CLS-LOC with train/SYNSET, val without classes, and LOC_val_solution.csv beside ILSVRC."""
    data = tmp_path / "ILSVRC/Data/CLS-LOC"
    make_images(data / "train", {f"{synset}/{synset}_{i}.JPEG": encoded(i) for synset in ("n01440764", "n02123045")
                                 for i in range(2)})
    make_images(data / "val", {f"ILSVRC2012_val_0000000{i}.JPEG": encoded(i) for i in (1, 2, 3)})
    make_images(data / "test", {f"ILSVRC2012_test_0000000{i}.JPEG": encoded(i) for i in (1, 2)})
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(
        f"ILSVRC2012_val_0000000{i},{synset} 1 2 3 4 \n" for i, synset in ((3, "n01440764"), (1, "n02123045"),
                                                                            (2, "n01440764"))))
    train = open_source(data / "train")
    assert train.classes == ["n01440764", "n02123045"] and [image.label for image in train.images] == [0, 0, 1, 1]
    val = open_source(data / "val", tmp_path / "LOC_val_solution.csv")
    assert val.classes == train.classes and [image.label for image in val.images] == [1, 0, 0]
    assert not open_source(data / "test", unlabelled=True).has_labels


def datasets_parquet(directory, names=("cat", "dog"), rows=5, files=2):
    """What datasets' push_to_hub writes: data/train-00000-of-00002.parquet, an Image and a ClassLabel."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    kind = pyarrow.schema([("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
                           ("label", pyarrow.int64())],
                          metadata={b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    (directory / "data").mkdir(parents=True)
    for file in range(files):
        table = pyarrow.Table.from_pylist(
            [{"image": {"bytes": encoded(10 * file + row), "path": f"{row}.JPEG"}, "label": row % 2}
             for row in range(rows)], schema=kind)
        parquet.write_table(table, directory / f"data/train-{file:05d}-of-{files:05d}.parquet", row_group_size=2)
    return directory


@pytest.mark.parametrize("workers", [0, 2])
def test_parquet_as_datasets_writes_it(tmp_path, workers):
    source = datasets_parquet(tmp_path / "set")
    pack(open_source(source), tmp_path / "packed", Packing(samples_per_shard=4), workers=workers)
    index = ShardIndex.open(tmp_path / "packed")
    assert index.classes == ["cat", "dog"] and index.labels.tolist() == [0, 1, 0, 1, 0] * 2
    assert [index.read(i) for i in range(10)] == [encoded(10 * file + row) for file in (0, 1) for row in range(5)]
    one = open_source(next((source / "data").iterdir()), field="label")
    assert len(one.images) == 5 and one.classes == ["cat", "dog"]


@pytest.mark.parametrize("change, options, said", [
    (lambda table: table.drop_columns("image"), {}, "has 0 columns of images, which are structs of bytes and path"),
    (lambda table: table, {"field": "breed"}, "has no column 'breed' .*its columns are image, label"),
    (lambda table: table, {"labels": "x.csv"}, "has a column of labels, which --label-field names"),
])
def test_parquet_without_what_is_asked_for(tmp_path, change, options, said):
    file = next((datasets_parquet(tmp_path / "set", files=1) / "data").iterdir())
    parquet.write_table(change(parquet.read_table(file)), file)
    with pytest.raises(InputError, match=said):
        open_source(file, **options)


def test_damaged_parquet_is_one_line(tmp_path):
    file = next((datasets_parquet(tmp_path / "set", files=1) / "data").iterdir())
    full = file.read_bytes()
    for cut in (0, 3, len(full) // 2, len(full) - 5):
        file.write_bytes(full[:cut])
        with pytest.raises(InputError, match=r"is damaged .*Parquet file is expected") as caught:
            open_source(file)
        assert "\n" not in str(caught.value)


def test_images_at_any_depth_without_labels(tmp_path, capsys):
    photos = make_images(tmp_path / "photos", {"a.jpg": encoded(0), "2024/b.png": encoded(1, "PNG"),
                                               "2024/may/c.webp": encoded(2, "WEBP"), "2024/notes.md": b"x"})
    assert main(["make-shards", str(photos), "--out", str(tmp_path / "flat")]) == 2
    assert main(["make-shards", str(photos / "2024/may"), "--out", str(tmp_path / "flat")]) == 2
    assert "--no-labels" in capsys.readouterr().err
    assert main(["make-shards", str(photos), "--no-labels", "--out", str(tmp_path / "out"), "--workers", "0"]) == 0
    assert "wrote 3 images without labels in 1 shards" in capsys.readouterr().out
    assert main(["check-shards", str(tmp_path / "out"), "--workers", "0"]) == 0
    assert "3 images without labels in 1 shards" in capsys.readouterr().out


def test_a_list_of_files(tmp_path):
    make_images(tmp_path / "a b", {"one.jpg": encoded(0), "deep/two.jpg": encoded(1)})
    listed = tmp_path / "list.txt"
    listed.write_text(f"a b/deep/two.jpg\n\n{tmp_path}/a b/one.jpg\n")
    source = open_source(listed, unlabelled=True)
    assert [image.read() for image in source.images] == [encoded(1), encoded(0)] and not source.has_labels
    with pytest.raises(InputError, match="does not say which class its images have; give --labels"):
        open_source(listed)
    (tmp_path / "labels.txt").write_text("one.jpg cat\ntwo.jpg dog\n")
    assert [image.label for image in open_source(listed, tmp_path / "labels.txt").images] == [1, 0]
    listed.write_text("a b/three.jpg\n")
    with pytest.raises(InputError, match=r"list.txt, image 1: .*three.jpg is not there"):
        open_source(listed, unlabelled=True)


def test_codes_keep_captions_and_do_without_labels(tmp_path):
    cc = img2dataset(tmp_path / "cc")
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    extract_codes(tokenizer, cc, tmp_path / "codes", views=views_of("flip", tokenizer.config.image_size), provenance={},
                  extraction=Extraction(samples_per_shard=3))
    codes = CodeDataset.open(tmp_path / "codes")
    assert codes.codes.shape[:2] == (7, 2) and set(codes.labels.tolist()) == {NO_LABEL}
    assert [codes.index.caption(i).decode() for i in range(7)] == [CAPTIONS[number] for number in numbers(codes.index)]
    with pytest.raises(InputError, match="codes has no labels, which are needed here"):
        codes.check_labels(1000)


def test_what_needs_classes_says_that_there_are_none(tmp_path):
    index = ShardIndex.open(img2dataset(tmp_path / "cc"))
    for ask in (index.count_classes, lambda: index.check_labels(10), lambda: index.check_labels(10, 1.0)):
        with pytest.raises(InputError, match="has no labels, which are needed here"):
            ask()
    assert index.next_labelled(-1, 1000) is None and np.all(index.labels == NO_LABEL)


def test_a_sample_is_what_webdataset_reads(tmp_path):
    """The other way round: what was packed is a WebDataset with captions."""
    import webdataset

    packed(tmp_path, img2dataset(tmp_path / "cc"), field="category")
    urls = sorted(str(path) for path in (tmp_path / "packed").glob("*.tar"))
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        number = int(sample["__key__"][5:])
        assert sample["txt"].decode() == CAPTIONS[number] and int(sample["cls"]) == number % 3
        assert io.BytesIO(sample["jpg"]).getvalue() == encoded(number)


def partly_labelled(directory):
    """A tar with labels, one without, one with both."""
    for name, labels in (("a", "01"), ("b", "  "), ("c", " 1")):
        plain_tar(directory / f"{name}.tar", [
            (f"{name}{number}.{kind}", data) for number, label in enumerate(labels)
            for kind, data in (("jpg", encoded(number)), *([("cls", label.encode())] if label.strip() else []))])
    return directory


def test_where_some_have_labels_only_those_who_ask_for_them_mind(tmp_path, capsys):
    tars = partly_labelled(tmp_path / "tars")
    index = ShardIndex.open(tars)
    assert index.labels.tolist() == [0, 1, -1, -1, -1, 1]
    with pytest.raises(InputError, match=r"sample 'b0' has label -1.*3 such samples"):
        index.check_labels(2)
    with pytest.raises(InputError, match=r"3 of 6 images have no label.*the first of them sample 'b0'"):
        CroppedImages(tars, 16).check_classes()
    for out, more in (("packed", []), ("bare", ["--no-labels"])):
        assert main(["make-shards", str(tars), "--out", str(tmp_path / out), "--samples-per-shard", "4", "--workers",
                     "0", *more]) == 0
        said = capsys.readouterr()
        assert ("3 of these images have no label" in said.err) == (not more)
        assert ShardIndex.open(tmp_path / out).labels.tolist() == ([-1] * 6 if more else index.labels.tolist())
        assert main(["check-shards", str(tmp_path / out), "--workers", "0"]) == 0
    torch.manual_seed(0)
    tokenizer = small_tokenizer()
    for _ in range(2):  # again, it finds its own shards whole
        extract_codes(tokenizer, tars, tmp_path / "codes", views=views_of("center", tokenizer.config.image_size),
                      provenance={}, extraction=Extraction(samples_per_shard=4))
    assert CodeDataset.open(tmp_path / "codes").labels.tolist() == index.labels.tolist()


def test_a_probe_does_not_take_images_without_labels_for_wrong_ones(tmp_path):
    images = CroppedImages(img2dataset(tmp_path / "cc"), 16)
    for ask in (images.check_classes, lambda: images.number_as(["cat"], "x"), lambda: images.number_as([], "x")):
        with pytest.raises(InputError, match="has no labels, which are needed here"):
            ask()


def test_images_beside_parquet_files_are_what_is_packed(tmp_path):
    """As img2dataset leaves files, and as people keep tables beside their folders."""
    for folder in ("00000", "00001"):
        make_images(tmp_path / "files", {f"{folder}/{folder}{number}.jpg": encoded(number) for number in range(2)})
        parquet.write_table(pyarrow.Table.from_pylist([{"key": folder, "caption": "x"}]),
                            tmp_path / f"files/{folder}.parquet")
    source = open_source(tmp_path / "files", unlabelled=True)
    assert len(source.images) == 4 and source.left_out[".parquet files"] == 2
    assert open_source(tmp_path / "files").classes == ["00000", "00001"]


def test_one_split_of_a_data_set_at_a_time(tmp_path):
    source = datasets_parquet(tmp_path / "set")
    first = sorted((source / "data").iterdir())[0]
    first.with_name("test-00000-of-00001.parquet").write_bytes(first.read_bytes())
    with pytest.raises(InputError, match=r"2 splits, test and train; give those of one, such as '.*test-\*.parquet'"):
        open_source(source)
    assert len(open_source(source / "data/train-*.parquet").images) == 10


def test_parquet_is_not_shuffled_image_by_image(tmp_path):
    with pytest.raises(InputError, match="--shuffle-seed would read a whole row group"):
        pack(open_source(datasets_parquet(tmp_path / "set")), tmp_path / "packed", Packing(shuffle_seed=1), workers=0)


def test_a_field_means_nothing_where_tars_are_classes(tmp_path):
    for synset in ("n01440764", "n02123045"):
        plain_tar(tmp_path / f"train/{synset}.tar", [("a.JPEG", encoded(1))])
    with pytest.raises(InputError, match="--label-field does nothing for"):
        open_source(tmp_path / "train", field="label")
