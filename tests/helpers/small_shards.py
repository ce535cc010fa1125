"""A few small images in tars, with an index or as other programs make them, and in directories."""

import functools
import hashlib
import io
import tarfile

import numpy as np
from PIL import Image

from gigatok_ds.packing.image_sources import open_source as open_images
from gigatok_ds.packing.pack_shards import Packing, pack
from gigatok_ds.packing.shard_writer import Sample, write_shards
from gigatok_ds.shards.index import ShardIndex

CLASSES = ["bird", "cat", "dog"]


@functools.cache
def encoded(seed, kind="JPEG", size=(40, 34)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def samples(count):
    for i in range(count):
        kind, extension = (("PNG", "png"), ("JPEG", "JPEG"))[i % 2]
        yield Sample(key=f"s{i:04d}", image_bytes=encoded(i, kind), extension=extension, label=i % 3)


def write(directory, count=23, per_shard=5):
    return write_shards(samples(count), directory, prefix="demo", samples_per_shard=per_shard,
                        classes=CLASSES)


def plain_tar(path, members):
    """A tar of (name, bytes) or ready TarInfo members, as other programs make them."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path.parent


def tree(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def make_images(root, layout):
    for name, data in layout.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def without_end(data):
    return data[: len(data) * 2 // 3]


def incomplete_tars(path):
    """Ten samples of which three lack something, and a tar of others that lack nothing."""
    members = [member for sample in samples(10) for member in (
        (f"{sample.key}.jpg", sample.image_bytes), (f"{sample.key}.cls", str(sample.label).encode()))]
    plain_tar(path / "b.tar", [(name.replace("s", "t", 1), data) for name, data in members[10:14]])
    del members[19], members[4]  # the label of the last one, the data of the third
    members[1] = members[1][0], b"cat"
    return plain_tar(path / "a.tar", members)


def with_bad_images(directory, bad, count=23, tars=1):
    """Plain shards in which the samples numbered in `bad` cannot be decoded."""
    members = [[] for _ in range(tars)]
    for i, sample in enumerate(samples(count)):
        data = without_end(sample.image_bytes) if i in bad else sample.image_bytes
        members[i * tars // count] += [(f"{sample.key}.jpg", data), (f"{sample.key}.cls", str(sample.label).encode())]
    for number, part in enumerate(members):
        plain_tar(directory / f"x{number}.tar", part)
    return ShardIndex.open(directory)


def packed(tmp_path, name, classes):
    folder = make_images(tmp_path / f"{name}-files", {f"{label}/{i}.png": encoded(i, "PNG", (16, 16))
                                                      for label in classes for i in range(2)})
    pack(open_images(folder), tmp_path / name, Packing(), workers=0)
    return tmp_path / name
