"""Decoding on a GPU: every step is the same list of operations on the same tensors, so that one CUDA graph replays it.

A step of a GPT is some hundred small operations, and starting each from Python takes longer than running it. So all
that a step reads and writes, the position and what choosing a code needs included, lies in tensors that never move;
nothing in it depends on a number that the host would have to read. On a CPU the same steps run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gigatok_ds.models.gpt import GPT, Modulations
from gigatok_ds.sampling.cache import Slots, StaticKVCache
from gigatok_ds.sampling.guidance import guide
from gigatok_ds.sampling.logits import Choice, as_tokens, choose_codes


class StaticDecoder:
    """Draws `batch` sequences at a time, always as many.

    With `compile` the network's part of a step is compiled by torch.compile, which fuses what lies between products.
    """

    def __init__(self, gpt: GPT, batch: int, *, compile: bool = False):
        length, device = gpt.config.sequence_length, gpt.norm.weight.device
        self.gpt, self.batch = gpt, batch
        self.slots = Slots(length, gpt.norm.weight)
        self.caches = [StaticKVCache(self.slots, 2 * batch) for _ in gpt.layers]
        self.chosen = torch.zeros(batch, dtype=torch.long, device=device)
        self.codes = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.uniform = torch.zeros(batch, length, dtype=torch.float64, device=device)
        self.scales = torch.ones(length, device=device)
        self.modulations: Modulations | None = None
        self.choice = Choice()
        self.network = _compiled(gpt) if compile else gpt.decode_step
        self.captured: dict[tuple[bool, Choice], Callable[[], None]] = {}

    @property
    def position(self) -> Tensor:
        """int64 (1,): of the token that comes next."""
        return self.slots.position

    def draw(self, classes: Tensor, uniform: Tensor, scales: Sequence[float], choice: Choice) -> Tensor:
        """Codes (batch, T) of classes (batch,), by uniform numbers (batch, T) and the guidance scale of each code."""
        # After the last guided code the conditional half goes on alone.
        guided = max((place + 1 for place, scale in enumerate(scales) if scale > 1), default=0)
        self.begin(classes, uniform, scales, choice)
        for position in range(1, len(scales)):
            self.advance(guided=position < guided)
        return self.codes.clone()

    def begin(self, classes: Tensor, uniform: Tensor, scales: Sequence[float], choice: Choice) -> None:
        """The first code, which takes the class for its token."""
        self.choice, guided = choice, scales[0] > 1
        self.uniform.copy_(uniform)
        self.scales.copy_(torch.tensor(scales))
        tokens = torch.cat([classes, torch.full_like(classes, self.gpt.unconditional_class)])
        # Of both halves always, so that they lie where they did.
        modulations = self.gpt.modulations(tokens)
        if self.modulations is None:
            self.modulations = modulations
        for kept, part in zip(self.modulations, modulations, strict=False):
            if kept is not None and part is not None:
                kept.copy_(part)
        self.position.zero_()
        self.slots.allow()
        tokens = tokens if guided else classes
        self._accept(self.gpt.decode_step(tokens, 0, self.caches, self._rows(len(tokens))), guided)

    def advance(self, *, guided: bool) -> None:
        """The next code, with the unconditional half beside the conditional one if `guided`."""
        if not self.position.is_cuda:
            return self.step(guided)
        key = guided, self.choice
        if key not in self.captured:
            self.captured[key] = self._capture(guided)
        self.captured[key]()
        return None

    def step(self, guided: bool) -> None:
        """What `advance` does: from tensors to tensors, all of which stay where they are."""
        self.slots.allow()
        tokens = self.chosen.repeat(2) if guided else self.chosen
        logits = self.network(tokens, self.position, self.caches, self._rows(len(tokens)))
        self._accept(logits, guided)

    def _accept(self, logits: Tensor, guided: bool) -> None:
        """Choose the codes that these logits are of, and move on."""
        if guided:
            scale = self.scales.index_select(0, self.position)
            logits = torch.where(scale > 1, guide(logits, scale), logits[: self.batch])
        chosen = choose_codes(logits, self.uniform.index_select(1, self.position)[:, 0], self.choice)
        self.chosen.copy_(as_tokens(chosen))
        self.codes.index_copy_(1, self.position, chosen[:, None])
        self.position.add_(1)

    def _capture(self, guided: bool) -> Callable[[], None]:
        """The step as a CUDA graph. Before it is captured it runs as it is, as CUDA asks for: all that it writes, the
        graph writes again, but for the position and the token that it began with."""
        begun = self.position.clone(), self.chosen.clone()

        def again() -> None:
            self.position.copy_(begun[0])
            self.chosen.copy_(begun[1])

        with torch.cuda.device(self.position.device):
            side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.step(guided)
                    again()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                self.step(guided)
        return graph.replay

    def _rows(self, count: int) -> Modulations:
        assert self.modulations is not None, "begin comes first"
        return [None if part is None else part[:count] for part in self.modulations]


def _compiled(gpt: GPT) -> Callable[..., Tensor]:
    # On a CPU freezing packs the weights for oneDNN.
    options: dict[str, str | int | bool | Callable] | None = None if gpt.norm.weight.is_cuda else {"freezing": True}
    return torch.compile(gpt.decode_step, fullgraph=True, dynamic=False, options=options)
