"""Where images to be packed come from: every kind of source lists the same images with the same labels."""


import pytest
from imagenet_files import devkit, tar_bytes
from small_shards import encoded, make_images, plain_tar

from gigatok_ds import InputError
from gigatok_ds.packing.image_sources import open_source
from gigatok_ds.packing.pack_shards import Packing, pack

IMAGES = {"n00000002": {"n00000002_7.JPEG": encoded(1), "n00000002_30.JPEG": encoded(2)},
          "n00000001": {"n00000001_5.JPEG": encoded(3)}}
FLAT = {name: data for group in IMAGES.values() for name, data in group.items()}


def content(source):
    """(class, file name, bytes) of each image."""
    return [(source.classes[image.label], (image.member or image.path).rpartition("/")[2], image.read())
            for image in source.images]


def folder(tmp_path):
    return make_images(tmp_path / "folder", {f"{name}/{file}": data for name, group in IMAGES.items()
                                             for file, data in group.items()})


def train_tar(tmp_path):
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar_bytes({f"{name}.tar": tar_bytes(group) for name, group in IMAGES.items()}))
    return path


def class_tars(tmp_path):
    for name, group in IMAGES.items():
        make_images(tmp_path / "tars", {f"{name}.tar": tar_bytes(group)})
    return tmp_path / "tars"


@pytest.mark.parametrize("make", [folder, train_tar, class_tars])
def test_classes_are_in_the_order_of_their_names_and_images_too(tmp_path, make):
    source = open_source(make(tmp_path))
    assert source.classes == ["n00000001", "n00000002"]
    names = ["n00000001_5.JPEG", "n00000002_30.JPEG", "n00000002_7.JPEG"]
    assert content(source) == [(name[:9], name, FLAT[name]) for name in names]
    assert [image.key for image in source.images] == ["00000000_n00000001_5", "00000001_n00000002_30",
                                                      "00000002_n00000002_7"]


def val_tar(tmp_path):
    path = tmp_path / "val.tar"
    path.write_bytes(tar_bytes({f"ILSVRC2012_val_0000000{i}.JPEG": encoded(i) for i in (2, 1, 3)}))
    return path


def text_labels(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("".join(f"ILSVRC2012_val_0000000{i}.JPEG {name}\n"
                            for i, name in ((3, "n00000004"), (1, "n00000004"), (2, "n00000009"))))
    return path


@pytest.mark.parametrize("labels", [devkit, text_labels])
def test_validation_images_get_their_class_by_name(tmp_path, labels):
    source = open_source(val_tar(tmp_path), labels(tmp_path))
    assert source.classes == ["n00000004", "n00000009"]
    assert content(source) == [(name, f"ILSVRC2012_val_0000000{i}.JPEG", encoded(i))
                               for i, name in ((1, "n00000004"), (2, "n00000009"), (3, "n00000004"))]


def test_shards_are_a_source_that_keeps_keys_and_classes(tmp_path):
    pack(open_source(folder(tmp_path)), tmp_path / "shards", Packing(samples_per_shard=2), workers=0)
    source, before = open_source(tmp_path / "shards"), open_source(tmp_path / "folder")
    assert [(image.key, image.label, image.read()) for image in source.images] == [
        (image.key, image.label, image.read()) for image in before.images]
    assert source.classes == before.classes


def test_shards_without_class_names_keep_their_numbers(tmp_path):
    directory = plain_tar(tmp_path / "in/x.tar", [("a.jpg", encoded(0)), ("a.cls", b"7")])
    source = open_source(directory)
    assert source.classes == [] and source.images[0].label == 7


def cut(path):
    path.write_bytes(path.read_bytes()[:-11_000])
    return path


@pytest.mark.parametrize("make, labels, message", [
    (lambda p: p / "nothing", None, "does not exist"),
    (val_tar, None, "give --labels"),
    (folder, text_labels, "no line for n00000001/n00000001_5.JPEG"),
    (class_tars, text_labels, "leave it out"),
    (train_tar, text_labels, "has classes, leave it out"),
    (val_tar, lambda p: p / "nothing.txt", "nothing.txt does not exist"),
    (val_tar, lambda p: devkit(p, (30, 10)), "the classes of 2 images; there are 3"),
    (val_tar, lambda p: devkit(p, (30, 10, 99)), "is not ImageNet's devkit"),
    (val_tar, lambda p: make_images(p, {"x.tgz": tar_bytes({})}) / "x.tgz", "is not ImageNet's devkit"),
    (lambda p: cut(train_tar(p)), None, "copy it again"),
    (lambda p: cut(val_tar(p)), text_labels, "copy it again"),
    (lambda p: make_images(p, {"x.tar": tar_bytes({"a.txt": b"x"})}) / "x.tar", None, "neither images nor tars"),
    (lambda p: make_images(p, {"x.tar": tar_bytes({"n1.tar": tar_bytes({})})}) / "x.tar", None, "holds no images"),
    (lambda p: make_images(p, {"x.tar": b"not a tar" * 100}) / "x.tar", None, "not a whole uncompressed tar"),
])
def test_what_cannot_be_read_is_one_clear_line(tmp_path, make, labels, message):
    with pytest.raises(InputError, match=message) as caught:
        open_source(make(tmp_path), labels(tmp_path) if labels else None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, message", [
    ("ILSVRC2012_val_00000001.JPEG n1\n", "no line for ILSVRC2012_val_00000002.JPEG \\(2 such of 3"),
    ("one two three\n", "line 1: 'one two three' is not of the form NAME CLASS"),
])
def test_label_files_must_name_every_image(tmp_path, text, message):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        open_source(val_tar(tmp_path), tmp_path / "labels.txt")
