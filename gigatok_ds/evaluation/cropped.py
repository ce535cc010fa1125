"""Real images for evaluation, center-cropped to a model's size: of shards, or of a directory of image files."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from gigatok_ds.data.folder import ImageFolder, scan_image_folder
from gigatok_ds.data.loader import BatchLoader, image_name
from gigatok_ds.data.transforms import center_crop, decode_image, pixels_of
from gigatok_ds.errors import InputError
from gigatok_ds.file_kinds import is_tar
from gigatok_ds.files import sha256
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.shards.class_labels import numbering, renumbered
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.remote import open_shards
from gigatok_ds.shards.shard_cache import ShardCache


class CroppedImages(Dataset):
    """Items: `pixels` uint8 (3, S, S), `labels` (the class number) and `number`, the place in this set.

    location: shards (a directory or URL), or a directory of JPEG and PNG files, a sub-directory for each class. orient:
    see `decode_image`. cache: of copies of remote shards, the default one if None. Raises InputError when there are no
    images, and for one that cannot be decoded: leaving it out would falsify figures.
    """

    def __init__(self, location: str | Path, size: int, *, orient: bool = False,
                 cache: ShardCache | None = None):
        self.location, self.size, self.orient = location, size, orient
        self.source: ImageFolder | ShardIndex
        if Path(location).is_dir() and not any(map(is_tar, os.listdir(location))):
            self.source = scan_image_folder(location, mixed=True)
        else:
            self.source = open_shards(location, cache=cache)

    def number_as(self, classes: Sequence[str], source: str | Path) -> None:
        """Give labels the numbers that the same class names have in `classes`, those of `source`.

        Raises InputError for a class that is not among them, and for images without classes.
        """
        self.check_classes()
        if isinstance(self.source, ShardIndex):
            return self.source.number_as(classes, source)
        folder = self.source
        position = numbering(set(folder.labels), folder.classes, classes, self.location, source)
        labels = renumbered(np.array(folder.labels), position)
        self.source = dataclasses.replace(folder, labels=labels.tolist(), classes=list(classes) or folder.classes)
        return None

    def check_classes(self) -> None:
        """InputError unless all images have classes: those of a directory without sub-directories have none."""
        if isinstance(self.source, ShardIndex):
            self.source.check_labelled(every=True)
        if isinstance(self.source, ImageFolder) and self.source.flat:
            raise InputError(f"{self.location} holds images without classes, which matter here; pack them with "
                             "gigatok-ds make-shards --labels FILE, or put the images of each class into a directory "
                             "of its own")

    def __len__(self) -> int:
        return len(self.source if isinstance(self.source, ShardIndex) else self.source.paths)

    def __getitem__(self, number: int) -> dict:
        if isinstance(self.source, ShardIndex):
            data, name, label = self.source.read(number), image_name(self.source, number), self.source.label(number)
        else:
            path = self.source.paths[number]
            data, name, label = path.read_bytes(), str(path), self.source.labels[number]
        image = decode_image(data, name, orient=self.orient)
        return {"pixels": pixels_of(center_crop(image, self.size)), "labels": label, "number": number}

    def identity(self) -> str:
        """SHA-256 that tells these images from any others."""
        if isinstance(self.source, ShardIndex):
            return self.source.identity()
        return hashlib.sha256("".join(sha256(path) for path in self.source.paths).encode()).hexdigest()

    def batches(self, topology: Topology, batch_size: int, *, workers: int = 0) -> BatchLoader:
        """This rank's batches: every batch-th of consecutive images, each image on one rank, and none twice."""
        starts = range(topology.rank * batch_size, len(self), topology.world_size * batch_size)
        numbers = [list(range(start, min(start + batch_size, len(self)))) for start in starts]
        return BatchLoader(self, numbers, workers=workers, pin_memory=topology.device.type == "cuda")

    def pixels(self, numbers: list[int]) -> torch.Tensor:
        """uint8 (B, 3, S, S) of single images."""
        return torch.stack([self[number]["pixels"] for number in numbers])
