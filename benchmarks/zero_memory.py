"""What every ZeRO stage really holds per rank, beside what Rajbhandari et al. (2020) say it should.

    python benchmarks/zero_memory.py [--ranks 4] [--precision bf16] [--size tiny] [--stages 0 1 2 3]

Starts the ranks on this machine (NCCL where there are GPUs, else gloo) and trains a GPT through
`engine.engine.Engine` for two updates of two micro batches. In the second update each rank adds up the
storages behind its live tensors, by kind:

measured   the most held after a backward; for the last micro batch that is between backward and step
peak       the most held at any moment sampled in the update: before a module's forward, after a parameter's
           gradient, before AdamW runs. Working copies count here that are no part of the theory.
other      all else that is alive after a backward, found through the garbage collector, such as DeepSpeed's
           buckets

Exit code 1: a stage misses its theoretical size by more than 10 % in parameters, gradients, optimizer state
or all of them together, or holds more than 10 % of it otherwise. In fp32 stages 1 to 3 do: DeepSpeed 0.19.8
keeps master weights beside parameters that are float32 already.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import figures
import torch
import torch.nn.functional as F
from figures import Figure
from torch import Tensor, nn

from gigatok_ds.config.deepspeed import resolve_deepspeed, zero_settings
from gigatok_ds.config.model import GPT_SIZES, GPTConfig, TransformerSize
from gigatok_ds.config.recipe import GPTRecipe, TrainingConfig
from gigatok_ds.errors import InputError
from gigatok_ds.streams import torch_stream

STAGES = (0, 1, 2, 3)
TOLERANCE = 0.10
UPDATES = 2  # AdamW may create its moments in the first
MICRO_BATCHES = 2  # stage 1 holds whole gradients only between micro batches
CODES = 32  # fed per sequence at most: activations are not what is measured
MASTER, MOMENTS, STATE, ALL = "  master weights", "  moments", "optimizer state", "all of these"

# Deep and narrow, so that no parameter matters alone: ZeRO-2 keeps whole gradients at the ends of a share.
TINY = GPTConfig(size=TransformerSize(width=128, layers=24, heads=4), vocab_size=512, sequence_length=CODES,
                 num_classes=10)


@dataclass(kw_only=True)
class Measurement:
    """Bytes held by one rank, or the most of any rank, by kind; and the network's number of parameters."""

    parameters: int
    device: str
    measured: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class Row:
    """One line of the table, in bytes; None where there is nothing to say."""

    kind: str
    theoretical: float | None
    measured: float
    peak: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.measured / self.theoretical if self.theoretical else None


def theoretical_bytes(parameters: int, stage: int, ranks: int, precision: str) -> dict[str, float]:
    """Bytes per rank by kind (Rajbhandari et al. 2020, arXiv:1910.02054, sections 3.1 and 5).

    bf16: 2 bytes per parameter, 2 per gradient, and 12 of optimizer state, 4 of them the float32 master
    weights. fp32: 4, 4 and 8, since the parameters are their own master weights. Stage 1 divides the
    optimizer state by the number of ranks, stage 2 the gradients as well, stage 3 also the parameters.
    """
    low, master = (4, 0) if precision == "fp32" else (2, 4)
    per_parameter = {"parameters": (low, 3), "gradients": (low, 2), MASTER: (master, 1), MOMENTS: (8, 1)}
    return {kind: parameters * size / (ranks if stage >= divided_from else 1)
            for kind, (size, divided_from) in per_parameter.items()}


def rows(measurement: Measurement, theory: dict[str, float]) -> list[Row]:
    measured = measurement.measured
    lines = [Row(kind=kind, theoretical=theory[kind], measured=measured[kind], peak=measurement.peak[kind])
             for kind in theory]
    state = Row(kind=STATE, theoretical=theory[MASTER] + theory[MOMENTS],
                measured=measured[MASTER] + measured[MOMENTS])
    total = Row(kind=ALL, theoretical=sum(theory.values()), measured=sum(measured[kind] for kind in theory))
    other = Row(kind="other", theoretical=None, measured=measured["other"])
    return [*lines[:2], state, *lines[2:], total, other]


