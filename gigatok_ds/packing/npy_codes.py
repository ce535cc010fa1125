"""The original's folders of codes, one pair of .npy files for each image, and their conversion to code shards.

`NAME_codes/INDEX.npy` holds int64 (augmentations, latent tokens), `NAME_labels/INDEX.npy` a single int64; indices count
from 0 in the order of the image folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gigatok_ds.cluster.launched import ALONE, LaunchedRank
from gigatok_ds.data.codes import CodeSample, new_metadata
from gigatok_ds.errors import InputError
from gigatok_ds.npy_files import parse_npy
from gigatok_ds.packing.code_directory import CodeDirectory
from gigatok_ds.untrusted import brief

_CODES, _LABELS = "_codes", "_labels"


@dataclass(frozen=True, kw_only=True)
class NpyCodes:
    """A pair of folders with `count` samples; `shape` is (augmentations, latent tokens) of the first one."""

    codes: Path
    labels: Path
    count: int
    shape: tuple[int, int]

    @classmethod
    def open(cls, directory: str | Path) -> NpyCodes:
        """Find the folders, given the one of codes or its parent, and count their files.

        Raises InputError when there is no such pair, when a number is missing, and when a file's name is no number.
        """
        codes = _find_codes(Path(directory))
        labels = codes.with_name(codes.name.removesuffix(_CODES) + _LABELS)
        if not labels.is_dir():
            raise InputError(f"{codes} has no folder of labels beside it: {labels} is missing")
        count = _count(codes)
        if _count(labels) != count:
            raise InputError(f"{codes} holds {count} files, {labels} {_count(labels)}; let the original finish its "
                             "extraction (--resume), or copy both folders again")
        first = _load(codes / "0.npy")
        if first.ndim != 2 or not first.size:
            raise InputError(f"{codes / '0.npy'} has shape {first.shape}; (augmentations, latent tokens) is expected")
        return cls(codes=codes, labels=labels, count=count, shape=first.shape)

    def key(self, i: int) -> str:
        return f"{i:08d}"

    def sample(self, i: int) -> CodeSample:
        """Sample number i; InputError when its files cannot be read or the label is not one integer."""
        file = self.labels / f"{i}.npy"
        label = _load(file)
        if label.size != 1 or not np.issubdtype(label.dtype, np.integer):
            raise InputError(f"{file} holds {label.dtype} {label.shape}; one integer, the label, is expected")
        if (number := int(label.reshape(()))) < 0:
            raise InputError(f"sample {self.key(i)!r} has label {number} ({file}); labels are counted from 0")
        return CodeSample(key=self.key(i), codes=_load(self.codes / f"{i}.npy"), label=number)


def convert_npy_codes(directory: str | Path, out: str | Path, *, codebook_size: int, samples_per_shard: int = 10_000,
                      rank: LaunchedRank = ALONE) -> None:
    """Write the original's codes as code shards to `out`; interrupted, it goes on where it was.

    Keys are the file numbers with eight digits. Raises InputError for a code outside 0 ... codebook_size - 1, samples
    of different shapes, and what `NpyCodes` and `CodeDirectory.fill` raise.
    """
    if codebook_size < 1:
        raise InputError(f"codebook size is {codebook_size}; it must be at least 1")
    source = NpyCodes.open(directory)
    augmentations, latent_tokens = source.shape
    provenance = {"npy_codes": source.codes.resolve().name, "samples_per_shard": samples_per_shard}
    metadata = new_metadata(codebook_size=codebook_size, latent_tokens=latent_tokens, augmentations=augmentations,
                            count=source.count, provenance=provenance)

    def make_samples(ranges: list[range]) -> Iterator[CodeSample]:
        return (source.sample(i) for numbers in ranges for i in numbers)

    CodeDirectory(directory=Path(out), metadata=metadata, key=source.key, classes=[],
                  samples_per_shard=samples_per_shard).fill(rank, make_samples)


def _find_codes(directory: Path) -> Path:
    if not directory.is_dir():
        raise InputError(f"{directory} does not exist or is not a directory")
    directory = directory.resolve()
    if directory.name.endswith(_CODES):
        return directory
    found = sorted(path for path in directory.glob(f"*{_CODES}") if path.is_dir())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"{directory} must hold one folder of codes named *{_CODES}, as the original writes them; "
                         f"found: {names}; give that folder itself")
    return found[0]


def _count(folder: Path) -> int:
    """How many .npy files there are; they must be numbered from 0 on."""
    names = [name for name in os.listdir(folder) if name.endswith(".npy")]
    if not names:
        raise InputError(f"{folder} holds no .npy files")
    there = set(names)
    for i in range(len(names)):
        if f"{i}.npy" not in there:
            raise InputError(f"{folder} holds {len(names)} .npy files, but not {i}.npy; they are numbered from 0 on: "
                             "let the original finish its extraction (--resume), or copy the folder again")
    return len(names)


def _load(file: Path) -> np.ndarray:
    try:
        return parse_npy(file.read_bytes())
    except Exception as error:
        raise InputError(f"{file} is not a plain .npy array ({brief(error)}); extract or copy it again") from None
