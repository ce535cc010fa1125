"""What DeepSpeed keeps of a network in training, as plain tensors by parameter name, whatever the ZeRO stage.

The float32 weights and Adam's moments live in the parameters themselves, in float32 copies of them, or in flat
partitions of one data rank. `zero_stages` says where; `checkpoint.fragments` says how it is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from gigatok_ds.checkpoint.fragments import EMA, MOMENTS, WEIGHTS, Fragment, SavedEngine, SavedLayout, Snapshot
from gigatok_ds.engine.host_copies import HostCopies
from gigatok_ds.engine.zero_stages import Place, ZeroStage, shape_on_this_rank
from gigatok_ds.errors import InputError
from gigatok_ds.parallel.drift import Replicated
from gigatok_ds.parallel.sharding import declared_shards

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
_ENGINE_STATE = ("global_steps", "global_samples", "skipped_steps")


class LiveState:
    """The state of one DeepSpeed engine: views of it, copies of it, and putting it back."""

    def __init__(self, zero: ZeroStage, full: Callable[..., AbstractContextManager[Any]],
                 one_moment: Collection[str] = ()):
        """full: a context in which a parameter that data ranks share out is whole, and may be changed on the first.
        one_moment: parameters for which the optimizer keeps the first moment only."""
        self._one_moment = one_moment
        self._zero, self._full_parameter = zero, full
        self._engine, self._network, self._topology = zero.engine, zero.network, zero.topology
        self._places = zero.places(share=True)
        self._copies = HostCopies(zero.topology.device)
        self._frozen: dict[str, Tensor] = {}  # in float32, what the network computes with in a type of fewer bits

    def places(self) -> dict[str, Place]:
        """Where this data rank's part of each trained parameter is, at stage 0 an equal share of it."""
        return self._places

    def fragments(self) -> dict[str, Fragment]:
        """This data rank's part of each trained parameter in float32: views of what the optimizer updates."""
        return {name: Fragment(place.start, place.view(place.holder)) for name, place in self._places.items()}

    def snapshot(self, ema: Mapping[str, Fragment] | None) -> Snapshot:
        """Copies in host memory of this rank's part of everything; `before_change` has to be called before its next
        change. Collective at stage 3, where what no rank holds alone is gathered one parameter at a time."""
        kinds = {WEIGHTS: self.fragments()}
        for moment in MOMENTS:
            kinds[moment] = {name: self._moment(place, moment) for name, place in self._places.items()
                             if moment in self._moments(name)}
        if ema is not None:
            kinds[EMA] = dict(ema)
        buffers, gathered, frozen = {}, {}, {}
        for name, value in self._full():
            still = isinstance(value, nn.Parameter)
            if still and self._topology.data_rank > 0:
                continue  # the first data rank writes it
            if name in self._frozen:
                gathered[name] = self._frozen[name]
            elif hasattr(value, "ds_id"):
                gathered[name] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
            elif still:
                frozen[f"whole/{name}"] = value.detach()
            else:
                buffers[f"whole/{name}"] = value.detach()
        parts = {f"{kind}/{name}": part.values for kind, by_name in kinds.items() for name, part in by_name.items()}
        copies, arrived = self._copies.take(parts | frozen, buffers)
        fragments = {kind: {name: Fragment(part.start, copies[f"{kind}/{name}"]) for name, part in by_name.items()}
                     for kind, by_name in kinds.items()}
        full = {name.partition("/")[2]: copies[name] for name in (*buffers, *frozen)} | gathered
        return Snapshot(tensor_rank=self._topology.tensor_rank, data_rank=self._topology.data_rank,
                        layout=self._layout(list(kinds), full), fragments=fragments, full=full, arrived=arrived)

    def before_change(self) -> None:
        """Keep the next change of weights, moments and average from overtaking the copies of a snapshot."""
        self._copies.guard()

    @torch.no_grad()
    def restore(self, saved: SavedEngine, ema: Mapping[str, Fragment] | None) -> None:
        """Put back what snapshots of any layout hold. Collective. Raises InputError when the network is another one."""
        rank = {"tensor_rank": self._topology.tensor_rank, "tensor_size": self._topology.tensor_size}
        self._check(saved)
        self.before_change()
        for name, place in self._zero.places(share=False).items():
            stop = place.start + place.size
            if name not in saved.layout.parameters:  # frozen there
                place.view(place.holder).copy_(saved.read_full(name, **rank).flatten()[place.start:stop])
                continue
            moments = self._moments(name)
            for kind in (WEIGHTS, *moments):
                if saved.has(kind):
                    target = place.holder if kind == WEIGHTS else self._state(place, moments)[kind]
                    place.view(target).copy_(saved.read_range(kind, name, place.start, stop, **rank))
            if saved.has(MOMENTS[0]):
                self._state(place, moments)["step"].fill_(saved.layout.adam_steps[name])
        for name, (start, values) in (ema or {}).items():
            kind = EMA if saved.has(EMA) else WEIGHTS  # a start point has no average: it begins with the weights
            values.copy_(saved.read_range(kind, name, start, start + len(values), **rank))
        for name, value in self._full():
            self._restore_full(saved, name, value, rank)
        self._zero.refresh()
        self._set_counters(saved.layout.counters)

    def _restore_full(self, saved: SavedEngine, name: str, value: Tensor, rank: Mapping[str, int]) -> None:
        """A buffer, or a frozen parameter, which may have been trained before."""
        if name in saved.layout.parameters:
            found = saved.read_range(WEIGHTS, name, 0, value.numel(), **rank).reshape(value.shape)
        else:
            found = saved.read_full(name, **rank)
        value.copy_(found)
        if isinstance(value, nn.Parameter) and value.dtype != torch.float32 and self._topology.data_rank == 0:
            self._frozen[name] = found.float().contiguous()

    def replicated(self, ema: Mapping[str, Fragment]) -> Iterator[Replicated]:
        """What several ranks hold alike: partitions on tensor ranks, unless cut; on data ranks what ZeRO leaves whole.
        """
        cuts, everywhere = declared_shards(self._network), self._zero.holders_replicated
        for name, place in self._zero.places(share=False).items():
            full = name not in cuts
            yield Replicated(name, place.view(place.holder), everywhere, full)
            for moment in self._moments(name):
                yield Replicated(f"{moment} of {name}", self._moment(place, moment).values, everywhere, full)
        for name, (_, values) in ema.items():
            yield Replicated(f"the average of {name}", values, False, name not in cuts)
        if self._zero.parameters_replicated:
            for name, parameter in self._zero.trained.items():
                yield Replicated(name, parameter, True, name not in cuts)
        for name, value in self._full():
            yield Replicated(name, value, True, name not in cuts)

    def _adam(self) -> torch.optim.Optimizer:
        adam: torch.optim.Optimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        return adam

    def _moment(self, place: Place, moment: str) -> Fragment:
        """Zeros before the first update, when Adam has no state yet."""
        state = self._adam().state.get(place.holder)
        return Fragment(place.start, place.view(state[moment]) if state else torch.zeros_like(place.view(place.holder)))

    def _moments(self, name: str) -> tuple[str, ...]:
        return MOMENTS[:1] if name in self._one_moment else MOMENTS

    def _state(self, place: Place, moments: Sequence[str]) -> dict[str, Tensor]:
        """The optimizer's state of a holder, which it would make at its first update."""
        state: dict[str, Tensor] = self._adam().state[place.holder]
        if not state:
            state |= {"step": torch.zeros((), device=place.holder.device)}
            state |= {moment: torch.zeros_like(place.holder) for moment in moments}
        return state

    def _full(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers and frozen parameters, which are alike on all data ranks, by name."""
        for name, value in self._network.state_dict(keep_vars=True).items():
            if name in self._zero.trained or not isinstance(value, Tensor):
                continue
            with self._full_parameter(value, enabled=hasattr(value, "ds_id")):
                yield name, value

    def _layout(self, kinds: list[str], full: Mapping[str, Tensor]) -> SavedLayout:
        shapes = {name: shape_on_this_rank(parameter) for name, parameter in self._zero.trained.items()}
        cuts = declared_shards(self._network)
        steps = self._adam_steps()
        return SavedLayout(tensor_size=self._topology.tensor_size, data_size=self._topology.data_size,
                           parameters=shapes,
                      cuts={name: cut for name, cut in cuts.items() if name in shapes or name in full}, kinds=kinds,
                      adam_steps={name: steps.get(name, max(steps.values(), default=0)) for name in shapes},
                      counters=self._counters())

    def _adam_steps(self) -> dict[str, int]:
        states = {name: state
                  for name, place in self._places.items() if (state := self._adam().state.get(place.holder))}
        counts = torch.stack([state["step"] for state in states.values()]).tolist() if states else []
        return dict.fromkeys(self._places, 0) | dict(zip(states, map(int, counts), strict=False))

    def _scaler(self) -> Any:
        """What adapts the scale of an fp16 loss; None where nothing does."""
        optimizer = self._engine.optimizer
        scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
        adapts = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
        return scaler if adapts else None

    def _counters(self) -> dict[str, float]:
        scaler = {f"scaler.{name}": getattr(self._scaler(), name) for name in _SCALER_STATE
                  if hasattr(self._scaler(), name)}
        return {name: getattr(self._engine, name) for name in _ENGINE_STATE} | scaler

    def _set_counters(self, counters: Mapping[str, float]) -> None:
        """A scale is for other runs in fp16 only."""
        for name, value in counters.items():
            owner, attribute = (self._scaler(), name[7:]) if name.startswith("scaler.") else (self._engine, name)
            if hasattr(owner, attribute):
                setattr(owner, attribute, value)

    def _check(self, saved: SavedEngine) -> None:
        cuts, size = declared_shards(self._network), self._topology.tensor_size
        ours, known = {}, saved.shapes()
        for name, parameter in self._network.named_parameters():
            cut, local = cuts.get(name), shape_on_this_rank(parameter)
            ours[name] = list(cut.full_shape(torch.Size(local), size)) if cut else local
        theirs = {name: list(shape) for name, shape in known.items() if name in ours or name in saved.layout.parameters}
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise InputError(f"{saved.folder} does not fit this run: {name} is {theirs.get(name, 'missing')} there "
                                 f"and {ours.get(name, 'missing')} here")
        thawed = sorted(self._zero.trained.keys() - saved.layout.parameters.keys())
        if thawed and saved.has(MOMENTS[0]):
            raise InputError(f"{saved.folder} does not fit this run: {thawed[0]} was frozen there, so the optimizer "
                             f"has no state for it ({len(thawed)} such parameters); go on from the weights alone "
                             "(gigatok-ds convert --to training)")
