"""Codes on disk: each sample's codes under several augmentations, as tar shards, and batches of them for a
GPT.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from gigatok_ds.data.loader import TrainingBatches, address_fields
from gigatok_ds.data.reader import ReadingPlan, SampleAddress
from gigatok_ds.errors import InputError
from gigatok_ds.files import write_atomically
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.remote import open_shards, read_beside
from gigatok_ds.shards.shard_cache import ShardCache
from gigatok_ds.shards.tar_scan import CAPTION, NO_LABEL
from gigatok_ds.shards.tar_writer import Record, ShardSet, new_directory, write_tars
from gigatok_ds.streams import numpy_stream
from gigatok_ds.untrusted import is_number, parse_json

FORMAT = "gigatok-ds-codes/1"
METADATA_FILE = "metadata.json"
PARTIAL_FILE = "metadata.partial.json"  # the same, of a directory that is not complete yet
CODE_EXTENSIONS = ("npy",)


@dataclass(frozen=True, kw_only=True)
class CodeSample:
    """The codes of one image: integers (augmentations, latent tokens), its class number or NO_LABEL, and its caption,
    if there is one, as it is stored.
    """

    key: str
    codes: np.ndarray
    label: int
    caption: bytes | None = None


def code_dtype(codebook_size: int) -> np.dtype:
    """The type that codes are stored in."""
    return np.dtype("<u2" if codebook_size <= 65536 else "<i4")


def write_code_shards(samples: Iterable[CodeSample], out_dir: str | Path, *, codebook_size: int,
                      latent_tokens: int, provenance: dict, classes: list[str] | None = None,
                      samples_per_shard: int = 10_000, total: int | None = None) -> ShardSet:
    """Write codes as tars (KEY.npy; KEY.cls and KEY.txt if there are) with an index and `metadata.json`: all or
    nothing.

    `provenance` (which tokenizer, which augmentation, ...) is stored as it is; `classes` are the class names,
    if known; `total` is for the progress bar. Raises InputError, naming the sample, for codes of another
    shape than the first sample's, codes outside 0 ... codebook_size - 1, a negative label or a bad key; and
    for an `out_dir` in use.
    """
    metadata = {"format": FORMAT, "codebook_size": codebook_size, "latent_tokens": latent_tokens}
    with new_directory(out_dir) as scratch:
        records = code_records(tqdm(samples, total=total, unit="image", disable=None), metadata)
        shards = write_tars(records, scratch, prefix="codes", samples_per_shard=samples_per_shard,
                            extensions=CODE_EXTENSIONS, classes=classes or [])
        count = sum(shard.samples for shard in shards)
        metadata |= {"count": count, "provenance": provenance}
        write_atomically(scratch / METADATA_FILE, metadata_bytes(metadata))
    return ShardSet(directory=Path(out_dir), shards=shards, count=count)


def new_metadata(*, codebook_size: int, latent_tokens: int, augmentations: int, count: int, provenance: dict) -> dict:
    """What the metadata file of a directory of code shards holds."""
    return {"format": FORMAT, "codebook_size": codebook_size, "latent_tokens": latent_tokens,
            "augmentations": augmentations, "count": count, "provenance": provenance}


def metadata_bytes(metadata: dict) -> bytes:
    """The contents of a metadata file."""
    return (json.dumps(metadata, indent=2) + "\n").encode()


def encoded_size(metadata: dict) -> int:
    """How many bytes each sample's codes take in the tar, for complete metadata."""
    shape = (metadata["augmentations"], metadata["latent_tokens"])
    return len(_npy(np.zeros(shape, code_dtype(metadata["codebook_size"]))))


def code_records(samples: Iterable[CodeSample], metadata: dict) -> Iterator[Record]:
    """Check the samples and turn them into records; the first settles metadata["augmentations"] if it is not there.

    Raises InputError for a sample that does not fit the metadata; see `write_code_shards`.
    """
    for sample in samples:
        codes = np.asarray(sample.codes)
        if codes.ndim == 2:
            metadata.setdefault("augmentations", len(codes))
        shape = (metadata.get("augmentations", 1), metadata["latent_tokens"])
        if codes.shape != shape or not codes.size:
            raise InputError(f"sample {sample.key!r}: codes have shape {codes.shape}; (augmentations, latent "
                             f"tokens) = {shape} is expected")
        if sample.label < NO_LABEL:
            raise InputError(f"sample {sample.key!r} has label {sample.label}; labels are counted from 0")
        _check_codes(codes, metadata["codebook_size"], f"sample {sample.key!r}")
        stored = np.ascontiguousarray(codes, code_dtype(metadata["codebook_size"]))
        record = {"npy": _npy(stored)}
        if sample.label != NO_LABEL:
            record["cls"] = str(sample.label).encode()
        if sample.caption is not None:
            record[CAPTION] = sample.caption
        yield sample.key, record


def _check_codes(codes: np.ndarray, codebook_size: int, name: str) -> None:
    if not np.issubdtype(codes.dtype, np.integer):
        raise InputError(f"{name}: codes are {codes.dtype}; integers are expected")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        raise InputError(f"{name}: codes go from {low} to {high}; a codebook of {codebook_size} allows 0 to "
                         f"{codebook_size - 1}")


