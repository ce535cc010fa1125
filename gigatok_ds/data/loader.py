"""Batches for training and evaluation: addresses from the reader, samples made by worker processes."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from gigatok_ds.cluster.launched import launched_rank_or_alone
from gigatok_ds.cluster.share import WHOLE, Share
from gigatok_ds.compat import sockets_without_files
from gigatok_ds.cpu.malloc import keep_freed_memory
from gigatok_ds.data.bad_samples import BadSample, BadSamples
from gigatok_ds.data.mixture import MixedBatches, Mixture
from gigatok_ds.data.order import Locality
from gigatok_ds.data.pillow_warnings import say_pillows_once
from gigatok_ds.data.reader import GlobalBatches, MicroBatches, ReadingPlan, SampleAddress
from gigatok_ds.data.transforms import TrainingTransform, center_crop, decode_image, pixels_of, scale_pixels
from gigatok_ds.errors import InputError, MachineError
from gigatok_ds.shards.contents import TABLE_FILE
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.streams import numpy_stream, torch_stream

MAX_REPLACEMENTS = 16  # undecodable images in a row before the data as a whole is taken to be bad

_PICKLED = 4096  # bytes
_SHARED = "/dev/shm"
_HANDED_OVER = (InputError, MachineError)
_BAD = "bad"  # a batch's BadSamples, on their way from a worker

Batch = dict[str, Tensor]


class _Checked(Dataset):
    """Hands an error that is one line over as a value: raised in a worker, it would arrive wrapped in a traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, address):
        try:
            return self.dataset[address]
        except _HANDED_OVER as error:
            return error


def _collate(items: list) -> Batch | Exception:
    error = next((item for item in items if isinstance(item, _HANDED_OVER)), None)
    if error is not None:
        return error
    bad = [found for item in items for found in item.pop(_BAD, ())]
    batch = default_collate(items)
    # As arrays they are pickled; each tensor would travel in a file of its own, at the price of decoding an image.
    small = {name: value.numpy() for name, value in batch.items() if value.nbytes <= _PICKLED}
    return batch | small | ({_BAD: bad} if bad else {})


def _prepare_worker(worker: int) -> None:
    keep_freed_memory()
    sockets_without_files()
    said = threading.Event()
    if worker > 0 or not launched_rank_or_alone().is_first:
        said.set()  # by the first worker of the first rank
    say_pillows_once(said)


