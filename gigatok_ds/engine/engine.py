"""The only place that calls DeepSpeed: build an engine and step it; `zero_stages.py` knows where it keeps what."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# DeepSpeed reads both while it is imported.
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

from gigatok_ds.checkpoint.fragments import Fragment, SavedEngine, Snapshot
from gigatok_ds.compat import no_shared_memory_op, search_at_lowest_scale
from gigatok_ds.config.optimizer import OptimizerConfig
from gigatok_ds.cpu.malloc import keep_freed_memory
from gigatok_ds.engine.ema import ShardedEMA
from gigatok_ds.engine.muon import Muon
from gigatok_ds.engine.optimizers import LR_FACTOR, build_optimizer, hidden_matrices
from gigatok_ds.engine.spread_matrices import rounds_of
from gigatok_ds.engine.zero_gradients import LiveGradients
from gigatok_ds.engine.zero_stages import zero_stage
from gigatok_ds.engine.zero_state import LiveState
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.parallel.consistency import check_spread
from gigatok_ds.parallel.drift import Replicated
from gigatok_ds.parallel.dropout import name_dropouts
from gigatok_ds.parallel.partial import sum_partial_gradients
from gigatok_ds.parallel.topology import Topology


class Engine:
    """One network under DeepSpeed, with an optimizer whose learning rate the caller sets at every step."""

    def __init__(self, build: Callable[[], nn.Module], optimizer: OptimizerConfig, settings: dict[str, Any], *,
                 topology: Topology, seed: int | None = None,
                 compile: Callable[[nn.Module], list[nn.Module]] | None = None,
                 recompute: Callable[[nn.Module], object] | None = None, ema_decay: float | None = None):
        """settings are resolved DeepSpeed settings.

        With a seed, `build` leaves the initial weights to us: at stage 3 it runs under `zero.Init`, and no rank ever
        holds the whole network. Without one, `build` returns an initialised network, which should be small.
        `compile` compiles parts of the network and returns them; `recompute` switches activation checkpointing on. With
        `ema_decay` a moving average of the weights is kept and saved, spread over the data ranks. Parameters that take
        no gradient when they are built are frozen.
        """
        _prepare()
        settings = copy.deepcopy(settings)
        self.stage = settings.get("zero_optimization", {}).get("stage", 0)
        self.decides_on_device = decides_on_device(settings)
        self._max_norm = optimizer.max_grad_norm if _clips_by_itself(settings) else None
        settings["gradient_clipping"] = optimizer.max_grad_norm if self._max_norm is None else 0.0
        # DeepSpeed's stopwatch waits for the whole device twice a step.
        settings["timers"] = {"throughput": {"enabled": False}} | settings.get("timers", {})
        if self._max_norm is not None and self.stage > 0:
            # DeepSpeed would read the norm on the host before it updates.
            settings["zero_optimization"]["compute_grad_norm"] = settings["bf16"]["check_grad_overflow"] = False
        # With tensor ranks, zero.Init needs all of this to partition over the data group; it would not complain.
        with deepspeed.zero.Init(config_dict_or_path=settings, mpu=topology.mpu,
                                 data_parallel_group=topology.data_group if topology.mpu else None,
                                 enabled=self.stage == 3 and seed is not None):
            network = build()
        # A rank within the data group, unlike DeepSpeed's other ranks.
        full = partial(deepspeed.zero.GatheredParameters, modifier_rank=0)
        if seed is not None:
            initialise_(network, seed, full=full, tensor_rank=topology.tensor_rank, tensor_size=topology.tensor_size)
        name_dropouts(network)
        for part in compile(network) if compile else ():
            # ZeRO-3 gathers all of its parameters outside: hooks inside would tear the compiled code apart.
            set_z3_leaf_module(part, True)
            if self.stage == 3 and any(parameter.requires_grad for parameter in part.parameters()):
                part.register_forward_pre_hook(_with_input_gradient)
        if recompute:
            recompute(network)
        if topology.mpu:
            sum_partial_gradients(network, topology.tensor_group)
        # Told by attributes that torch declares nowhere.
        self._adam: Any = build_optimizer(network, optimizer, half=settings["bf16"]["enabled"])
        for group in self._adam.param_groups:
            group["lr"] = 0.0  # at stage 0 in half precision DeepSpeed makes an update, without gradients, here
        self._engine, *_ = deepspeed.initialize(model=network, optimizer=self._adam, config=settings, mpu=topology.mpu)
        if self.stage == 0:
            self._adam.state.clear()  # which does not count
        self._norm: Tensor | float | None = None
        self._reported_left_out = False  # whether DeepSpeed has counted the last update as left out
        check_spread(network, topology, deepspeed.zero.GatheredParameters)
        search_at_lowest_scale(self._engine.optimizer)
        zero = zero_stage(self._engine, self.stage, topology)
        hidden = hidden_matrices(network, optimizer)
        self._state, self._gradients = LiveState(zero, full, one_moment=hidden), LiveGradients(zero)
        if isinstance(self._adam, Muon):
            self._adam.spread(rounds_of(zero, hidden), topology)
        self._remembered: list[Tensor] = []
        self.ema = None if ema_decay is None else ShardedEMA(ema_decay, self._state.places())

    @property
    def network(self) -> nn.Module:
        """The bare network: evaluation, and passes whose gradient is not this engine's business."""
        network: nn.Module = self._engine.module
        return network

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return self._engine(*inputs, **options)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self, lr: float, left_out: Tensor | None = None) -> None:
        """Count one micro batch; at the end of an accumulation, clip and update with this learning rate.

        left_out: a float32 scalar on the device, 1 to leave the update out of weights, moments and average, 0 for an
        update; where `decides_on_device`.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group[LR_FACTOR]
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return
        self._state.before_change()
        norm = self._gradients.norm() if self._max_norm is not None else None
        if norm is not None and self._max_norm:
            self._adam.grad_scale = ((norm + 1e-6) / self._max_norm).clamp(min=1.0)
        self._adam.found_inf = left_out
        skipped = self._engine.skipped_steps
        self._engine.step()
        self._adam.found_inf = self._adam.grad_scale = None
        self._reported_left_out = self._engine.skipped_steps > skipped
        if self._engine.was_step_applied():
            self._note_norm(self._engine.get_global_grad_norm() if norm is None else norm, left_out)
            if self.ema:
                self.ema.update(left_out)

    def _note_norm(self, norm: Tensor | float, left_out: Tensor | None) -> None:
        """Keep the norm of an update; one that is left out leaves that of the last one, or NaN."""
        if left_out is not None:
            norm, before = (value if isinstance(value, Tensor)
                            else torch.full_like(left_out, math.nan if value is None else value) for value
                            in (norm, self._norm))
            norm = torch.where(left_out > 0, before, norm)
        self._norm = norm

    def count_left_out(self) -> None:
        """The update that was left out on the device counts as such, unless DeepSpeed has found so by itself."""
        if not self._reported_left_out:
            self._engine.skipped_steps += 1

    def gradients_finite(self) -> Tensor:
        """Whether this rank's part of the accumulated gradients is finite, as a boolean on the device."""
        return self._gradients.finite()

    def drop(self) -> None:
        """Leave the update out, instead of the `step` that would make it."""
        self._gradients.drop()

    @torch.no_grad()
    def remember_buffers(self) -> None:
        """Keep the network's buffers as they are now, for `restore_buffers`."""
        buffers = list(self.network.buffers())
        if len(self._remembered) != len(buffers):
            self._remembered = [torch.empty_like(buffer) for buffer in buffers]
        for kept, buffer in zip(self._remembered, buffers, strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def restore_buffers(self, where: Tensor | None = None) -> None:
        """Take the buffers back to what `remember_buffers` kept; if `where`, a boolean on the device, says so."""
        for kept, buffer in zip(self._remembered, self.network.buffers(), strict=True):
            buffer.copy_(kept if where is None else torch.where(where, kept, buffer))

    def weights(self) -> dict[str, Fragment]:
        """This rank's part of each trained parameter: float32 views of what the optimizer updates."""
        return self._state.fragments()

    def weights_finite(self) -> bool:
        """Whether this rank's part of the weights is finite."""
        found = [torch.isfinite(values).all() for _, values in self.weights().values()]
        return bool(torch.stack(found).all()) if found else True

    def replicated(self) -> Iterator[Replicated]:
        """What ranks should hold alike. Collective at stage 3."""
        return self._state.replicated(self.ema.fragments if self.ema else {})

    def gradient_norm(self) -> float | None:
        """Global gradient norm of the last update before clipping; None before the first. Waits for the device."""
        norm = math.nan if self._norm is None else float(self._norm)
        return None if math.isnan(norm) else norm

    def snapshot(self) -> Snapshot:
        """This rank's part of everything that training changes, copied to host memory. Collective at stage 3."""
        return self._state.snapshot(self.ema.fragments if self.ema else None)

    def load(self, folder: Path) -> None:
        """Restore what the snapshots of any layout wrote. Collective. Raises InputError when it is of another network.
        """
        self._state.restore(SavedEngine(folder), self.ema.fragments if self.ema else None)


def _with_input_gradient(part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of a part that ZeRO-3 gathers as a whole. DeepSpeed reduces its gradients once that of its input is
    known: behind frozen parts, where nobody wants one, it would be before there are any.
    """
    if not torch.is_grad_enabled() or any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        return inputs
    return inputs[0].detach().requires_grad_(), *inputs[1:]


def decides_on_device(settings: dict[str, Any]) -> bool:
    """Whether an update can be left out without the host: Adam's kernel hears of it where weights and moments are.

    In fp16 DeepSpeed scales losses on the host; what is offloaded is updated there.
    """
    zero = settings.get("zero_optimization", {})
    return not (settings["fp16"]["enabled"] or zero.get("offload_optimizer") or zero.get("zenflow"))


def _clips_by_itself(settings: dict[str, Any]) -> bool:
    """Whether the norm and its clipping are computed here. DeepSpeed's own reads the norm on the host; at stage 3, and
    at stage 0 in low precision, it does so in any case."""
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    return decides_on_device(settings) and stage < 3 and not (stage == 0 and settings["bf16"]["enabled"])


def _prepare() -> None:
    no_shared_memory_op(deepspeed)
    if not torch.cuda.is_available():
        keep_freed_memory()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