def failures(stage: int, lines: list[Row]) -> list[str]:
    """What contradicts the theory by more than the tolerance."""
    by_kind = {row.kind: row for row in lines}
    found = [f"stage {stage}: {kind}: measured / theoretical is {by_kind[kind].ratio:.3f}"
             for kind in ("parameters", "gradients", STATE, ALL) if abs(by_kind[kind].ratio - 1) > TOLERANCE]
    if by_kind["other"].measured > TOLERANCE * by_kind[ALL].theoretical:
        megabytes = by_kind["other"].measured / 1e6
        found.append(f"stage {stage}: other: {megabytes:.2f} MB that the theory does not know of")
    if by_kind[MASTER].theoretical == 0 < by_kind[MASTER].measured:
        found.append(f"stage {stage}: master weights: kept although the parameters are float32 already")
    return found


def figure(stage: int, lines: list[Row], options: argparse.Namespace) -> Figure:
    *_, full, other = lines
    case = f"ZeRO-{stage}, {options.size} GPT, {options.ranks} ranks, {options.precision}"
    return Figure(case=case, unit="MB", ours=full.measured / 1e6, reference=full.theoretical / 1e6,
                  reference_name="theory",
                  ratio=full.ratio, direction="x the theory", target=f"each kind within {TOLERANCE:.0%}",
                  met=not failures(stage, lines), notes=f"per rank; {other.measured / 1e6:.2f} MB beyond what the "
                                                        "theory knows")


def print_rows(stage: int, lines: list[Row]) -> None:
    for row in lines:
        theoretical, measured, peak = ("-" if value is None else f"{value / 1e6:.2f}"
                                       for value in (row.theoretical, row.measured, row.peak))
        ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
        print(f"{stage:>5}  {row.kind:<16} {theoretical:>14} {measured:>11} {ratio:>7} {peak:>9}", flush=True)


# One rank


def gpt_recipe(size: str, precision: str, ranks: int) -> GPTRecipe:
    return GPTRecipe(
        kind="gpt", name="zero_memory", model=TINY if size == "tiny" else GPTConfig(size=size),
        training=TrainingConfig(steps=UPDATES, global_batch_size=ranks * MICRO_BATCHES, micro_batch_size=1,
                                precision=precision),
    )


