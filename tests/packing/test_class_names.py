"""Labels mean classes by name: validation data that lack one, or number them otherwise, are mapped or refused."""

import os
import tarfile

import numpy as np
import pytest
from one_rank import ALONE
from small_models import small_tokenizer
from small_shards import encoded, make_images, packed, plain_tar
from training_runs import prepare

from gigatok_ds.checkpoint.standalone import save_standalone
from gigatok_ds.config.load import load_recipe
from gigatok_ds.data.codes import CodeDataset, CodeSample, write_code_shards
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.cropped import CroppedImages
from gigatok_ds.packing.checking import check_shards
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.training.code_sources import open_source


def test_images_of_fewer_classes_get_the_numbers_of_their_names(tmp_path):
    train = ShardIndex.open(packed(tmp_path, "train", ["ant", "bee", "cat"]))
    packed(tmp_path, "val", ["bee", "cat"])
    for location in ("val", "val-files"):
        images = CroppedImages(tmp_path / location, 16)
        assert [images[i]["labels"] for i in range(4)] == [0, 0, 1, 1]
        before = images.identity()
        images.number_as(train.classes, "train")
        assert [images[i]["labels"] for i in range(4)] == [1, 1, 2, 2] and images.identity() == before
    other = CroppedImages(packed(tmp_path, "other", ["bee", "dog"]), 16)
    with pytest.raises(InputError, match=r"class 'dog'.*train does not have"):
        other.number_as(train.classes, "train")


def test_a_flat_directory_is_refused_where_classes_matter(tmp_path):
    images = CroppedImages(make_images(tmp_path / "val", {"1.png": encoded(1, "PNG", (16, 16))}), 16)
    for check in (images.check_classes, lambda: images.number_as(["a"], "train")):
        with pytest.raises(InputError, match=r"val holds images without classes.*--labels"):
            check()


def codes(tmp_path, name, classes, labels):
    items = [CodeSample(key=f"k{i}", codes=np.full((1, 4), i, np.int32), label=label) for i, label in enumerate(labels)]
    write_code_shards(items, tmp_path / name, codebook_size=16, latent_tokens=4, provenance={}, classes=classes)
    return tmp_path / name


def test_codes_get_the_numbers_of_their_classes_names(tmp_path):
    train = CodeDataset.open(codes(tmp_path, "train", ["ant", "bee", "cat"], [0, 1, 2]))
    held_out = CodeDataset.open(codes(tmp_path, "val", ["bee", "cat"], [0, 1, 1])).number_as(train.index.classes,
                                                                                             "train")
    assert held_out.labels.tolist() == [1, 2, 2]


def test_names_that_two_classes_have_are_refused_unless_the_lists_are_the_same(tmp_path):
    train = CodeDataset.open(codes(tmp_path, "train", ["crane", "ant", "crane"], [0, 1, 2]))
    same = CodeDataset.open(codes(tmp_path, "same", ["crane", "ant", "crane"], [2, 0, 0]))
    assert same.number_as(train.index.classes, "train").labels.tolist() == [2, 0, 0]
    for name, classes in (("one", ["ant", "crane"]), ("two", ["ant", "crane", "crane"])):
        other = CodeDataset.open(codes(tmp_path, name, classes, [0, 1, 1]))
        with pytest.raises(InputError, match=f"two classes called 'crane' in .*{name} or train"):
            other.number_as(train.index.classes, "train")
    ant = CodeDataset.open(codes(tmp_path, "ant", ["ant"], [0, 0, 0]))
    assert ant.number_as(train.index.classes, "train").labels.tolist() == [1, 1, 1]


def test_a_gpts_validation_images_are_numbered_as_its_training_images(tmp_path):
    prepare(tmp_path)
    tokenizer = small_tokenizer()
    save_standalone(tmp_path / "tokenizer", tokenizer.config, tokenizer.state_dict())
    train, val = packed(tmp_path, "train", ["ant", "bee", "cat"]), packed(tmp_path, "val", ["bee", "cat"])
    recipe = load_recipe(tmp_path / "gpt.yaml", [f"data.train={train}", f"data.validation={val}",
                                                 f"data.tokenizer={tmp_path / 'tokenizer'}",
                                                 "training.global_batch_size=4"])
    assert open_source(recipe, ALONE, 4).validation()[1].tolist() == [1, 1, 2, 2]


# Labels that were changed in place ---


def relabel(tar, old, new):
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as members:
        places = [member.offset_data for member in members if member.name.endswith(".cls")]
    for place in places:
        if data[place : place + 1] == old:
            data[place : place + 1] = new
    tar.write_bytes(data)


def age(path):
    """Clocks of file systems tick in milliseconds: what was written before is to be older by a second."""
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))


@pytest.mark.parametrize("samples, newer", [(40, True), (3, False)])
def test_tars_relabelled_in_place_are_noticed(tmp_path, samples, newer, caplog):
    """A label fills one block whatever it is, so no size tells."""
    members = [member for i in range(samples) for member in ((f"s{i}.jpg", encoded(0)),
                                                             (f"s{i}.cls", b"1" if i == samples - 1 else b"0"))]
    directory = plain_tar(tmp_path / "in/x.tar", members)
    assert ShardIndex.open(directory).labels.tolist() == [0] * (samples - 1) + [1]
    tar = directory / "x.tar"
    age(directory / "index.json")  # the tar is newer, but the same
    ShardIndex.open(directory)
    assert "newer than the index" in caplog.text
    caplog.clear()
    ShardIndex.open(directory)
    assert not caplog.text
    age(directory / "index.json")
    age(tar)
    before = tar.stat()
    relabel(tar, b"1", b"2")
    if not newer:
        os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match=f"label of sample 's{samples - 1}' is 2, not 1; delete index.json"):
        ShardIndex.open(directory)
    assert "not what was indexed" in check_shards(directory).problems[0]
