"""Tokens per second of our sampler beside a direct key/value-cache loop of the same model.

    python benchmarks/sampling.py [--model GPT-B] [--batch 8] [--device cuda] [--dtype float32] [--compile]
                                  [--threads 2] [--steps 256] [--repeats 3]

The direct loop decodes as the original does: a cache of 264 slots, attention over all of them with a boolean mask by
the math backend, both halves of the guided batch at every step, torch.multinomial. Both draw the same model (random
weights, guidance 4, all codes) in one process, in turns of BLOCK steps, so that both see the same machine. "steps" are
spread evenly over the sequence: each is run and timed at its position, with a cache that holds noise up to there.

The roofline is the time that the machine takes to read, once for each step, the weights and the keys and values of the
past. Bandwidth is measured in the same process, as the best of reading a large tensor (a sum, and a matrix-vector
product) and, on a GPU, of copying one. On CPUs the arithmetic of a step may bind as well: its rate is measured with a
large matrix product.

Wall-clock time is for an idle machine. "CPU time" is that of all threads of this process divided by their number: on a
machine that others use, where the process often waits for its turn, it is the better figure for a ratio.

Exit code 1: ours misses the target, 2 x on a CPU, 5 x on a GPU, in the median of the turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import figures
import torch
import torch.nn.functional as F
from figures import Figure
from machine import processor
from torch import Tensor

from gigatok_ds.config.model import GPTConfig
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.sampling.generate import Sampler
from gigatok_ds.sampling.guidance import guide
from gigatok_ds.sampling.logits import Choice, choose_codes, uniform_numbers
from gigatok_ds.sampling.static import StaticDecoder

SCALE = 4.0
BLOCK = 15  # steps of one way in a row: seconds at most, and caches as they are when nothing else runs
TARGETS = {"cpu": 2.0, "cuda": 5.0}


@dataclass(kw_only=True)
class Timing:
    """Of one step: seconds on the clock, and of CPU time divided by the threads."""

    wall: float
    cpu: float


# The direct loop


class DirectCache:
    """A layer's keys and values in a multiple of 8 slots, all of which are attended to through a mask."""

    def __init__(self, rows: int, gpt: GPT, mask: Tensor):
        size, weight = gpt.config.transformer, gpt.norm.weight
        shape = rows, size.heads, mask.shape[-1], size.width // size.heads
        self.keys, self.values = (torch.zeros(shape, device=weight.device, dtype=weight.dtype) for _ in range(2))
        self.mask = mask
        self.place = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.keys[:, :, self.place] = key
        self.values[:, :, self.place] = value
        mask = self.mask[:, None, self.place]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=mask)


class Direct:
    name = "direct loop"

    def __init__(self, gpt: GPT, batch: int):
        slots = -(-(gpt.config.sequence_length + 1) // 8) * 8
        device = gpt.norm.weight.device
        mask = torch.ones(slots, slots, dtype=torch.bool, device=device).tril().repeat(2 * batch, 1, 1)
        self.gpt = gpt
        self.caches = [DirectCache(2 * batch, gpt, mask) for _ in gpt.layers]

    def step(self, chosen: Tensor, position: int) -> Tensor:
        place = torch.tensor([position], device=chosen.device)
        for cache in self.caches:
            cache.place = place
        logits = guide(self.gpt.decode_step(torch.cat([chosen, chosen]), position, self.caches), SCALE)
        return torch.multinomial((logits / 1.0).softmax(-1), 1)[:, 0]


# Ours


class Ours:
    name = "ours"

    def __init__(self, gpt: GPT, batch: int, compile: bool):
        self.decoder = Sampler(gpt, batch, compile=compile).decoder
        self.uniform = uniform_numbers(0, range(batch), gpt.config.sequence_length).to(gpt.norm.weight.device)

    @property
    def caches(self) -> list:
        return self.decoder.caches

    def step(self, chosen: Tensor, position: int) -> Tensor:
        if isinstance(self.decoder, StaticDecoder):
            if position == 0:
                self.decoder.begin(chosen, self.uniform, [SCALE] * self.uniform.shape[1], Choice())
            else:
                self.decoder.position.fill_(position)
                self.decoder.advance(guided=True)
            return self.decoder.chosen
        logits = guide(self.decoder.step(torch.cat([chosen, chosen]), position), SCALE)
        return choose_codes(logits, self.uniform[:, position], Choice())


# Measuring


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable, device: str) -> Timing:
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    synchronise(device)
    return Timing(wall=time.perf_counter() - wall, cpu=(time.process_time() - cpu) / torch.get_num_threads())


