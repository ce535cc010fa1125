"""MDS shards and litdata chunks. Those in files/ were written by mosaicml-streaming 0.13.0 and litdata 0.2.76:

    MDSWriter(columns={"image": "jpeg", "label": "int", "caption": "str", "weight": "float32"}, size_limit=1600)
    BinaryWriter(chunk_size=3)

each with five JPEG images of 12 x 8 pixels, whose number `n` is in their gray (40 n), label (n % 3) and caption.
"""

import itertools
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from gigatok_ds.cli.main import main
from gigatok_ds.data.transforms import decode_image
from gigatok_ds.errors import InputError
from gigatok_ds.packing.image_sources import open_source
from gigatok_ds.packing.pack_shards import Packing, pack
from gigatok_ds.shards.index import ShardIndex

FILES = Path(__file__).parent / "files"
KINDS = ("mds", "litdata")
FIRST = {"mds": "shard.00000.mds", "litdata": "chunk-0-0.bin"}


@pytest.fixture(params=KINDS)
def copied(request, tmp_path):
    return shutil.copytree(FILES / request.param, tmp_path / request.param)


def first_of(directory):
    return directory / FIRST[directory.name]


def change_index(directory, change):
    index = json.loads((directory / "index.json").read_text())
    change(index)
    (directory / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_packed_with_labels_and_captions(kind, workers, tmp_path):
    pack(open_source(FILES / kind), tmp_path / "out", Packing(samples_per_shard=2), workers=workers)
    index = ShardIndex.open(tmp_path / "out")
    assert index.labels.tolist() == [0, 1, 2, 0, 1] and index.classes == [] and len(index.shards) == 3
    assert [index.caption(i) for i in range(5)] == [f"number {i}".encode() for i in range(5)]
    for i in range(5):
        pixels = np.asarray(decode_image(index.read(i), "image"), np.int64)
        assert pixels.shape == (8, 12, 3) and np.abs(pixels - 40 * i).max() <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_column_of_labels_can_be_chosen_or_left_alone(kind, capsys, tmp_path):
    source = open_source(FILES / kind, field="caption")
    assert source.classes == [f"number {i}" for i in range(5)]
    assert [image.label for image in source.images] == [*range(5)]
    assert not open_source(FILES / kind, unlabelled=True).has_labels
    for options, said in ((["--label-field", "weight"], "column 'weight' holds float"),
                          (["--label-field", "breed"], "has no column 'breed'"),
                          (["--labels", "x.txt"], "--label-field")):
        assert main(["make-shards", str(FILES / kind), "--out", str(tmp_path / "out"), *options]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_items_that_are_tuples_and_nested_have_names_too(tmp_path):
    """litdata's items may be any tree: (image, {"class": ..., "text": ...})."""
    copied = shutil.copytree(FILES / "litdata", tmp_path / "litdata")
    leaf = {"type": None, "context": None, "children_spec": []}

    def nest(index):
        inner = {"type": "builtins.dict", "context": '["class", "text", "weight"]', "children_spec": [leaf] * 3}
        index["config"]["data_spec"] = json.dumps([1, {"type": "builtins.tuple", "context": "null",
                                                       "children_spec": [leaf, inner]}])

    change_index(copied, nest)
    with pytest.raises(InputError, match=r"its columns are 0 \(jpeg\), 1.class \(int\), 1.text \(str\), 1.weight"):
        open_source(copied, field="label")
    assert [image.label for image in open_source(copied, field="1.class").images] == [0, 1, 2, 0, 1]


def uncompressed(index):
    del index["shards"][1:]
    index["shards"][0] |= {"compression": "zstd", "zip_data": {"basename": "shard.00000.mds.zstd"},
                           "raw_data": {"basename": "other.mds"}}


@pytest.mark.parametrize(("kind", "change", "said"), [
    ("mds", uncompressed, "shard.00000.mds.zstd is compressed \\(zstd\\); decompress it to other.mds"),
    ("mds", lambda index: index["shards"][0].update(format="json"), "format 'json' .version 2. is not read"),
    ("mds", lambda index: index["shards"][1]["raw_data"].update(basename="../x.mds"), "leads outside the directory"),
    ("mds", lambda index: index["shards"][1]["raw_data"].update(basename="x.mds"), "names x.mds, which is not there"),
    ("mds", lambda index: index["shards"][0].update(column_encodings=["str", "pil", "int", "float32"]),
     "has 0 columns of the kinds jpeg, jpg, png, image, .*its columns are caption \\(str\\), image \\(pil\\)"),
    ("mds", lambda index: index["shards"][0].update(samples=7), "says that it holds 2 samples, index.json says 7"),
    ("mds", lambda index: index["shards"][0].pop("samples"), "index.json is damaged"),
    ("mds", lambda index: index["shards"][0].update(column_sizes=[None, 3.5, 8, 4]), "said to take 3.5 bytes"),
    ("litdata", lambda index: index["config"].update(compression="zstd"), "is compressed \\(zstd\\); write it again"),
    ("litdata", lambda index: index["config"].update(encryption={"algorithm": "fernet"}),
     "is encrypted"),
    ("litdata", lambda index: index["config"].update(item_loader="TokensLoader"), "written for TokensLoader"),
    ("litdata", lambda index: index["chunks"][0].update(filename="/etc/passwd"), "leads outside the directory"),
    ("litdata", lambda index: index["config"].update(data_format=["int"]), "index.json is damaged"),
    ("litdata", lambda index: index.update(chunks=[]), "holds no samples"),
], ids=itertools.count())
def test_what_cannot_be_read_is_refused_in_one_line(kind, change, said, tmp_path):
    copied = shutil.copytree(FILES / kind, tmp_path / kind)
    change_index(copied, change)
    with pytest.raises(InputError, match=said):
        open_source(copied)


@pytest.mark.parametrize("change", [
    lambda data: data[:3],
    lambda data: data[:-1],
    lambda data: struct.pack("<I", 2**31) + data[4:],
    lambda data: data[:4] + struct.pack("<I", 4) + data[8:],  # the first sample within the table of places
    lambda data: data[:8] + struct.pack("<I", 2**32 - 1) + data[12:],  # the second beyond the end
    lambda data: data[: struct.unpack_from("<I", data, 4)[0]] + b"\xff\xff\xff\x7f" * 4 + data[200:],  # sizes
], ids=["short", "cut", "count", "before", "beyond", "sizes"])
def test_a_damaged_file_is_named(copied, change):
    first = first_of(copied)
    first.write_bytes(change(first.read_bytes()))
    with pytest.raises(InputError, match=f"{first.name} is damaged"):
        open_source(copied)
