"""Sets of finished images to be judged: an `.npz` batch as ADM's evaluator takes it, or a directory of PNGs."""

from __future__ import annotations

import hashlib
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gigatok_ds.data.folder import scan_image_folder
from gigatok_ds.data.transforms import decode_image, open_image, pixels_of
from gigatok_ds.errors import InputError
from gigatok_ds.files import sha256
from gigatok_ds.npy_files import npy_header, parse_npy, read_npy, unpacked
from gigatok_ds.untrusted import brief

_LOSSLESS = ("PNG", "BMP")
_LOOKED_AT = 64  # images whose floats tell their range
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


class NpzImages:
    """The images `arr_0` (N, H, W, 3), uint8, which stay on the disk where the file is not compressed.

    With `any_dtype`, floats in 0 .. 255 are taken, too, and rounded down. `labels` (N,) int64 are `arr_1` as
    `gigatok-ds sample` writes it, or None. Raises InputError for anything else.
    """

    def __init__(self, path: Path, *, any_dtype: bool = False):
        self.path = path
        try:
            arrays, pixels = _arrays(path)
        except Exception as error:
            raise InputError(f"{path} is not an .npz batch of images ({brief(error)})") from None
        full = all(name in arrays and arrays[name].dtype.kind == "f" for name in STATISTICS)
        self.statistics, labels = {name: arrays[name] for name in STATISTICS} if full else None, arrays.get("arr_1")
        if pixels is None or pixels.ndim != 4 or pixels.shape[3] != 3 or not len(pixels):
            shape = None if pixels is None else pixels.shape
            raise InputError(f"{path} has no images: arr_0 should be (images, height, width, 3), not {shape}")
        self._pixels, self.dtype = pixels, str(pixels.dtype)
        if self.dtype != "uint8" and not (any_dtype and pixels.dtype.kind == "f"):
            raise InputError(f"{path} holds {self.dtype}, but published figures are of uint8 images, clamped and "
                             "rounded down; convert them, or say --allow dtype if they are floats in 0 .. 255")
        if self.dtype != "uint8":
            some = np.asarray(self._pixels[:: -(-len(self) // _LOOKED_AT)])
            if some.size and some.max() <= 1 and (some % 1).any():
                raise InputError(f"{path} holds floats in 0 .. 1, which would all be black; multiply them by 255")
        self.size: tuple[int, int] = pixels.shape[1:3]
        self.labels = None
        if labels is not None and labels.shape == (len(self),) and labels.dtype.kind in "iu":
            self.labels = labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, numbers: range) -> Tensor:
        """Images uint8 (B, 3, H, W)."""
        pixels = np.asarray(self._pixels[numbers.start : numbers.stop])
        if self.dtype != "uint8":
            if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() < 256):
                raise InputError(f"{self.path} holds floats outside 0 .. 255")
            pixels = pixels.astype(np.uint8)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))

    def sha256(self) -> str:
        return sha256(self.path)


class FolderImages:
    """The PNG files below a directory, in the order of their names; they must be of one size.

    With `lossy` they may be JPEG or WebP files, too, whose pixels are no longer those that were generated.
    `labels` come from `labels.npy`, which `gigatok-ds sample` leaves there, and are None without it.
    """

    dtype, statistics = "uint8", None

    def __init__(self, path: Path, *, lossy: bool = False):
        self.path, self.paths, self.lossy = path, sorted(scan_image_folder(path).paths), lossy
        _, height, width = self._read(0).shape
        self.size = (height, width)
        labels = read_npy(path / "labels.npy") if (path / "labels.npy").is_file() else None
        self.labels = labels if labels is not None and labels.shape == (len(self),
                                                                        ) and labels.dtype.kind in "iu" else None

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, numbers: range) -> Tensor:
        """Images uint8 (B, 3, H, W). Raises InputError when one cannot be read or is of another size."""
        images = [self._read(number) for number in numbers]
        for image, number in zip(images, numbers, strict=True):
            if tuple(image.shape[1:]) != self.size:
                raise InputError(f"{self.paths[number]} has {tuple(image.shape[1:])} pixels, {self.paths[0].name} has "
                                 f"{self.size}; images of one set must be of one size")
        return torch.stack(images)

    def _read(self, number: int) -> Tensor:
        path = self.paths[number]
        data = path.read_bytes()
        image = decode_image(data, str(path))
        if not self.lossy and (kind := open_image(data).format) not in _LOSSLESS:
            raise InputError(f"{path} is a {kind}, which has lost some of its pixels; published figures are of PNGs or "
                             "an .npz; give those, or say --allow dtype")
        return pixels_of(image)

    def sha256(self) -> str:
        """SHA-256 of the images' hashes, in their order."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(bytes.fromhex(sha256(path)))
        return digest.hexdigest()


ImageSet = NpzImages | FolderImages


def open_images(path: Path, *, any_dtype: bool = False, lossy: bool = False) -> ImageSet:
    """The images at `path`; see above. `any_dtype` implies `lossy`. Raises InputError when it holds none."""
    if path.is_dir():
        return FolderImages(path, lossy=any_dtype or lossy)
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a directory of PNGs or an .npz file")
    return NpzImages(path, any_dtype=any_dtype)


def _arrays(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The small arrays of an .npz that are asked for here, by name, and its images: mapped, where they are not
    compressed.
    """
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        small = {name: parse_npy(unpacked(archive, members[name])) for name in (*STATISTICS, "arr_1") if name
                 in members}
        pixels = members.get("arr_0")
        if pixels is None:
            return small, None
        if pixels.compress_type != zipfile.ZIP_STORED:
            return small, parse_npy(unpacked(archive, pixels))
    return small, _mapped(path, pixels)


def _mapped(path: Path, member: zipfile.ZipInfo) -> np.ndarray:
    """An array of an .npz, read when it is looked at."""
    with open(path, "rb") as file:
        # The lengths of name and extra field are those of the local header, which differ from the directory's.
        file.seek(member.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), "<u2").tolist()
        file.seek(name_length + extra_length, 1)
        shape, fortran_order, dtype = npy_header(file)
        if fortran_order:
            raise ValueError("arr_0 is not a plain array")
        if path.stat().st_size < file.tell() + math.prod(shape) * dtype.itemsize:
            raise ValueError("the file is cut short")
        return np.memmap(path, dtype, "r", file.tell(), shape) if math.prod(shape) else np.empty(shape, dtype)