def _as_user_error(error: RuntimeError | OSError) -> Exception | None:
    """What to tell of an error of torch's loader; None of one that is not of its own making."""
    text = str(error)
    if any(words in text for words
           in ("shared memory", "Bus error", "unable to write to file </torch_", "unable to open shared")) or (
            isinstance(error, OSError) and error.errno == errno.ENOSPC):
        free = shutil.disk_usage(_SHARED).free if os.path.isdir(_SHARED) else 0
        return InputError(f"data workers hand batches over in {_SHARED}, which has no room for them ({free / 1e6:.1f} "
                          "MB are free); make it larger (docker run --shm-size=16g), or use fewer data.workers (0 "
                          "needs none)" + (f". Or a {TABLE_FILE} was replaced in place while it was used; then run the "
                                           "same command again" if "Bus error" in text else ""))
    if killed := re.search(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (is killed by signal: [\w ]+|exited "
                           r"unexpectedly)", text):
        return MachineError(f"{killed[0]}: somebody, or a lack of memory, has ended it; run the same command again, "
                            "perhaps with fewer data.workers")
    return None


class BatchLoader:
    """A torch DataLoader over `batch_sampler`; its length is the sampler's. Raises the samples' InputErrors and
    MachineErrors.

    The loader's own random state is a private stream, so that reading leaves torch's global generator alone.
    """

    def __init__(self, dataset: Dataset, batch_sampler: Iterable[Any], *, workers: int = 0,
                 pin_memory: bool = False):
        self.batch_sampler, self._pins = batch_sampler, pin_memory
        self._loader = DataLoader(
            _Checked(dataset), batch_sampler=batch_sampler, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=pin_memory, collate_fn=_collate,
            generator=torch_stream(0, "data workers"), worker_init_fn=_prepare_worker)

    def __len__(self) -> int:
        if not isinstance(self.batch_sampler, Sized):
            raise TypeError("these batches have no end")
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loaded():
            if isinstance(batch, _HANDED_OVER):
                # A fresh one: a frame that raises its own variable is a reference cycle, and worker processes
                # that are left to the garbage collector take seconds to end.
                raise (InputError if isinstance(batch, InputError) else MachineError)(str(batch))
            yield {name: self._tensor(value) if isinstance(value, np.ndarray) else value
                   for name, value in batch.items()}

    def _loaded(self) -> Iterator[Batch]:
        """The loader's batches. What torch says of workers that end, or of shared memory that does not suffice, is one
        line.
        """
        try:
            yield from self._loader
        except (RuntimeError, OSError) as error:
            known = _as_user_error(error)
            if known is None:
                raise
            raise known from None

    def _tensor(self, array: np.ndarray) -> Tensor:
        """torch's loader pins tensors only."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._pins else tensor


class TrainingBatches(BatchLoader):
    """The micro batches that a plan says, of `count` samples.

    `dataset` maps a SampleAddress to a dictionary. `micro_steps` consecutive micro batches are the reader's share of
    one global batch. Order and content depend on neither `workers`, nor the layout, nor where the run resumed. With a
    `mixture` samples of several sources come in its proportions. Raises InputError when the batch size does not fit the
    number of samples or the layout.
    """

    def __init__(self, dataset: Dataset, count: int, plan: ReadingPlan, *, seed: int, workers: int = 0,
                 locality: Locality | None = None, mixture: Mixture | None = None, pin_memory: bool = False):
        self.batches: GlobalBatches | MixedBatches = (
            GlobalBatches(count, plan.global_batch_size, seed, plan.shuffle, locality=locality) if mixture is None
            else MixedBatches(mixture, plan.global_batch_size, seed, plan.shuffle, locality))
        sampler = MicroBatches(self.batches, plan)
        self.micro_steps = sampler.micro_steps
        super().__init__(dataset, sampler, workers=workers, pin_memory=pin_memory)

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, of global batch number `step`."""
        return self.batches.epoch_of(step)


def address_fields(address: SampleAddress) -> dict[str, int]:
    """What every training batch tells of where its samples come from."""
    return {"position": address.position, "epoch": address.epoch, "sample": address.sample}


def image_name(index: ShardIndex, sample: int) -> str:
    """What messages call an image."""
    return f"sample {index.key(sample)!r} of {index.tars.name(index.place(sample)[0])}"


def as_floats(batch: Batch) -> Batch:
    """The batch with `images` as float32 (B, 3, S, S) in [-1, 1] instead of bytes."""
    return batch | {"images": scale_pixels(batch["images"])}


class _AugmentedImages(Dataset):
    def __init__(self, index: ShardIndex, transform: TrainingTransform, seed: int, num_classes: int | None,
                 read_ahead: bool):
        self.index, self.transform, self.seed, self.num_classes = index, transform, seed, num_classes
        self.read_ahead = read_ahead
        if num_classes is not None:
            index.check_labels(num_classes, max_bad_fraction=1.0)
            if index.next_labelled(-1, num_classes) is None:
                index.check_labels(num_classes)

    def __getitem__(self, address: SampleAddress) -> dict:
        """The sample or, if it cannot be used, the next one that can: a bad file must not end a long run."""
        bad: list[BadSample] = []
        if self.read_ahead:
            self.index.read_ahead(address.sample, address.epoch)
        sample = address.sample
        while len(bad) < MAX_REPLACEMENTS:
            data = self.index.read(sample)
            rng = numpy_stream(self.seed, "augment", address.epoch, address.sample)
            try:
                if self.num_classes is not None:
                    self.index.check_label(sample, self.num_classes)
                pixels = self.transform.decode(data, image_name(self.index, sample), rng)
            except InputError as error:
                bad.append(BadSample(sample, str(error)))
                sample = self._next(sample)
                continue
            return {"images": pixels, "labels": self.index.label(sample), "replaced": bool(bad), _BAD: bad,
                    **address_fields(address)}
        raise InputError(f"{bad[-1].reason} ({MAX_REPLACEMENTS} samples in a row, which is too many whatever "
                         "data.max_bad_fraction is; gigatok-ds check-shards lists them)")

    def _next(self, sample: int) -> int:
        """The following sample that has a label, if it needs one, in the order of the data and from its end to its
        beginning."""
        labelled = None if self.num_classes is None else self.index.next_labelled(sample, self.num_classes)
        return (sample + 1) % len(self.index) if labelled is None else labelled


class ImageBatches(TrainingBatches):
    """Augmented images: the augmentation of a sample in an epoch is a stream of (seed, epoch, sample).

    Yields `images` float32 (B, 3, S, S) in [-1, 1] or, with `as_bytes`, uint8 of that shape, which `on_device` makes
    floats of; `labels` int64 (B,), `position`, `epoch` and `sample` int64 (B,), and `replaced` bool (B,): samples whose
    place the next one in the data has taken, because they cannot be decoded or, with `num_classes`, have no label.
    `max_bad_fraction` of the reader's samples may be so. With `shuffle_shards` each tar is read ahead as a whole.
    `loading` are the mixture of TrainingBatches, and the workers and pin_memory of BatchLoader. Raises InputError when
    too many samples are bad, when one has a label that is not below `num_classes`, and when a shard has changed since
    it was indexed.
    """

    def __init__(self, index: ShardIndex, transform: TrainingTransform, plan: ReadingPlan, *, seed: int,
                 num_classes: int | None = None, max_bad_fraction: float | None = None,
                 shuffle_shards: int | None = None, as_bytes: bool = False, **loading: Any):
        self.as_bytes = as_bytes
        self.bad_samples = BadSamples(index, max_bad_fraction, len(index) / plan.share.size)
        dataset = _AugmentedImages(index, transform, seed, num_classes, read_ahead=shuffle_shards is not None)
        super().__init__(dataset, len(index), plan, seed=seed, **loading,
                         locality=None if shuffle_shards is None else Locality(index.table.counts, shuffle_shards))

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            self.bad_samples.add(batch.pop(_BAD, ()), len(batch["replaced"]), int(batch["replaced"].sum()))
            yield batch if self.as_bytes else as_floats(batch)


class _EvaluationImages(Dataset):
    def __init__(self, index: ShardIndex, size: int, images: int, orient: bool):
        self.index, self.size, self.images, self.orient = index, size, images, orient

    def __getitem__(self, position: int) -> dict:
        sample = min(position, self.images - 1) * len(self.index) // self.images
        image = decode_image(self.index.read(sample), image_name(self.index, sample), orient=self.orient)
        return {"images": pixels_of(center_crop(image, self.size)), "labels": self.index.label(sample),
                "sample": sample, "valid": position < self.images}


class _FloatImages(BatchLoader):
    def __iter__(self) -> Iterator[Batch]:
        return map(as_floats, super().__iter__())


def evaluation_batches(index: ShardIndex, size: int, batch_size: int, share: Share = WHOLE, *,
                       images: int | None = None, orient: bool = False, as_bytes: bool = False,
                       **loading: Any) -> BatchLoader:
    """Center-cropped images in the order of the index; `len` is the number of batches, equal for all shares.

    `images` takes so many of them, evenly spaced, since data is often sorted by class; None takes all. Batch b of rank
    r holds the taken images (b * share.size + r) * batch_size onwards. Yields `images` float32
    (batch_size, 3, size, size) in [-1, 1] or, with `as_bytes`, uint8, which `on_device` makes floats of; `labels` and
    `sample` int64 (batch_size,); and `valid` bool (batch_size,), False for the copies of the last one that fill up the
    end, behind all others. orient: see `decode_image`. `loading` are the workers and pin_memory of BatchLoader. Raises
    InputError for an undecodable image: leaving it out would falsify the result.
    """
    images, per_round = len(index) if images is None else images, batch_size * share.size
    starts = range(share.rank * batch_size, -(-images // per_round) * per_round, per_round)
    positions = [range(start, start + batch_size) for start in starts]
    kind = BatchLoader if as_bytes else _FloatImages
    return kind(_EvaluationImages(index, size, images, orient), positions, **loading)
