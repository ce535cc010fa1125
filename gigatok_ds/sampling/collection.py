"""Where many images go: a directory of PNGs, or the `.npz` that ADM's evaluation reads; either may be interrupted.

Each holds a record of what its images depend on, and refuses to mix them with images of other settings.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np

from gigatok_ds.errors import InputError
from gigatok_ds.npy_files import parse_npy, read_npz, unpacked
from gigatok_ds.ownership import is_unused
from gigatok_ds.sampling.images import write_png
from gigatok_ds.untrusted import read_json, reading

RECORD = "sampling.json"
LABELS = "labels.npy"


class PngFolder:
    """`000000.png`, `000001.png`, ..., with labels.npy (N,) int64 and sampling.json beside them."""

    def __init__(self, out: Path):
        self.out, self.record, self.place = out, out / RECORD, out

    def start(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)

    def finished(self, count: int) -> set[int]:
        """Numbers below `count` of the images that are there."""
        names = {path.stem for path in self.out.glob("*.png")}
        return {number for number in range(count) if f"{number:06d}" in names}

    def write(self, first: int, pixels: np.ndarray, labels: np.ndarray) -> None:
        """Images number `first` and so on, uint8 (B, height, width, 3), and their classes (B,)."""
        for number, image in enumerate(pixels, first):
            write_png(image, self.out / f"{number:06d}.png")

    def finish(self, labels: np.ndarray) -> None:
        """Once all images are there."""
        scratch = self.out / f".{LABELS}.partial"
        with open(scratch, "wb") as file:
            np.save(file, labels)
        os.replace(scratch, self.out / LABELS)


class NpzFile:
    """One file with arr_0, uint8 (N, height, width, 3), and arr_1, int64 (N,) classes, and its record NAME.npz.json.

    Until all images are there they lie in NAME.npz.parts, in files named by the first number and how many they hold.
    """

    def __init__(self, out: Path):
        self.out = out
        self.record, self.parts = (out.with_name(out.name + ending) for ending in (".json", ".parts"))
        self.place = self.parts  # the directory that is written

    def start(self) -> None:
        if not self.out.exists():
            self.parts.mkdir(parents=True, exist_ok=True)

    def finished(self, count: int) -> set[int]:
        """As of `PngFolder`. InputError when the file is there with another number of images."""
        if self.out.exists():
            with reading(self.out, "choose another --out or remove it"), zipfile.ZipFile(self.out) as archive:
                held = len(parse_npy(unpacked(archive, archive.getinfo("arr_1.npy"))))
            if held != count:
                raise InputError(f"{self.out} holds {held} images already, not {count}; choose another --out or remove "
                                 "it")
            return set(range(count))
        return {number for first, many, _ in self._found() for number in range(first, first + many)}

    def write(self, first: int, pixels: np.ndarray, labels: np.ndarray) -> None:
        """As of `PngFolder`."""
        scratch = self.parts / f".{first:08d}.partial"
        with open(scratch, "wb") as file:
            np.savez(file, images=pixels, labels=labels)
        os.replace(scratch, self.parts / f"{first:08d}-{len(labels)}.npz")

    def finish(self, labels: np.ndarray) -> None:
        """Join the parts one after the other: the whole need not fit into memory."""
        if self.out.exists():
            shutil.rmtree(self.parts, ignore_errors=True)
            return
        found = [part for part in self._found() if part[0] < len(labels)]
        shape = (len(labels), *read_npz(found[0][2])["images"].shape[1:])
        scratch = self.parts / f".{self.out.name}.partial"
        # ZipInfo's constant date: the same images make the same file.
        with zipfile.ZipFile(scratch, "w") as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for first, _, path in found:
                    file.write(read_npz(path)["images"][: len(labels) - first].tobytes())
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                np.lib.format.write_array(file, labels)
        os.replace(scratch, self.out)
        shutil.rmtree(self.parts, ignore_errors=True)  # over NFS what is open stays for a moment

    def _found(self) -> list[tuple[int, int, Path]]:
        """(first number, how many, path) of every part, in order."""
        found = []
        for path in self.parts.glob("*-*.npz"):
            first, count = path.stem.split("-")
            found.append((int(first), int(count), path))
        return sorted(found)


def collection_at(out: Path) -> PngFolder | NpzFile:
    """What --out asks for: a file by the suffix .npz, else a directory."""
    if out.suffix == ".npz":
        return NpzFile(out)
    if out.suffix:
        raise InputError(f"--out is {out}; with --count give a directory for PNGs, or a file ending in .npz")
    return PngFolder(out)


def claim(collection: PngFolder | NpzFile, record: dict) -> None:
    """Leave `record` with the images, or InputError when other settings' images, or files unknown, are there.

    The count may differ: image number i does not depend on it.
    """
    path = collection.record
    if path.is_file():
        other = read_json(path, advice="choose another --out or remove the images and it")
        names = sorted(name for name in record.keys() | other.keys() if record.get(name) != other.get(name))
        if wrong := [name for name in names if name != "count"]:
            raise InputError(f"{collection.out} holds images with {wrong[0]} {_brief(other.get(wrong[0]))}, not "
                             f"{_brief(record.get(wrong[0]))}; choose another --out")
    elif not is_unused(collection.out):
        raise InputError(f"{collection.out} exists already and has no {path.name}; choose another --out")
    collection.start()
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(scratch, path)


def _brief(value) -> str:
    return json.dumps(value) if value is not None else "unset"