@dataclass(frozen=True, kw_only=True)
class CodeDataset:
    """Code shards in memory: `codes` unsigned or int32 (N, A, T), `labels` int32 (N,), NO_LABEL where there is none."""

    codes: np.ndarray
    labels: np.ndarray
    metadata: dict
    index: ShardIndex

    @classmethod
    def joined(cls, parts: Sequence[CodeDataset], index: ShardIndex) -> CodeDataset:
        """The samples of all, of which `index` is. Raises InputError when they are not codes of one kind."""
        first = parts[0].metadata
        for part in parts[1:]:
            for name in ("codebook_size", "latent_tokens", "augmentations"):
                if part.metadata[name] != first[name]:
                    raise InputError(f"{part.index.location} has {name} {part.metadata[name]}, "
                                     f"{parts[0].index.location} {first[name]}; only codes of one kind can be mixed")
        return cls(codes=np.concatenate([part.codes for part in parts]), labels=index.labels,
                   metadata=first | {"count": len(index)}, index=index)

    @classmethod
    def open(cls, directory: str | Path, cache: ShardCache | None = None) -> CodeDataset:
        """Load what `write_code_shards` wrote, from its directory or from the URL of a copy of that; see `open_shards`.

        Raises InputError when it is incomplete or damaged.
        """
        metadata = _read_metadata(directory, cache)
        index = open_shards(directory, CODE_EXTENSIONS, cache)
        if len(index) != metadata["count"]:
            raise InputError(f"{directory} holds {len(index)} samples, its {METADATA_FILE} says "
                             f"{metadata['count']}; extract the codes again")
        shape = (metadata["augmentations"], metadata["latent_tokens"])
        codes = np.empty((len(index), *shape), code_dtype(metadata["codebook_size"]))
        header = _npy(codes[0])[: -codes[0].nbytes]
        for i in tqdm(range(len(index)), desc=f"loading {directory}", unit="sample", disable=None):
            data = index.read(i)
            if not data.startswith(header) or len(data) != len(header) + codes[0].nbytes:
                raise InputError(f"{directory}: sample {index.key(i)!r} is not an array of {codes.dtype} "
                                 f"{shape}; extract the codes again")
            codes[i] = np.frombuffer(data, codes.dtype, offset=len(header)).reshape(shape)
        _check_codes(codes, metadata["codebook_size"], str(directory))
        if index.labels.min() < NO_LABEL:
            raise InputError(f"{directory}: the smallest label is {index.labels.min()}; labels count from 0")
        return cls(codes=codes, labels=index.labels, metadata=metadata, index=index)

    def __len__(self) -> int:
        return len(self.labels)

    def number_as(self, classes: Sequence[str], source: str | Path) -> CodeDataset:
        """The same with the labels that `ShardIndex.number_as` gives."""
        self.index.number_as(classes, source)
        return dataclasses.replace(self, labels=self.index.labels)

    def check_labels(self, num_classes: int) -> None:
        """Raise InputError, naming the first such sample, when a label is missing or not in 0 ... num_classes - 1."""
        self.index.check_labels(num_classes)


def _read_metadata(directory: str | Path, cache: ShardCache | None) -> dict:
    file, data = f"{directory}/{METADATA_FILE}", read_beside(directory, METADATA_FILE, cache)
    if data is None:
        if read_beside(directory, PARTIAL_FILE, cache) is not None:
            raise InputError(f"the codes in {directory} are incomplete; run the same gigatok-ds extract-codes command "
                             "again to complete them")
        raise InputError(f"{directory} is not a directory of code shards: it has no {METADATA_FILE}; write one with "
                         "gigatok-ds extract-codes (which also converts the original's .npy folders: --from-npy)")
    try:
        metadata = parse_json(data, file, advice="extract the codes again")
        if metadata["format"] != FORMAT:
            raise InputError(f"{file}: format {metadata['format']!r}, this version reads {FORMAT!r}")
        for name in ("codebook_size", "latent_tokens", "augmentations", "count"):
            if not is_number(metadata[name], 1, 2**40) or type(metadata[name]) is not int:
                raise InputError(f"{file}: {name} is {metadata[name]!r}; it must be a positive integer")
    except KeyError as error:
        raise InputError(f"{file} is damaged ({error!r}); extract the codes again") from None
    return metadata


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


class _AugmentedCodes(Dataset):
    def __init__(self, data: CodeDataset, second: CodeDataset | None, seed: int):
        self.data = data
        self.second = second
        self.seed = seed

    def __getitem__(self, address: SampleAddress) -> dict:
        rng = numpy_stream(self.seed, "augmentation", address.epoch, address.sample)
        views = self._source(address).codes[address.sample]
        row = views[rng.integers(len(views))]
        return {"codes": torch.from_numpy(row.astype(np.int64)),
                "labels": int(self.data.labels[address.sample]), **address_fields(address)}

    def _source(self, address: SampleAddress) -> CodeDataset:
        if self.second is None:
            return self.data
        draw = numpy_stream(self.seed, "second codes", address.epoch, address.sample).random()
        return self.second if draw < 0.5 else self.data


class CodeBatches(TrainingBatches):
    """Codes with one augmentation per sample and epoch, drawn from a stream of (seed, epoch, sample).

    Yields `codes` int64 (B, T), `labels` int64 (B,), `position`, `epoch` and `sample` int64 (B,). With
    `second`, codes of the same images under other augmentations, half the accesses take theirs. `loading` are the
    mixture of TrainingBatches, and the workers and pin_memory of BatchLoader.
    """

    def __init__(self, data: CodeDataset, plan: ReadingPlan, second: CodeDataset | None = None, *, seed: int,
                 **loading: Any):
        super().__init__(_AugmentedCodes(data, second, seed), len(data), plan, seed=seed, **loading)
