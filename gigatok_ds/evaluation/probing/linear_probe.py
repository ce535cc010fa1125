"""Training and testing a linear probe, as the original does for its published accuracies.

Ranks share the images; features of a global batch are gathered, and every rank takes the same step with the same probe.
So the result does not depend on the number of ranks, and batch statistics are of the global batch.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.loader import ImageBatches
from gigatok_ds.data.prefetch import on_device
from gigatok_ds.data.reader import ReadingPlan
from gigatok_ds.data.transforms import scale_pixels
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.cropped import CroppedImages
from gigatok_ds.evaluation.probing.features import Features
from gigatok_ds.evaluation.probing.lars import LARS
from gigatok_ds.files import write_atomically
from gigatok_ds.models.initialisation import truncated_normal
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.streams import torch_stream
from gigatok_ds.untrusted import reading

STATE = "probe.safetensors"


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """The learning rate is base_lr x batch_size / 256, linear from 0 over warmup_epochs, then half a cosine to 0."""

    classes: int = 0  # 0: as many as the training data have
    epochs: int = 90
    warmup_epochs: int = 10
    base_lr: float = 0.1
    batch_size: int = 1024  # of all ranks
    flip: bool = True
    orient: bool = False  # see decode_image
    seed: int = 0

    def check(self) -> None:
        """Raises InputError for settings that cannot be meant."""
        if self.epochs < 1 or not 0 <= self.warmup_epochs < self.epochs:
            raise InputError(
                f"epochs are {self.epochs}, warm-up epochs {self.warmup_epochs}; there must be at least one "
                "epoch, and one after the warm-up"
            )
        if self.batch_size < 2 or not self.base_lr > 0:
            raise InputError(
                f"the batch size is {self.batch_size}, the base learning rate {self.base_lr}; they must be "
                "at least 2 and positive"
            )

    def lr(self, epoch: float) -> float:
        """The learning rate at a fractional epoch."""
        peak = self.base_lr * self.batch_size / 256
        if epoch < self.warmup_epochs:
            return peak * epoch / self.warmup_epochs
        return peak * 0.5 * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)))


class Probe(nn.Sequential):
    """Batch normalisation without weights, and a linear layer: features (B, width) to logits (B, classes)."""

    def __init__(self, width: int, settings: ProbeSettings):
        linear = nn.Linear(width, settings.classes)
        super().__init__(nn.BatchNorm1d(width, eps=1e-6, momentum=0.1, affine=False), linear)
        stream = torch_stream(settings.seed, "linear probe")
        with torch.no_grad():
            truncated_normal(0.01)(linear.weight, stream)
            linear.bias.uniform_(-(width**-0.5), width**-0.5, generator=stream)


class ProbeRun:
    """A probe in training; its state is kept in `folder`, from where an interrupted training goes on."""

    def __init__(self, features: Features, train: ShardIndex, settings: ProbeSettings, topology: Topology, folder: Path,
                 *, identity: dict, workers: int = 0):
        """identity: what tells the models and data from any others. Raises InputError for wrong settings, labels beyond
        the classes, and a state of another probe in `folder`."""
        settings.check()
        train.check_labels(settings.classes)
        if not settings.batch_size % topology.world_size == 0:
            raise InputError(f"the batch size is {settings.batch_size}, which {topology.world_size} ranks cannot share "
                             "equally")
        if len(train) < settings.batch_size:
            raise InputError(f"the batch size is {settings.batch_size}, but there are {len(train)} training images; "
                             "choose at most so many")
        self.features, self.train_index, self.settings, self.topology = features, train, settings, topology
        self.file, self.workers = folder / STATE, workers
        self.record = json.dumps({**identity, **features.describe(), **asdict(settings)}, sort_keys=True)
        self.probe = Probe(features.width, settings).to(topology.device)
        self.optimizer = LARS(self.probe.parameters(), lr=0.0)
        self.steps_per_epoch = len(train) // settings.batch_size
        self.steps = settings.epochs * self.steps_per_epoch
        self.step = self._resume()

    def run(self, *, save_every: int = 5) -> float | None:
        """Train to the end, saving every so many epochs; returns the last step's loss, None if nothing was left to do.
        """
        loss, batches = None, self._batches()
        progress = tqdm(total=self.steps, initial=self.step, desc="probe", unit="step",
                        disable=None if self.topology.is_first else True)
        self.probe.train()
        for batch in on_device(batches, ("images", "labels"), self.topology.device):
            own = self.features(batch["images"], batch["position"])
            features = self.topology.gather_data(own)
            labels = self.topology.gather_data(batch["labels"].to(own.device))
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.lr(self.step / self.steps_per_epoch)
            loss = F.cross_entropy(self.probe(features), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            progress.update()
            if self.step % (save_every * self.steps_per_epoch) == 0 or self.step == self.steps:
                self._save()
        progress.close()
        return None if loss is None else loss.item()

    @torch.no_grad()
    def accuracy(self, images: CroppedImages, batch_size: int) -> float:
        """Fraction of center-cropped images whose likeliest class is their label; collective, each counts once."""
        self.probe.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.topology.device)
        for batch in tqdm(images.batches(self.topology, batch_size, workers=self.workers), desc="probe test",
                          unit="batch", disable=None if self.topology.is_first else True):
            pixels = scale_pixels(batch["pixels"].to(self.topology.device))
            right += (self.probe(self.features(pixels)).argmax(dim=1).cpu() == batch["labels"]).sum().to(right.device)
        return int(self.topology.sum_over_ranks(right)) / len(images)

    def _batches(self) -> ImageBatches:
        settings, topology = self.settings, self.topology
        plan = ReadingPlan(global_batch_size=settings.batch_size, share=topology.image_share, start_step=self.step,
                           micro_batch_size=settings.batch_size // topology.world_size, stop_step=self.steps)
        return ImageBatches(
            self.train_index, training_transform(
                self.features.tokenizer.config.image_size, flip=settings.flip, orient=settings.orient), plan,
            num_classes=settings.classes, as_bytes=True, seed=settings.seed, workers=self.workers,
            pin_memory=topology.device.type == "cuda")

    def _save(self) -> None:
        if self.topology.is_first:
            momenta = {f"momentum.{name}": self.optimizer.state[parameter]["momentum"]
                       for name, parameter in self.probe.named_parameters()}
            tensors = {name: value.cpu() for name, value in (self.probe.state_dict() | momenta).items()}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, save(tensors, {"step": str(self.step), "settings": self.record}))
        self.topology.barrier()

    def _resume(self) -> int:
        state, metadata = self.topology.from_first(self._read() if self.topology.is_first else None)
        if state is None:
            return 0
        if metadata.get("settings") != self.record:
            raise InputError(f"{self.file} is the state of another probe (other models, data or settings); choose "
                             "another --out")
        device = self.topology.device
        self.probe.load_state_dict({name: state[name].to(device) for name in self.probe.state_dict()})
        for name, parameter in self.probe.named_parameters():
            self.optimizer.state[parameter]["momentum"] = state[f"momentum.{name}"].to(device)
        return int(metadata["step"])

    def _read(self) -> tuple[dict[str, Tensor] | None, dict]:
        if not self.file.is_file():
            return None, {}
        with reading(self.file, "remove it to start the probe anew"), safe_open(self.file, "pt") as file:
            metadata = file.metadata() or {}
            int(metadata.get("step", ""))
            return {name: file.get_tensor(name) for name in sorted(file.keys())}, metadata
