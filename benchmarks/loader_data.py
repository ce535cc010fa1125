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
from gigatok_ds.packing.shard_writer import Sample, write_shards
from gigatok_ds.shards.contents import Contents, TarShard, write_index
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.sample_table import SampleTable
from gigatok_ds.streams import numpy_stream

# Sizes of ImageNet's photographs: most have a long side of 500, a few come from larger cameras.
SIZES = {(500, 375): 0.55, (375, 500): 0.18, (500, 333): 0.17, (640, 480): 0.05, (1024, 768): 0.05}
QUALITY = 96  # gives about ImageNet's mean of 110 kB
LEAST_SHARE = 0.7  # of a photograph's width or height in the smallest window
CLASSES = 10
KEY_DIGITS = 9  # of a sample: five for its tar and four within that


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


def make_small_images(root: Path, count: int) -> Path:
    """root/tiny: one tar of `count` samples, each the same image of 32 pixels: what an index points to where only its
    size matters.
    """
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(buffer, "PNG")
    samples = (Sample(key=f"{number:06d}", image_bytes=buffer.getvalue(), extension="png", label=number % CLASSES)
               for number in range(count))
    return write_shards(samples, root / "tiny", prefix="tiny", samples_per_shard=count,
                        classes=[f"class{number}" for number in range(CLASSES)], total=count).directory


def make_large_index(shards: Path, directory: Path, count: int) -> None:
    """An index of at least `count` samples over hard links to the first tar of `shards`, with keys as img2dataset
    writes them.
    """
    index = ShardIndex.open(shards)
    first, samples = index.shards[0], int(index.table.counts[0])
    links = -(-count // samples)
    directory.mkdir()
    for number in range(links):
        os.link(shards / first.name, directory / f"{number:06d}.tar")
    copies = [TarShard(name=f"{number:06d}.tar", size=first.size, sha256=first.sha256, samples=samples)
              for number in range(links)]
    columns = {name: np.tile(column[:samples], links) for name, column in index.table.stored().items() if name != "key"}
    table = SampleTable({**columns, "key": numbered_keys(links * samples)}, [samples] * links)
    write_index(directory, Contents(copies, index.classes, table))


def numbered_keys(count: int) -> np.ndarray:
    """000000000, 000000001, ...: bytes (count,)."""
    keys, rest = np.empty((count, KEY_DIGITS), np.uint8), np.arange(count, dtype=np.uint32)
    for place in reversed(range(KEY_DIGITS)):
        keys[:, place] = rest % 10 + ord("0")
        rest //= 10
    return keys.view(f"S{KEY_DIGITS}").reshape(count)
