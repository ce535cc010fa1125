"""Batches for training and evaluation: addresses from the reader, samples made by worker processes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from gigatok_ds.data.index import ShardIndex
from gigatok_ds.data.reader import GlobalBatches, MicroBatches, SampleAddress
from gigatok_ds.data.transforms import Transform, decode_image, evaluation_transform
from gigatok_ds.errors import InputError
from gigatok_ds.streams import numpy_stream, torch_stream

MAX_REPLACEMENTS = 16  # undecodable images in a row before the data as a whole is taken to be bad

Batch = dict[str, Tensor]

logger = logging.getLogger(__name__)


class _Checked(Dataset):
    """Hands an InputError over as a value: raised in a worker, it would arrive wrapped in a traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, address):
        try:
            return self.dataset[address]
        except InputError as error:
            return error


def _collate(items: list) -> Batch | InputError:
    return next((item for item in items if isinstance(item, InputError)), None) or default_collate(items)


class BatchLoader:
    """A torch DataLoader over `batch_sampler`; its length is the sampler's. Raises the samples' InputErrors.

    The loader's own random state is a private stream, so that reading leaves torch's global generator alone.
    """

    def __init__(self, dataset: Dataset, batch_sampler: Iterable[list], *, workers: int = 0,
                 pin_memory: bool = False):
        self.batch_sampler = batch_sampler
        self._loader = DataLoader(
            _Checked(dataset), batch_sampler=batch_sampler, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=pin_memory, collate_fn=_collate,
            generator=torch_stream(0, "data workers"))

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, InputError):
                # A fresh one: a frame that raises its own variable is a reference cycle, and worker processes
                # that are left to the garbage collector take seconds to end.
                raise InputError(str(batch))
            yield batch


class TrainingBatches(BatchLoader):
    """Micro batches of one data-parallel rank, without end, from global batch `start_step` (0-based) on.

    `dataset` maps a SampleAddress to a dictionary. `micro_steps` consecutive micro batches are the rank's
    share of one global batch. Order and content depend on neither `workers`, nor the layout, nor where the
    run resumed. Raises InputError when the batch size does not fit the number of samples or the layout.
    """

    def __init__(self, dataset: Dataset, count: int, *, global_batch_size: int, micro_batch_size: int,
                 seed: int, data_rank: int = 0, data_size: int = 1, start_step: int = 0, workers: int = 0,
                 shuffle: bool = True, pin_memory: bool = False):
        self.batches = GlobalBatches(count, global_batch_size, seed, shuffle)
        sampler = MicroBatches(self.batches, micro_batch_size, data_rank, data_size, start_step)
        self.micro_steps = sampler.micro_steps
        super().__init__(dataset, sampler, workers=workers, pin_memory=pin_memory)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, of global batch number `step`."""
        return self.batches.epoch_of(step)


def address_fields(address: SampleAddress) -> dict[str, int]:
    """What every training batch tells of where its samples come from."""
    return {"position": address.position, "epoch": address.epoch, "sample": address.sample}


def _decode(index: ShardIndex, sample: int, data: bytes) -> Image.Image:
    return decode_image(data, f"sample {index.key(sample)!r} of {index.location}")


class _AugmentedImages(Dataset):
    def __init__(self, index: ShardIndex, transform: Transform, seed: int):
        self.index = index
        self.transform = transform
        self.seed = seed

    def __getitem__(self, address: SampleAddress) -> dict:
        rng = numpy_stream(self.seed, "augment", address.epoch, address.sample)
        image, sample = self._decode_or_replace(address.sample)
        return {"images": self.transform(image, rng), "labels": self.index.label(sample),
                "replaced": sample != address.sample, **address_fields(address)}

    def _decode_or_replace(self, sample: int) -> tuple[Image.Image, int]:
        """The image or, if it cannot be decoded, the next one: a bad file must not end a long run."""
        for candidate in range(sample, sample + MAX_REPLACEMENTS):
            candidate %= len(self.index)
            data = self.index.read(candidate)
            try:
                return _decode(self.index, candidate, data), candidate
            except InputError as error:
                last = error
                logger.warning("%s; its neighbour takes its place", error)
        raise InputError(f"{last} ({MAX_REPLACEMENTS} samples in a row)")


class ImageBatches(TrainingBatches):
    """Augmented images: the augmentation of a sample in an epoch is a stream of (seed, epoch, sample).

    Yields `images` float32 (B, 3, S, S) in [-1, 1], `labels` int64 (B,), `position`, `epoch` and `sample`
    int64 (B,), and `replaced` bool (B,): undecodable images whose place the next sample in the data has
    taken. The keyword arguments are those of TrainingBatches. Raises InputError when a shard has changed
    since it was indexed.
    """

    def __init__(self, index: ShardIndex, transform: Transform, *, seed: int, **arguments):
        super().__init__(_AugmentedImages(index, transform, seed), len(index), seed=seed, **arguments)


class _EvaluationImages(Dataset):
    def __init__(self, index: ShardIndex, size: int, images: int):
        self.index, self.images = index, images
        self.transform = evaluation_transform(size)

    def __getitem__(self, position: int) -> dict:
        sample = min(position, self.images - 1) * len(self.index) // self.images
        image = _decode(self.index, sample, self.index.read(sample))
        return {"images": self.transform(image, None), "labels": self.index.label(sample), "sample": sample,
                "valid": position < self.images}


def evaluation_batches(index: ShardIndex, size: int, batch_size: int, data_rank: int = 0, data_size: int = 1,
                       *, images: int | None = None, workers: int = 0, pin_memory: bool = False) -> BatchLoader:
    """Center-cropped images in the order of the index; `len` is the number of batches, equal on all ranks.

    `images` takes so many of them, evenly spaced, since data is often sorted by class; None takes all. Batch b of rank
    r holds the taken images (b * data_size + r) * batch_size onwards. Yields `images` float32
    (batch_size, 3, size, size) in [-1, 1], `labels` and `sample` int64 (batch_size,), and `valid` bool
    (batch_size,), False for the copies of the last one that fill up the end. Raises InputError for an
    undecodable image: leaving it out would falsify the result.
    """
    images, per_round = len(index) if images is None else images, batch_size * data_size
    starts = range(data_rank * batch_size, -(-images // per_round) * per_round, per_round)
    positions = [list(range(start, start + batch_size)) for start in starts]
    return BatchLoader(_EvaluationImages(index, size, images), positions, workers=workers, pin_memory=pin_memory)
