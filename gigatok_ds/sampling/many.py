"""Many images, for evaluation: numbered, with settings on record, by any number of processes, resumable.

Image i is a function of the models, the settings and (seed, i), whoever draws it and in whatever batch (see
generate.py). So the work is the list of numbers that are not there yet, cut into batches that ranks take in turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gigatok_ds.checkpoint.standalone import DTYPES, check_same_codes, checkpoint_hash, load_gpt_part, load_tokenizer
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.image_metrics import to_uint8
from gigatok_ds.models.gpt import GPT
from gigatok_ds.ownership import owned_by_first
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.sampling.batch_size import default_batch_size
from gigatok_ds.sampling.collection import claim, collection_at
from gigatok_ds.sampling.generate import Sampler, check_numbers
from gigatok_ds.sampling.images import check_pair, decode_images, sample_grid
from gigatok_ds.streams import numpy_stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """The models and how to draw with them. `settings` goes to `Sampler.codes`; dtype is the GPT's, a name of DTYPES
    (the tokenizer always decodes in float32); batch_size None is that of `default_batch_size`. force: also with a
    tokenizer that is not the one of whose codes the GPT is."""

    gpt: Path
    tokenizer: Path
    settings: dict
    seed: int = 0
    batch_size: int | None = None
    dtype: str = "float32"
    compile: bool = False
    force: bool = False

    def check(self) -> None:
        """InputError for a number that makes no sense, without looking at the models."""
        if self.dtype not in DTYPES:
            raise InputError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        check_numbers(batch_size=self.batch_size, **self.settings)

    def load(self, topology: Topology):
        """GPT (this tensor rank's part) and tokenizer, on this rank's device; after `check`."""
        self.check()
        if not self.force:
            check_same_codes(self.gpt, self.tokenizer, "give that one, or --force")
        gpt = load_gpt_part(self.gpt, topology, DTYPES[self.dtype])
        tokenizer = load_tokenizer(self.tokenizer, device=str(topology.device))
        check_pair(gpt, tokenizer)
        return gpt, tokenizer

    def size(self, gpt: GPT, topology: Topology) -> int:
        """Images at a time, the same on all ranks."""
        return topology.from_first(default_batch_size(gpt)) if self.batch_size is None else self.batch_size


def draw_grid(job: SamplingJob, topology: Topology, classes: list[int], out: Path, *, per_class: int) -> None:
    """One PNG with a row of `per_class` images for each class, by one tensor group."""
    if topology.data_size > 1:
        raise InputError(f"a grid is drawn by one process, or by one group with --tp, not by {topology.world_size} "
                         "ranks; --count shares its images")
    gpt, tokenizer = job.load(topology)
    sample_grid(gpt, tokenizer, classes, out if topology.is_first else None, per_class=per_class, seed=job.seed,
                batch_size=job.size(gpt, topology), compile=job.compile, **job.settings)


def draw_many(job: SamplingJob, topology: Topology, out: Path, *, count: int, balanced: bool) -> int:
    """Images number 0 to count - 1 into `out`; those that are there are kept. Returns how many were missing.

    Collective. Raises InputError when `out` holds images of other settings, or another process draws into it.
    """
    if count < 1:
        raise InputError(f"count is {count}; it must be at least 1")
    gpt, tokenizer = job.load(topology)
    labels = class_labels(count, gpt.config.num_classes, seed=job.seed, balanced=balanced)
    sampler = Sampler(gpt, job.size(gpt, topology), compile=job.compile)
    # Of no images: wrong settings are refused before anything is written.
    sampler.codes(torch.from_numpy(labels[:0]), [], **job.settings)
    collection = collection_at(out)
    with owned_by_first(collection.place, topology):
        return _drawn(job, topology, sampler, tokenizer, collection, labels, count=count, balanced=balanced)


def _drawn(job: SamplingJob, topology: Topology, sampler: Sampler, tokenizer, collection, labels: np.ndarray, *,
           count: int, balanced: bool) -> int:
    """Draw what is missing, and return how many that was."""
    missing = _on_first(topology, lambda: _claimed(collection, _record(job, sampler, topology, count, balanced), count))
    batches = list(runs(missing, sampler.batch_size))[topology.data_rank :: topology.data_size]
    with tqdm(total=sum(map(len, batches)), desc="sample", unit="image", disable=not topology.is_first) as progress:
        for numbers in batches:
            own = torch.from_numpy(labels[numbers.start : numbers.stop])
            codes = sampler.codes(own, numbers, seed=job.seed, **job.settings)
            if topology.tensor_rank == 0:
                collection.write(numbers.start, _pixels(decode_images(tokenizer, codes, sampler.batch_size)),
                                 own.numpy())
            progress.update(len(numbers))
    topology.barrier()
    _on_first(topology, lambda: collection.finish(labels))
    return len(missing)


def class_labels(count: int, classes: int, *, seed: int, balanced: bool) -> np.ndarray:
    """Classes int64 (count,): image i has i % classes if balanced, else one drawn by (seed, i)."""
    if balanced:
        return np.arange(count) % classes
    return np.array([numpy_stream(seed, "class", number).integers(classes) for number in range(count)])


def runs(numbers: list[int], longest: int) -> Iterator[range]:
    """The ascending `numbers` as ranges of neighbours, none longer than `longest`."""
    start = 0
    for place in range(1, len(numbers) + 1):
        ends = place == len(numbers) or numbers[place] != numbers[place - 1] + 1
        if ends or place - start == longest:
            yield range(numbers[start], numbers[place - 1] + 1)
            start = place


def _claimed(collection, record: dict, count: int) -> list[int]:
    claim(collection, record)
    return sorted(set(range(count)) - collection.finished(count))


def _on_first(topology: Topology, action):
    """The result of `action` on the first rank, on all; its InputError, too."""
    result = error = None
    if topology.is_first:
        try:
            result = action()
        except InputError as raised:
            error = str(raised)
    result, error = topology.from_first((result, error))
    if error:
        raise InputError(error)
    return result


def _record(job: SamplingJob, sampler: Sampler, topology: Topology, count: int, balanced: bool) -> dict:
    """What the images depend on."""
    return {
        "count": count,
        "seed": job.seed,
        "classes": "balanced: image i has class i % num_classes" if balanced else "random: drawn by (seed, i)",
        **dict(sorted(job.settings.items())),
        "dtype": job.dtype,
        "compile": job.compile,
        "device": topology.device.type,
        "tensor_ranks": topology.tensor_size,
        # Only where it moves the last bits of logits.
        "batch_size": sampler.batch_size if sampler.fills else None,
        "gpt": {"name": job.gpt.resolve().name, "sha256": checkpoint_hash(job.gpt)},
        "tokenizer": {"name": job.tokenizer.resolve().name, "sha256": checkpoint_hash(job.tokenizer)},
    }


def _pixels(images: Tensor) -> np.ndarray:
    return to_uint8(images).permute(0, 2, 3, 1).contiguous().numpy()
