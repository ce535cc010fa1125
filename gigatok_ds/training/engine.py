"""The only place that calls DeepSpeed: build an engine, step it, save it, load it, read its weights back."""

from __future__ import annotations

import contextlib
import copy
import io
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

# DeepSpeed reads both while it is imported.
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from gigatok_ds.config.recipe import OptimizerConfig
from gigatok_ds.errors import InputError
from gigatok_ds.models.initialisation import initialise_

_TAG = "state"  # DeepSpeed wants a tag below the directory; the directory itself names the step


class Engine:
    """One network under DeepSpeed, with AdamW whose learning rate the caller sets at every step."""

    def __init__(self, build: Callable[[], nn.Module], optimizer: OptimizerConfig, settings: dict, *,
                 seed: int | None = None):
        """settings are resolved DeepSpeed settings.

        With a seed, `build` leaves the initial weights to us: at stage 3 it runs under `zero.Init`, and no rank ever
        holds the whole network. Without one, `build` returns an initialised network, which should be small.
        """
        _prepare()
        settings = copy.deepcopy(settings)
        settings["gradient_clipping"] = optimizer.max_grad_norm
        self.stage = settings.get("zero_optimization", {}).get("stage", 0)
        with deepspeed.zero.Init(config_dict_or_path=settings, enabled=self.stage == 3 and seed is not None):
            network = build()
        if seed is not None:
            initialise_(network, seed, whole=partial(deepspeed.zero.GatheredParameters, modifier_rank=0))
        groups = parameter_groups(network, optimizer)
        adamw = torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps)
        self._engine, *_ = deepspeed.initialize(model=network, optimizer=adamw, config=settings)

    @property
    def network(self) -> nn.Module:
        """The bare network: evaluation, and passes whose gradient is not this engine's business."""
        return self._engine.module

    def __call__(self, *inputs, **options):
        return self._engine(*inputs, **options)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, lr: float) -> None:
        """Count one micro batch; at the end of an accumulation, clip and update with this learning rate."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()

    def gradient_norm(self) -> float | None:
        """Global gradient norm of the last update before clipping; None where DeepSpeed does not compute it."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        """Write this engine's sharded state below `folder`. Collective: every rank calls it."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote. Collective. Raises InputError when the state does not fit."""
        with _plain_data_only():
            try:
                loaded, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
            except (RuntimeError, AssertionError, KeyError) as error:
                raise InputError(f"{folder} does not fit this run: {str(error).splitlines()[0]}") from error
        if loaded is None:
            raise InputError(f"{folder} holds no training state")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The full float32 state_dict of an engine that was saved below `folder`, merged over its data ranks."""
    state = folder / _TAG
    with _plain_data_only():
        if any(state.glob("*optim_states.pt")):
            with contextlib.redirect_stdout(io.StringIO()):  # it reports every file it opens
                return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=_TAG)
        return torch.load(state / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)["module"]


def parameter_groups(network: nn.Module, optimizer: OptimizerConfig) -> list[dict]:
    """AdamW's groups: weight decay on everything, or only on tensors with two or more dimensions."""
    decayed, plain = [], []
    for parameter in network.parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 the parameter itself is an empty shell.
            dims = len(getattr(parameter, "ds_shape", parameter.shape))
            (decayed if optimizer.decay == "everything" or dims >= 2 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _prepare() -> None:
    # DeepSpeed would compile a shared-memory all-reduce that only inference uses, and fail without ninja.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


@contextlib.contextmanager
def _plain_data_only() -> Iterator[None]:
    """Make DeepSpeed's own `torch.load` calls refuse anything that could execute code."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]):
            yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
