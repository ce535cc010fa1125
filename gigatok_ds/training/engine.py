"""The only place that calls DeepSpeed: build an engine, step it, save it, load it, read its weights back."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import tempfile
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
from deepspeed.utils import set_z3_leaf_module
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from gigatok_ds.config.recipe import OptimizerConfig
from gigatok_ds.errors import InputError
from gigatok_ds.freed_memory import keep_freed_memory
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.parallel.consistency import check_spread, global_gradient_norm
from gigatok_ds.parallel.dropout import name_dropouts
from gigatok_ds.parallel.partial import sum_partial_gradients
from gigatok_ds.parallel.sharding import declared_shards
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.training.ema import Fragment, ShardedEMA

_TAG = "state"  # DeepSpeed wants a tag below the directory; the directory itself names the step
_TENSOR_RANK = re.compile(r"mp_rank_\d+_")


class Engine:
    """One network under DeepSpeed, with an optimizer whose learning rate the caller sets at every step."""

    def __init__(self, build: Callable[[], nn.Module], optimizer: OptimizerConfig, settings: dict, *,
                 topology: Topology, seed: int | None = None,
                 compile: Callable[[nn.Module], list[nn.Module]] | None = None,
                 recompute: Callable[[nn.Module], object] | None = None, ema_decay: float | None = None):
        """settings are resolved DeepSpeed settings.

        With a seed, `build` leaves the initial weights to us: at stage 3 it runs under `zero.Init`, and no rank ever
        holds the whole network. Without one, `build` returns an initialised network, which should be small.
        `compile` compiles parts of the network and returns them; `recompute` switches activation checkpointing on. With
        `ema_decay` a moving average of the weights is kept and saved, spread over the data ranks.
        """
        _prepare()
        settings = copy.deepcopy(settings)
        settings["gradient_clipping"] = optimizer.max_grad_norm
        self.stage = settings.get("zero_optimization", {}).get("stage", 0)
        # With tensor ranks, zero.Init needs all of this to partition over the data group; it would not complain.
        with deepspeed.zero.Init(config_dict_or_path=settings, mpu=topology.mpu,
                                 data_parallel_group=topology.data_group if topology.mpu else None,
                                 enabled=self.stage == 3 and seed is not None):
            network = build()
        # A rank within the data group, unlike DeepSpeed's other ranks.
        whole = partial(deepspeed.zero.GatheredParameters, modifier_rank=0)
        if seed is not None:
            initialise_(network, seed, whole=whole, tensor_rank=topology.tensor_rank, tensor_size=topology.tensor_size)
        name_dropouts(network)
        for part in compile(network) if compile else ():
            # ZeRO-3 gathers all of its parameters outside: hooks inside would tear the compiled code apart.
            set_z3_leaf_module(part, True)
        if recompute:
            recompute(network)
        if topology.mpu:
            sum_partial_gradients(network, topology.tensor_group)
        adam = build_optimizer(network, optimizer)
        self._engine, *_ = deepspeed.initialize(model=network, optimizer=adam, config=settings, mpu=topology.mpu)
        self._topology = topology
        # At stage 0 in fp32 DeepSpeed clips by the norm but does not tell it.
        self._tells_norm = self.stage > 0 or settings["bf16"]["enabled"] or settings["fp16"]["enabled"]
        self._norm: float | None = None
        check_spread(network, topology, deepspeed.zero.GatheredParameters)
        self.ema = None if ema_decay is None else ShardedEMA(ema_decay, self._master_fragments)

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
        updates = self._engine.is_gradient_accumulation_boundary()
        if updates and not self._tells_norm:
            self._norm = global_gradient_norm(self.network, self._topology)
        self._engine.step()
        if updates and self.ema:
            self.ema.update()

    def gradient_norm(self) -> float | None:
        """Global gradient norm of the last update before clipping; None before the first."""
        norm = self._engine.get_global_grad_norm() if self._tells_norm else self._norm
        return None if norm is None else float(norm)

    def save(self, folder: Path) -> None:
        """Write this engine's sharded state below `folder`. Collective: every rank calls it."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        if self.ema:
            self.ema.save(folder, self._topology)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote. Collective. Raises InputError when the state does not fit."""
        with _plain_data_only():
            try:
                loaded, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
            except (RuntimeError, AssertionError, KeyError) as error:
                raise InputError(f"{folder} does not fit this run: {str(error).splitlines()[0]}") from error
        if loaded is None:
            raise InputError(f"{folder} holds no training state")
        if self.ema:
            self.ema.load(folder, self._topology)

    def _master_fragments(self) -> dict[str, Fragment]:
        """This data rank's part of each trained parameter in float32, by name: views of what the optimizer updates."""
        optimizer, topology = self._engine.optimizer, self._topology
        masters = {id(half): full for halves, fulls in zip(getattr(optimizer, "fp16_groups", []),
                                                           getattr(optimizer, "fp32_groups", []))
                   for half, full in zip(halves, fulls)}
        found = {}
        for name, parameter in self.network.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.stage == 3:
                group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = topology.data_rank * size
                size = min(size, parameter.ds_numel - start)  # what is beyond pads the last ranks' partitions
                part = optimizer.fp32_partitioned_groups_flat[group].narrow(0, offset, max(size, 0))
            elif self.stage > 0:
                mapping = parameter._hp_mapping  # None: no element of it is on this rank
                start, part = (mapping.lp_fragment_address.start, mapping.hp_fragment) if mapping else (0, parameter[:0])
            else:
                whole = masters.get(id(parameter), parameter).detach().reshape(-1)
                size = -(-whole.numel() // topology.data_size)
                start = topology.data_rank * size
                part = whole[start : start + size]
            if part.numel():
                found[name] = Fragment(start, part)
        return found


def read_weights(folder: Path, network: nn.Module) -> dict[str, Tensor]:
    """The full float32 state_dict of an engine that was saved below `folder`, merged over its ranks.

    `network` is one like the engine's, of any layout and on any device: its layers say how parameters are cut.
    """
    files = sorted(path.name for path in (folder / _TAG).glob("*.pt"))
    tensor_ranks = sorted({match[0] for name in files if (match := _TENSOR_RANK.search(name))})
    parts = [_read_tensor_rank(folder, rank, files) for rank in tensor_ranks]
    shards = declared_shards(network)
    return {name: shards[name].join([part[name] for part in parts]) if name in shards else value
            for name, value in parts[0].items()}


def _read_tensor_rank(folder: Path, tensor_rank: str, files: list[str]) -> dict[str, Tensor]:
    """What one tensor rank holds, merged over its data ranks.

    DeepSpeed's own merging takes the files of all tensor ranks for data ranks of one: it is shown those of one only.
    """
    first = "mp_rank_00_"
    with tempfile.TemporaryDirectory() as view, _plain_data_only():
        (Path(view) / _TAG).mkdir()
        for name in files:
            if tensor_rank in name:
                (Path(view) / _TAG / name.replace(tensor_rank, first)).symlink_to((folder / _TAG / name).resolve())
        if any("optim_states" in name for name in files):
            with contextlib.redirect_stdout(io.StringIO()):  # it reports every file it opens
                return get_fp32_state_dict_from_zero_checkpoint(view, tag=_TAG)
        path = Path(view) / _TAG / f"{first}model_states.pt"
        return torch.load(path, map_location="cpu", weights_only=True)["module"]


def build_optimizer(network: nn.Module, optimizer: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay or, as "adam", with the decay added to the gradient."""
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optimizer.kind]
    return kind(parameter_groups(network, optimizer), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps)


def parameter_groups(network: nn.Module, optimizer: OptimizerConfig) -> list[dict]:
    """Groups with and without weight decay, as `optimizer.decay` says."""
    decayed, plain = [], []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 the parameter itself is an empty shell.
            dims = len(getattr(parameter, "ds_shape", parameter.shape))
            decays = {"everything": True, "matrices": dims >= 2, "not_norms": "norm" not in name}[optimizer.decay]
            (decayed if decays else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _prepare() -> None:
    # DeepSpeed would compile a shared-memory all-reduce that only inference uses, and fail without ninja.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.cuda.is_available():
        keep_freed_memory()
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