def small_buffers(model: GPTConfig, stage: int) -> dict[str, int]:
    """DeepSpeed's buffers, in elements, as large as the largest parameter.

    Its defaults of 5e8, and its habit of keeping small or soon needed parameters gathered, would hide what is
    sharded.
    """
    width = model.transformer.width
    largest = width * max(3 * width, model.ffn_width, model.vocab_size)
    buffers = {"reduce_bucket_size": largest, "allgather_bucket_size": largest} if stage else {}
    if stage == 3:
        buffers |= {"stage3_prefetch_bucket_size": largest, "stage3_max_live_parameters": 2 * largest,
                    "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
    return buffers


def build_engine(recipe: GPTRecipe, stage: int, topology):
    """The only place here that knows how an Engine is made."""
    from gigatok_ds.engine.engine import Engine
    from gigatok_ds.models.gpt import GPT

    settings = zero_settings(stage)
    settings["zero_optimization"] |= small_buffers(recipe.model, stage)
    settings, _ = resolve_deepspeed(settings, recipe, data_parallel_size=topology.data_size)
    return Engine(lambda: GPT(recipe.model, topology.layers), recipe.optimizer, settings, topology=topology,
                  seed=recipe.training.seed)


class Meter:
    """Adds up what an engine holds, from attributes of DeepSpeed 0.19.8; what it misses becomes `other`."""

    def __init__(self, engine):
        self.network: nn.Module = engine.network
        self.optimizer = engine._engine.optimizer
        self.adamw: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        self.measured: dict[str, int] = {}
        self.peak: dict[str, int] = {}

    def watch(self) -> None:
        """From now on, sample within forward, backward and step, after DeepSpeed's own hooks."""
        for module in self.network.modules():
            module.register_forward_pre_hook(self.sample)
        for parameter in self.network.parameters():
            parameter.register_post_accumulate_grad_hook(self.sample)
        self.adamw.register_step_pre_hook(self.sample)

    def sample(self, *_) -> None:
        raise_to(self.peak, total(self.storages()))

    def after_backward(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.sample()
        found = self.storages()
        gc.collect()
        alive = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
        found["other"] = storages_of(alive, {address for kind in found.values() for address in kind})
        raise_to(self.measured, total(found))

    def storages(self) -> dict[str, dict[int, int]]:
        """By kind, bytes of every storage by address. A storage counts for the first kind that holds it."""
        parameters = list(self.network.parameters())
        masters = list(tensors(self._kept("fp32_groups", "single_partition_of_fp32_groups",
                                          "fp32_partitioned_groups_flat")))
        holders = {
            "parameters": [parameters, list(self.network.buffers()), attributes(parameters, "ds_tensor"),
                           self._kept("bit16_groups_flat", "lp_param_buffer",
                                      "fp16_partitioned_groups_flat")],
            MASTER: masters,
            MOMENTS: self.adamw.state,
            # In backward, a parameter's gradient may lie in a bucket.
            "buckets": attributes(getattr(self.optimizer, "ipg_buckets", {}).values(), "buffer"),
            "gradients": [attributes(parameters, "grad"), attributes(parameters, "grad_accum"),
                          attributes(masters, "grad"),
                          self._kept("averaged_gradients", "all_grad_tensors", "grads_in_partition",
                                     "grad_partitions_flat_buffer")],
        }
        seen: set[int] = set()
        found = {kind: storages_of(tensors(held), seen) for kind, held in holders.items()}
        del found["buckets"]  # the garbage collector knows them, too
        return found

    def _kept(self, *names: str) -> list:
        return [getattr(self.optimizer, name, None) for name in names]


def attributes(things: Iterable, name: str) -> list:
    return [getattr(thing, name, None) for thing in things]


def tensors(thing) -> Iterator[Tensor]:
    """Every tensor in nested lists and dictionaries."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for part in thing.values() if isinstance(thing, dict) else thing:
            yield from tensors(part)


def storages_of(found: Iterable[Tensor], seen: set[int]) -> dict[int, int]:
    """Bytes by address of the storages behind the tensors, without those seen; they are seen afterwards.

    Tensors of other types (those that torch.compile keeps of its traces) have no storage of their own.
    """
    storages = {}
    for tensor in found:
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                storages[storage.data_ptr()] = storage.nbytes()
    seen.update(storages)
    return storages


def total(found: dict[str, dict[int, int]]) -> dict[str, int]:
    return {kind: sum(storages.values()) for kind, storages in found.items()}


def raise_to(largest: dict[str, int], values: dict[str, int]) -> None:
    largest.update({key: max(value, largest.get(key, 0)) for key, value in values.items()})


def run_rank(stage: int, size: str, precision: str, folder: Path) -> None:
    """Train, measure, and leave the Measurement in `folder`."""
    from gigatok_ds.parallel.topology import start_process_group, stop_process_group

    topology = start_process_group()
    device = topology.device
    recipe = gpt_recipe(size, precision, topology.data_size)
    model = recipe.model
    engine = build_engine(recipe, stage, topology)
    meter = Meter(engine)
    for update in range(1, UPDATES + 1):
        if update == UPDATES:
            meter.watch()
        for micro in range(MICRO_BATCHES):
            stream = torch_stream(0, "zero_memory", update, micro, topology.data_rank)
            length = min(CODES, model.sequence_length)
            codes = torch.randint(model.vocab_size, (1, length), generator=stream).to(device)
            classes = torch.randint(model.num_classes, (1,), generator=stream).to(device)
            logits = engine(codes[:, :-1], classes)
            engine.backward(F.cross_entropy(logits.flatten(0, 1), codes.flatten()))
            del logits
            if update == UPDATES:
                meter.after_backward()
            engine.step(lr=1e-4)
    # Under ZeRO-3 a parameter's own size is that of what happens to be gathered.
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.network.parameters()]
    result = Measurement(parameters=sum(sizes), measured=meter.measured, peak=meter.peak,
                         device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU")
    (folder / f"rank{topology.rank}.json").write_text(json.dumps(asdict(result)))
    topology.barrier()
    stop_process_group(topology)


# All ranks


def measure(stage: int, size: str, precision: str, ranks: int) -> Measurement:
    """Train at one stage in processes of their own; the most that any rank held.

    Raises InputError when a rank fails, after printing what it said.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, __file__, "--size", size, "--precision", precision, "--stages", str(stage),
                   "--as-rank", name]
        failed = run_together(command, ranks, folder)
        if failed is not None:
            print((folder / f"rank{failed}.log").read_text(), file=sys.stderr)
            raise InputError(f"rank {failed} of {ranks} failed at stage {stage}; its own messages are above")
        texts = [(folder / f"rank{rank}.json").read_text() for rank in range(ranks)]
    results = [Measurement(**json.loads(text)) for text in texts]
    for result in results[1:]:
        raise_to(results[0].measured, result.measured)
        raise_to(results[0].peak, result.peak)
    return results[0]


def run_together(command: list[str], ranks: int, folder: Path) -> int | None:
    """Run one process per rank, its output in `folder`; the first rank found to have failed, if any."""
    from gigatok_ds.cluster.local_job import free_port

    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }
    running: list[subprocess.Popen] = []
    try:
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(folder / f"rank{rank}.log", "w") as log:
                running.append(subprocess.Popen(command, env=environment | place, stdout=log,
                                                stderr=subprocess.STDOUT))
        while True:
            codes = [process.poll() for process in running]
            if any(codes) or None not in codes:
                return next((rank for rank, code in enumerate(codes) if code), None)
            time.sleep(0.2)
    finally:
        for process in running:
            process.kill()
            process.wait()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory per rank of ZeRO stages, measured and theoretical.")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--size", choices=("tiny", *GPT_SIZES), default="tiny")
    parser.add_argument("--stages", type=int, choices=STAGES, nargs="+", default=STAGES)
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    figures.add_option(parser)
    options = parser.parse_args()
    if options.ranks < 1:
        parser.error(f"--ranks is {options.ranks}; it must be at least 1")
    gpus = torch.cuda.device_count()
    if 0 < gpus < options.ranks:
        parser.error(f"--ranks is {options.ranks}, but this machine has {gpus} GPUs; ask for as many, or use "
                     "its CPUs with CUDA_VISIBLE_DEVICES= in the environment")
    return options


