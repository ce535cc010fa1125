"""Packing a source of images into WebDataset shards: in parallel, resumable, the same bytes whatever happened between.

Shard k holds the images k * n ... k * n + n - 1 of the source. Everything is written in `OUT.partial`, which says from
the beginning what it will become; a finished shard lies there with a note of what it holds. When all are there, the
index is written and the directory takes its name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image
from tqdm import tqdm

from gigatok_ds.data.transforms import decode_whole_image, open_image, resize_short_side
from gigatok_ds.errors import InputError
from gigatok_ds.files import write_atomically, written_aside
from gigatok_ds.ownership import owned
from gigatok_ds.packing.listing import ImageSource, SourceImage
from gigatok_ds.packing.workers import in_processes
from gigatok_ds.plain import from_plain
from gigatok_ds.shards.contents import Contents, TarShard, build_table, columns_of, describe_shard, write_index
from gigatok_ds.shards.tar_scan import CAPTION, IMAGE_EXTENSIONS, NO_LABEL, Entry, is_safe_key, scan_tar
from gigatok_ds.shards.tar_writer import Record, ShardSet, unused, write_tar
from gigatok_ds.streams import numpy_stream
from gigatok_ds.untrusted import read_json

PLAN_FILE = "packing.json"  # stays, and says where the shards came from
SKIPPED_FILE = "skipped.json"
_NOTE = ".note.json"  # what a finished shard holds


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a source becomes shards.

    `resize` shrinks larger images to that shorter side and stores them as JPEG of `quality`; otherwise the bytes stay
    as they are. `shuffle_seed` stores images in a random order, for readers that only stream. `metadata` adds KEY.json
    (class, size in pixels, where it came from). `skip_bad` leaves undecodable images out instead of ending.
    """

    prefix: str = "images"
    samples_per_shard: int = 1000
    resize: int | None = None
    quality: int = 95
    shuffle_seed: int | None = None
    metadata: bool = False
    skip_bad: bool = False

    def __post_init__(self):
        if not is_safe_key(self.prefix):
            raise InputError(f"shard prefix {self.prefix!r} may hold only letters, digits and _ + = @ -")
        if self.samples_per_shard < 1:
            raise InputError(f"samples per shard is {self.samples_per_shard}; it must be at least 1")
        if self.resize is not None and self.resize < 1:
            raise InputError(f"the shorter side to resize to is {self.resize}; it must be at least 1")
        if not 1 <= self.quality <= 100:
            raise InputError(f"JPEG quality is {self.quality}; it must be 1 to 100")


def pack(source: ImageSource, out_dir: str | Path, packing: Packing, *, workers: int) -> ShardSet:
    """Write the source's images as shards with an index into `out_dir`, which must not exist yet or be empty.

    Interrupted, the same call goes on with the shards that are missing, in any number of `workers` (processes). Raises
    InputError for an undecodable image, naming it (unless they are skipped), and when `out_dir` is in use or was begun
    from something else; finished shards stay.
    """
    out_dir = unused(out_dir)
    if packing.shuffle_seed is not None and any(image.row is not None for image in source.images):
        raise InputError("--shuffle-seed would read a whole row group of a Parquet file for each image; pack without, "
                         "then pack the shards with it")
    images = _in_order(source, packing)
    partial = out_dir.with_name(f"{out_dir.name}.partial")
    with owned(partial):
        _claim(partial, _plan(source, images, packing))
        return _pack(source, images, packing, partial, out_dir, workers)


def _pack(source: ImageSource, images: list[SourceImage], packing: Packing, partial: Path, out_dir: Path,
          workers: int) -> ShardSet:
    starts = range(0, len(images), packing.samples_per_shard)
    paths = [partial / f"{packing.prefix}-{number:06d}.tar" for number in range(len(starts))]
    notes = {path: note for path in paths if (note := _read_note(path))}
    parts = {path: images[start : start + packing.samples_per_shard]
             for path, start in zip(paths, starts, strict=True) if path not in notes}
    done = sum(note["images"] for note in notes.values())
    try:
        with tqdm(total=len(images), initial=done, unit="image", disable=None) as bar:
            tasks = ((path, part, source.classes, packing) for path, part in parts.items())
            for path, _ in zip(parts, in_processes(_write_shard, tasks, workers if len(parts) > 1 else 0), strict=True):
                note = _read_note(path)
                assert note is not None, f"{path} was just written"
                notes[path] = note
                bar.update(note["images"])
    except InputError:
        if not any(partial.glob(f"*{_NOTE}")):  # nothing to go on with
            shutil.rmtree(partial)
        raise
    return _finish(partial, out_dir, source, [notes[path] for path in paths])


def _in_order(source: ImageSource, packing: Packing) -> list[SourceImage]:
    if packing.shuffle_seed is None:
        return source.images
    order = numpy_stream(packing.shuffle_seed, "packing").permutation(len(source.images))
    return [source.images[i] for i in order]