def bandwidth(device: str, key: str) -> float:
    """Bytes per second, of a tensor too large for any cache; by `key`, wall or cpu."""
    size = 2**29 if device == "cpu" else 2**32
    big = torch.ones(size // 4, device=device).view(-1, 4096)
    vector, other = torch.ones(4096, device=device), torch.empty_like(big) if device == "cuda" else None
    ways = [(big.sum, 1), (lambda: big @ vector, 1)]
    if other is not None:
        ways.append((lambda: other.copy_(big), 2))
    return max(passes * size / min(getattr(timed(way, device), key) for _ in range(3)) for way, passes in ways)


def arithmetic(device: str, dtype: torch.dtype, key: str) -> float:
    """Floating-point operations per second of a large matrix product."""
    side = 1024 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(getattr(timed(lambda: a @ b, device), key) for _ in range(4))


def step_bytes(gpt: GPT, rows: int, position: int) -> int:
    """What a step has to read: each weight of the blocks and the head once, and every row's past."""
    weights = sum(p.numel() for name, p in gpt.named_parameters() if name.startswith(("layers", "output")))
    past = 2 * rows * (position + 1) * gpt.config.transformer.width * gpt.config.transformer.layers
    return (weights + past) * gpt.norm.weight.element_size()


def step_operations(gpt: GPT, rows: int, position: int) -> float:
    weights = sum(p.numel() for name, p in gpt.named_parameters() if name.startswith(("layers", "output")))
    past = 2 * (position + 1) * gpt.config.transformer.width * gpt.config.transformer.layers
    return 2 * rows * (weights + past)


def peak_memory(device: str) -> int:
    """Most bytes held so far: on a GPU by torch, on a CPU by this process since the last call of `forget_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def begin(way, batch: int, device: str) -> None:
    """The first position, and noise for all others, some of which may be left out."""
    way.chosen = way.step(torch.arange(batch, device=device), 0)
    for cache in way.caches:
        cache.keys.normal_()
        cache.values.normal_()


@torch.no_grad()
def measure(ways: list, positions: list[int], batch: int, device: str, repeats: int) -> dict[str, list[list[Timing]]]:
    """Timings [turn][step] of each way; the ways take turns after every BLOCK of steps."""
    found = {way.name: [] for way in ways}
    for turn in range(repeats + 1):
        for way in ways:
            begin(way, batch, device)
            way.turn = []
        for block in range(0, len(positions), BLOCK):
            for way in ways:
                for position in positions[block : block + BLOCK]:
                    def step(way=way, position=position):
                        way.chosen = way.step(way.chosen, position)
                    way.turn.append(timed(step, device))
        if turn:  # the first warms up, and compiles
            for way in ways:
                found[way.name].append(way.turn)
    return found


@torch.no_grad()
def memory(way, positions: list[int], batch: int, device: str) -> int:
    forget_peak(device)
    begin(way, batch, device)
    for position in positions[-2:]:
        way.step(way.chosen, position)
    return peak_memory(device)


def report(found: dict, gpt: GPT, positions: list[int], arguments: argparse.Namespace) -> list[Figure]:
    """Print the table; returns how many times faster ours is in the median turn, first by wall-clock time."""
    device, rows = arguments.device, 2 * arguments.batch
    keys = ("wall", "cpu") if device == "cpu" else ("wall",)
    totals = {(name, key): [sum(getattr(t, key) for t in turn) for turn in turns]
              for name, turns in found.items() for key in keys}
    moved = sum(step_bytes(gpt, rows, position) for position in positions)
    worked = sum(step_operations(gpt, rows, position) for position in positions)
    rows, target = [], {"wall": TARGETS[device]}
    for key in keys:
        rate, speed = bandwidth(device, key), arithmetic(device, gpt.norm.weight.dtype, key)
        print(f"by {'CPU time' if key == 'cpu' else 'the clock'}: memory {rate / 1e9:.1f} GB/s, "
              f"products {speed / 1e9:.0f} GFLOP/s")
        for name in found:
            median = statistics.median(totals[name, key])
            print(f"  {name:12} {median / len(positions) * 1e3:8.1f} ms/step "
                  f"{arguments.batch * len(positions) / median:9.1f} codes/s; of the memory roofline "
                  f"{moved / rate / median:5.1%}, of arithmetic {worked / speed / median:5.1%}")
        ratio = statistics.median(d / o for d, o in zip(totals[Direct.name, key], totals[Ours.name, key], strict=True))
        print(f"  ours is {ratio:.2f} x faster")
        ours, direct = (arguments.batch * len(positions) / statistics.median(totals[name, key])
                        for name in (Ours.name, Direct.name))
        rows.append(Figure(case=f"{arguments.model}, {arguments.dtype}, {arguments.batch} images, guided",
                           unit="codes/s",
                           ours=ours, reference=direct, reference_name=Direct.name, ratio=ratio, direction="x faster",
                           **figures.at_least(target.get(key), ratio),
                           notes=f"by {'CPU time' if key == 'cpu' else 'the clock'}; {len(positions)} steps"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="GPT-B")
    parser.add_argument("--batch", type=int, default=8, help="images; guidance doubles the rows (default: 8)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--steps", type=int, default=255, help="decoding steps to run (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default: 3)")
    figures.add_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    gpt = initialise_(GPT(GPTConfig(size=arguments.model)), seed=0)
    torch.nn.init.normal_(gpt.output.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    gpt = gpt.to(arguments.device, getattr(torch, arguments.dtype)).eval().requires_grad_(False)
    last = gpt.config.sequence_length - 1
    positions = sorted({1 + round(i * (last - 1) / max(arguments.steps - 1, 1)) for i in range(arguments.steps)})
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{processor()}, {arguments.threads} threads"
    print(f"{date.today()}  python {' '.join(sys.argv)}\n{name}; torch {torch.__version__}, "
          f"load {os.getloadavg()[0]:.1f}")
    print(f"{arguments.model}, {arguments.dtype}, {arguments.batch} images with guidance, {len(positions)} steps of "
          f"{last}, {arguments.repeats} turns", flush=True)
    direct = Direct(gpt, arguments.batch)
    used = {"direct": memory(direct, positions, arguments.batch, arguments.device)}
    ours = Ours(gpt, arguments.batch, arguments.compile)
    found = measure([ours, direct], positions, arguments.batch, arguments.device, arguments.repeats)
    del direct
    used["ours"] = memory(ours, positions, arguments.batch, arguments.device)
    rows = report(found, gpt, positions, arguments)
    ratio = rows[0].ratio
    print("peak memory, MiB: " + ", ".join(f"{name} {value / 2**20:.0f}" for name, value in used.items()))
    rows.append(Figure(case=f"{rows[0].case}: peak memory", unit="MiB", ours=used["ours"] / 2**20,
                       reference=used["direct"] / 2**20, reference_name=Direct.name,
                       ratio=used["direct"] / used["ours"], direction="x smaller"))
    figures.write(arguments.json, rows)
    target = TARGETS[arguments.device]
    print(f"target {target} x: {'met' if ratio >= target else 'MISSED'}")
    return 0 if ratio >= target else 1


if __name__ == "__main__":
    sys.exit(main())