def main() -> int:
    options = parse_arguments()
    if options.as_rank:
        run_rank(options.stages[0], options.size, options.precision, options.as_rank)
        return 0
    print(shlex.join(["python", *sys.argv]))
    print(f"torch {version('torch')}, deepspeed {version('deepspeed')}")
    print(f"buffers, in elements: {small_buffers(gpt_recipe(options.size, options.precision, 1).model, 3)}")
    found, told = [], []
    for stage in options.stages:
        measurement = measure(stage, options.size, options.precision, options.ranks)
        if not told:
            print(f"{options.size}: {measurement.parameters / 1e6:.2f}M parameters, {options.precision}, "
                  f"{options.ranks} ranks on {measurement.device}; MB of 10^6 bytes, the most of any rank\n"
                  "DeepSpeed accumulates gradients in the precision of the parameters\n")
            print("stage  kind             theoretical MB measured MB   ratio   peak MB")
        theory = theoretical_bytes(measurement.parameters, stage, options.ranks, options.precision)
        print_rows(stage, lines := rows(measurement, theory))
        found += failures(stage, lines)
        told.append(figure(stage, lines, options))
    figures.write(options.json, told)
    print("\n" + "\n".join(found or [f"every stage agrees with the theory within {TOLERANCE:.0%}"]))
    return 1 if found else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"zero_memory.py: error: {error}", file=sys.stderr)
        sys.exit(2)