def _plan(source: ImageSource, images: list[SourceImage], packing: Packing) -> dict:
    digest = hashlib.sha256()
    for image in images:
        digest.update(repr((image[:5], image.caption, image.row)).encode())
    return {"packing": dataclasses.asdict(packing), "images": len(images), "source_sha256": digest.hexdigest(),
            "classes": source.classes}


def _claim(partial: Path, plan: dict) -> None:
    """Make the directory ours, or find that it was begun by the same call."""
    partial.mkdir(parents=True, exist_ok=True)
    path = partial / PLAN_FILE
    if not path.is_file():
        if any(partial.glob("[!.]*")):
            raise InputError(f"{partial} exists and is not an interrupted run; remove it")
        write_atomically(path, json.dumps(plan, indent=1).encode())
    found = read_json(path, advice=f"remove {partial}")
    different = [name for name in plan if found.get(name) != plan[name]]
    if different:
        raise InputError(f"{partial} was begun with another {' and '.join(different)}; repeat the first command to go "
                         "on, or remove it")


def _read_note(path: Path) -> dict | None:
    """What a finished shard holds, or None when it has to be written (again)."""
    try:
        note = json.loads(path.with_suffix(_NOTE).read_bytes())
        return _checked(note) if path.stat().st_size == note["shard"]["size"] else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _checked(note: dict) -> dict:
    """A note whose parts are what they should be; InputError, a ValueError, otherwise."""
    from_plain(TarShard, note["shard"], "shard")
    from_plain(list[str], note["skipped"], "skipped")
    for entry in note["entries"]:
        key, *numbers = Entry(*entry)
        from_plain(str, key, "key")
        from_plain(list[int], numbers, key)
    from_plain(int, note["images"], "images")
    return note


def _write_shard(path: Path, images: list[SourceImage], classes: list[str], packing: Packing) -> None:
    skipped: list[str] = []
    with written_aside(path) as file:
        write_tar(_records(images, classes, packing, skipped), file, set())
    entries = scan_tar(path)
    note = {"shard": dataclasses.asdict(describe_shard(path, entries)), "entries": entries, "images": len(images),
            "skipped": skipped}
    write_atomically(path.with_suffix(_NOTE), json.dumps(note).encode())


def _records(images: list[SourceImage], classes: list[str], packing: Packing, skipped: list[str]) -> Iterator[Record]:
    for image in images:
        data = image.read()
        try:
            decoded = decode_whole_image(data, image.name)
        except InputError as error:
            if not packing.skip_bad:
                raise InputError(f"{error}; --skip-bad leaves such images out") from None
            skipped.append(str(error))
            continue
        extension = _extension(data)
        if packing.resize and min(decoded.size) > packing.resize:
            decoded = resize_short_side(decoded, packing.resize)
            buffer = io.BytesIO()
            decoded.save(buffer, "JPEG", quality=packing.quality, subsampling=0)
            data, extension = buffer.getvalue(), "jpg"
        members = {extension: data}
        if image.label != NO_LABEL:
            members["cls"] = str(image.label).encode()
        if (caption := image.read_caption()) is not None:
            members[CAPTION] = caption
        if packing.metadata:
            members["json"] = json.dumps(_described(image, decoded, classes)).encode()
        yield image.key, members


def _described(image: SourceImage, decoded: Image, classes: list[str]) -> dict:
    label = {} if image.label == NO_LABEL else {"class": classes[image.label] if classes else image.label}
    return label | {"width": decoded.width, "height": decoded.height,
                    "source": image.member or "/".join(Path(image.path).parts[-2:])}


def _extension(data: bytes) -> str:
    """The extension of what the image is: that of its file may be wrong (one of ImageNet's JPEG files holds a PNG)."""
    with open_image(data) as image:
        assert image.format is not None  # open_image has read a file
        extension = image.format.lower()
    extension = {"jpeg": "jpg", "mpo": "jpg"}.get(extension, extension)
    assert extension in IMAGE_EXTENSIONS
    return extension


def _finish(partial: Path, out_dir: Path, source: ImageSource, notes: list[dict]) -> ShardSet:
    """Write the index and give the directory its name."""
    shards = [TarShard(**note["shard"]) for note in notes if note["shard"]["samples"]]
    columns = [columns_of([Entry(*entry) for entry in note["entries"]]) for note in notes if note["entries"]]
    if not shards:
        raise InputError("no image can be decoded, so there is nothing to write")
    write_index(partial, Contents(shards, source.classes, build_table(shards, columns)))
    skipped = [line for note in notes for line in note["skipped"]]
    if skipped:
        write_atomically(partial / SKIPPED_FILE, (json.dumps(skipped, indent=1) + "\n").encode())
    named = {shard.name for shard in shards}
    for path in partial.iterdir():
        left_by_a_killed_process = path.name.startswith(".")
        if left_by_a_killed_process or path.name.endswith(_NOTE) or (path.suffix == ".tar" and path.name not in named):
            path.unlink()
    if out_dir.exists():
        out_dir.rmdir()
    os.rename(partial, out_dir)
    return ShardSet(directory=out_dir, shards=shards, count=sum(shard.samples for shard in shards))
