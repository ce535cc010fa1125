"""What a training run is: the model, its losses, its optimization, its data. One small dataclass per concern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Literal

from gigatok_ds.config.checkpoint import CheckpointConfig
from gigatok_ds.config.faults import FaultConfig
from gigatok_ds.config.location import check_cache
from gigatok_ds.config.lora import LoRAConfig, check_lora
from gigatok_ds.config.losses import TokenizerLossConfig
from gigatok_ds.config.model import GPTConfig, TokenizerConfig, at_least, probability
from gigatok_ds.config.monitor import MonitorConfig, TokenizerMonitorConfig
from gigatok_ds.config.optimizer import OptimizerConfig, check_muon, check_rates
from gigatok_ds.config.sources import Locations, check_sources_of, locations_of
from gigatok_ds.config.validation import ValidationConfig
from gigatok_ds.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over steps; see training.schedules for the formulas."""

    kind: Literal["cosine_v2", "cosine", "const", "wsd"] = "cosine_v2"
    warmup_steps: int = 0
    end_lr: float = 1e-5
    decay_fraction: float = 0.2
    decay_shape: Literal["sqrt", "linear", "cosine", "square"] = "sqrt"

    def __post_init__(self) -> None:
        at_least(0, "schedule", warmup_steps=self.warmup_steps, end_lr=self.end_lr)
        if not 0 <= self.decay_fraction <= 1:
            raise InputError(f"schedule.decay_fraction is {self.decay_fraction}; it must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The loop: how long, how large a batch, in which precision, and how often it reports.

    `micro_batch_size` null puts the whole share of a data-parallel rank in one micro batch. `ema_decay` (the
    original's:
    0.9999; null: none) keeps a moving average of the trained model's weights, which is what is exported then. `compile`
    compiles transformer layers and residual blocks by torch.compile, in that mode of it; "auto" is its default mode on
    GPUs and nothing on CPUs. `freeze` names parts of the model that stay as they are, and `lora` (null: none) puts
    adapters into a trained GPT (docs/training.md).
    """

    steps: int
    global_batch_size: int
    micro_batch_size: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile: Literal["auto", "none", "default", "max-autotune-no-cudagraphs"] = "auto"
    seed: int = 0
    ema_decay: float | None = None
    freeze: tuple[str, ...] = ()
    lora: LoRAConfig | None = None
    log_every: int = 100
    validate_every: int = 5000

    def __post_init__(self) -> None:
        at_least(1, "training", steps=self.steps, global_batch_size=self.global_batch_size,
                 micro_batch_size=self.micro_batch_size, log_every=self.log_every, validate_every=self.validate_every)
        if self.ema_decay is not None:
            probability("training", ema_decay=self.ema_decay)


@dataclass(frozen=True, kw_only=True)
class ImageReadingConfig:
    """How training images are read.

    `decoding` "exact" gives the original's pixels, "fast" nearly the same ones in less time; with `orient` images are
    what a viewer shows, turned as their EXIF data say and with transparency over white (docs/data.md). With
    `shuffle_shards` n an epoch takes the tars in a random order and mixes the samples of n at a time, so that storage
    reads whole tars; null mixes all of the data. Samples that cannot be used are replaced; if they are more than
    `max_bad_fraction` of the samples, the run ends.
    """

    decoding: Literal["exact", "fast"] = "exact"
    orient: bool = False
    shuffle_shards: int | None = None
    max_bad_fraction: float = 0.001

    def __post_init__(self) -> None:
        at_least(1, "data", shuffle_shards=self.shuffle_shards)
        if not 0 <= self.max_bad_fraction <= 1:
            raise InputError(f"data.max_bad_fraction is {self.max_bad_fraction}; it must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class ImageDataConfig(ImageReadingConfig):
    """Image shards (directories, URLs or commands that WebDataset tars come from) and the training augmentation.

    `cache` is the directory of each host for copies of remote tars (null: one in the user's cache directory), and
    `cache_gb` bounds its size in 10^9 bytes (null: without bounds). What cannot be read, for a reason that may pass, is
    tried again for `patience` minutes. `train` may be a list of places with weights, whose samples are mixed, and
    `validation` one of places with names, which are measured one by one (docs/data.md).
    """

    train: Locations = None
    validation: Locations = None
    cache: str | None = None
    cache_gb: float | None = None
    patience: float = 10.0
    workers: int = 8
    crop_scale: tuple[float, float] = (0.8, 1.0)
    flip: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, "data", workers=self.workers, patience=self.patience)
        _check_places(self)
        check_cache(self.cache, self.cache_gb, train=locations_of(self.train), validation=locations_of(self.validation))
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise InputError(f"data.crop_scale is {self.crop_scale}; it must be 0 < low <= high <= 1")


@dataclass(frozen=True, kw_only=True)
class CodeDataConfig(ImageReadingConfig):
    """Code shards written by `gigatok-ds extract-codes` or, with `tokenizer`, image shards.

    `tokenizer` is a standalone tokenizer's directory: frozen and in float32, it makes the codes of training images when
    they are needed, each time of another crop, mirrored half the time. `second` is a directory of code shards of the
    same images under other augmentations: each access takes it instead of `train` with probability 0.5 (the original's
    mixture of two ten-crops). `train`, `validation`, `cache`, `cache_gb` and `patience` are those of image shards; how
    images are read is for `tokenizer` only.
    """

    train: Locations = None
    validation: Locations = None
    tokenizer: str | None = None
    second: str | None = None
    cache: str | None = None
    cache_gb: float | None = None
    patience: float = 10.0
    workers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, "data", workers=self.workers, patience=self.patience)
        for setting in fields(ImageReadingConfig):
            value = getattr(self, setting.name)
            if self.tokenizer is None and value != setting.default:
                raise InputError(
                    f"data.{setting.name} is {value}, but without data.tokenizer there are no images to read; "
                    "leave it out, or set data.tokenizer"
                )
        if self.tokenizer is not None and self.second is not None:
            raise InputError("data.second is set, but with data.tokenizer there are no code shards to mix; set one of "
                             "them to null")
        _check_places(self)
        if self.second is not None and not isinstance(self.train, str | None):
            raise InputError("data.second is set, but data.train is a mixture already; set data.second to null")
        second = {} if self.second is None else {"second": [self.second]}
        check_cache(self.cache, self.cache_gb, train=locations_of(self.train),
                    validation=locations_of(self.validation), **second)


def _check_places(data: ImageDataConfig | CodeDataConfig) -> None:
    check_sources_of("data.train", data.train)
    check_sources_of("data.validation", data.validation)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over ranks and what it keeps in memory; none of it changes what is computed.

    `tensor` ranks of one host share each layer of the transformers (1: none do), with `sequence` also their
    activations between attention and MLP. `recompute_every` n keeps no activations inside every n-th transformer block
    and computes them again in the backward pass (activation checkpointing; 0: none, 1: all blocks).
    """

    tensor: int = 1
    sequence: bool = False
    recompute_every: int = 0

    def __post_init__(self) -> None:
        at_least(1, "parallel", tensor=self.tensor)
        at_least(0, "parallel", recompute_every=self.recompute_every)
        if self.sequence and self.tensor == 1:
            raise InputError("parallel.sequence is true, but it does nothing with parallel.tensor 1; set that above 1")


@dataclass(frozen=True, kw_only=True)
class TokenizerParallelConfig(ParallelConfig):
    """`recompute_cnn` does for the residual blocks of the CNN what `recompute_every` does for the transformers."""

    recompute_cnn: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    kind: Literal["tokenizer"]
    name: str
    model: TokenizerConfig
    loss: TokenizerLossConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = ScheduleConfig()
    data: ImageDataConfig = field(default_factory=ImageDataConfig)
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: TokenizerParallelConfig = TokenizerParallelConfig()
    validation: ValidationConfig = ValidationConfig()
    monitor: TokenizerMonitorConfig = TokenizerMonitorConfig()
    faults: FaultConfig = FaultConfig()

    def __post_init__(self) -> None:
        model, tensor = self.model, self.parallel.tensor
        _validates_what_it_judges(self.training, self.checkpoint)
        for network, size in (("encoder", model.encoder_size), ("decoder", model.decoder_size)):
            _divides(tensor, f"the {network}'s attention heads", size.heads)
        check_freeze(self.training.freeze, model.parts)
        if self.training.lora:
            raise InputError("training.lora adapts GPTs, but this recipe is of a tokenizer; leave it out, or name "
                             "parts that stay as they are in training.freeze")
        check_rates(self.optimizer, model.parts, self.training.freeze, model.before_last_layer)
        check_muon(self.optimizer, self.training.precision, ("encoder", "decoder"), self.training.freeze)
        if self.loss.adversarial and self.loss.adversarial.adaptive_weight and "cnn_decoder" in self.training.freeze:
            raise InputError("training.freeze has cnn_decoder, whose last layer loss.adversarial.adaptive_weight "
                             "compares gradients at; leave it out, or set adaptive_weight to false")
        if self.parallel.sequence:
            _divides(tensor, "model.latent_tokens", model.latent_tokens)
            _divides(tensor, "the cells of the feature map", model.grid**2)
        if (self.loss.semantic is None) != (self.model.semantic_head is None):
            raise InputError("loss.semantic and model.semantic_head go together: set both, or set both to null")
        fid_every, every = self.validation.fid_every, self.training.validate_every
        if fid_every is not None and fid_every % every:
            raise InputError(f"validation.fid_every is {fid_every}; it must be a multiple of training.validate_every, "
                             f"which is {every}")
        judge, side = self.loss.adversarial and self.loss.adversarial.discriminator, model.image_size
        if judge == "stylegan" and (side < 32 or side & (side - 1)):
            raise InputError("loss.adversarial.discriminator stylegan judges images whose side is a power of two from "
                             f"32 on, but model.image_size is {side}; change it, or use patchgan")


@dataclass(frozen=True, kw_only=True)
class GPTRecipe:
    kind: Literal["gpt"]
    name: str
    model: GPTConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = field(
        default_factory=partial(OptimizerConfig, weight_decay=0.05, decay="matrices", max_grad_norm=1.0))
    schedule: ScheduleConfig = ScheduleConfig(kind="wsd")
    data: CodeDataConfig = field(default_factory=CodeDataConfig)
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    monitor: MonitorConfig = MonitorConfig()
    faults: FaultConfig = FaultConfig()

    def __post_init__(self) -> None:
        model, tensor = self.model, self.parallel.tensor
        _validates_what_it_judges(self.training, self.checkpoint)
        check_freeze(self.training.freeze, model.parts)
        if self.training.lora:
            check_lora(self.training.lora, model, self.training.freeze)
        check_rates(self.optimizer, model.parts, self._still, model.before_last_layer)
        check_muon(self.optimizer, self.training.precision, ("layers",), self.training.freeze,
                   adapters=self.training.lora is not None)
        _divides(tensor, "the attention heads", model.transformer.heads)
        _divides(tensor, "the MLP's width", model.ffn_width)
        _divides(tensor, "model.vocab_size", model.vocab_size)
        if self.parallel.sequence:
            _divides(tensor, "model.sequence_length", model.sequence_length)

    @property
    def _still(self) -> tuple[str, ...]:
        """Parts in which nothing is trained, adapters included."""
        lora = self.training.lora
        return tuple(part for part in self.model.parts if part not in ("layers", *lora.train)) if lora else (
            self.training.freeze)


def _validates_what_it_judges(training: TrainingConfig, checkpoint: CheckpointConfig) -> None:
    if checkpoint.keep_best and checkpoint.every % training.validate_every:
        raise InputError(f"checkpoint.every is {checkpoint.every}; with checkpoint.keep_best it must be a multiple of "
                         f"training.validate_every, which is {training.validate_every}")


def check_freeze(freeze: Sequence[str], parts: Sequence[str]) -> None:
    """InputError for a part that the model does not have, and when nothing would be trained."""
    for name in freeze:
        if name not in parts:
            raise InputError(f"training.freeze has {name!r}; parts of this model are {', '.join(parts)}")
    if set(freeze) == set(parts):
        raise InputError("training.freeze has all parts of the model, so there is nothing to train; leave some out")


def _divides(tensor: int, what: str, value: int) -> None:
    if value % tensor:
        raise InputError(f"parallel.tensor is {tensor}, but {what} ({value}) cannot be cut into as many equal parts")


Recipe = TokenizerRecipe | GPTRecipe
