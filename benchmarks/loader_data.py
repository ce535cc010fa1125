"""JPEG files of ImageNet's sizes from photographs, and an index as large as ImageNet's."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from photograph_crops import PHOTOGRAPHS, find_photograph
from PIL import Image

from gigatok_ds.data.transforms import decode_image
from gigatok_ds.packing.image_sources import open_source
from gigatok_ds.packing.pack_shards import Packing, pack
from gigatok_ds.shards.contents import Contents, TarShard, write_index
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.streams import numpy_stream

# Sizes of ImageNet's photographs: most have a long side of 500, a few come from larger cameras.
SIZES = {(500, 375): 0.55, (375, 500): 0.18, (500, 333): 0.17, (640, 480): 0.05, (1024, 768): 0.05}
QUALITY = 96  # gives about ImageNet's mean of 110 kB
LEAST_SHARE = 0.7  # of a photograph's width or height in the smallest window
CLASSES = 10


def make_images(root: Path, count: int) -> None:
    """root/folder: `count` JPEG files in class directories; root/shards: the same as shards."""
    photographs = [decode_image(find_photograph(name).read_bytes(), name, orient=True) for name in PHOTOGRAPHS]
    for number in range(count):
        rng = numpy_stream(0, "loader benchmark", number)
        directory = root / "folder" / f"class{number % CLASSES}"
        directory.mkdir(parents=True, exist_ok=True)
        image = _window(photographs[number % len(photographs)], rng)
        (directory / f"{number:06d}.jpg").write_bytes(_jpeg(image))
    pack(open_source(root / "folder"), root / "shards", Packing(samples_per_shard=-(-count // 4)), workers=0)


def _window(photograph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random window of the photograph, as one of SIZES."""
    width, height = list(SIZES)[rng.choice(len(SIZES), p=list(SIZES.values()))]
    scale = rng.uniform(LEAST_SHARE, 1) * min(photograph.width / width, photograph.height / height)
    left, top = rng.uniform(0, photograph.width - scale * width), rng.uniform(0, photograph.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    return photograph.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def make_large_index(shards: Path, directory: Path, count: int) -> None:
    """An index of `count` samples over hard links to the first tar of `shards`, with keys like ImageNet's."""
    index = ShardIndex.open(shards)
    first, entries = index.shards[0], next(index.entries())
    links = -(-count // len(entries))
    directory.mkdir()
    for number in range(links):
        os.link(shards / first.name, directory / f"{number:06d}.tar")
    copies = [TarShard(name=f"{number:06d}.tar", size=first.size, sha256=first.sha256, samples=len(entries))
              for number in range(links)]
    columns = {"offset": np.int64, "size": np.int64, "label": np.int32, "crc32": np.uint32}
    table = {name: np.tile(np.array([getattr(entry, name) for entry in entries], kind), links)
             for name, kind in columns.items()}
    table["shard"] = np.repeat(np.arange(links, dtype=np.int32), len(entries))
    table["key"] = np.array([f"{number:07d}_n{number % 10**8:08d}_{number % 9973}".encode()
                             for number in range(links * len(entries))])
    write_index(directory, Contents(copies, index.classes, table))
