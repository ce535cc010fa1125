"""How fast and in how little memory a model of the largest published size is converted, in each direction.

    python benchmarks/convert.py [--recipe VQ_XLXXL256] [--folder DIR]

Writes a training checkpoint of random weights as two tensor ranks and four data ranks would have, and converts it with
`gigatok-ds convert` in processes of their own: to a standalone directory, that to an original .pt, that to a standalone
directory again, whose weights must have the SHA-256 of the first, and the first to a run that training starts from.
Beside each, the same files are copied and put on the disk. Where that is allowed (root), the kernel's cache of files is
emptied before each.

Needs about four times the model's size on the disk. Exit code 1: a process held more than 3 GB, or was slower than both
200 MB/s and 60 % of the copy.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import figures
import torch
from figures import Figure

from gigatok_ds.checkpoint.fragments import WEIGHTS, Fragment, SavedLayout, Snapshot
from gigatok_ds.checkpoint.inspection import folder_bytes
from gigatok_ds.checkpoint.original import build_on_meta
from gigatok_ds.checkpoint.run_directory import MODEL_PARTS, RECIPE_FILE, STATE_FILE, State, checkpoint_path
from gigatok_ds.checkpoint.standalone import read_config
from gigatok_ds.config.load import load_recipe, save_resolved
from gigatok_ds.files import sync
from gigatok_ds.parallel.sharding import declared_shards

TENSOR, DATA = 2, 4
# Not ru_maxrss, which begins with what the parent process held.
CHILD = """
import sys
from gigatok_ds.cli.main import main
if main(sys.argv[1:]):
    sys.exit(1)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
PEAK_GB, MB_S, OF_COPY = 3.0, 200.0, 0.6


def write_checkpoint(recipe_name: str, run_dir: Path) -> Path:
    """A training checkpoint with weights only, one rank's files after the other."""
    recipe = load_recipe(recipe_name)
    network = build_on_meta(recipe.model)
    cuts = declared_shards(network)
    shapes = {name: list(parameter.shape) for name, parameter in network.named_parameters()}
    cuts = {name: cut for name, cut in cuts.items() if name in shapes}
    for name, cut in cuts.items():
        shapes[name][cut.dim] //= TENSOR
    layout = SavedLayout(tensor_size=TENSOR, data_size=DATA, parameters=shapes, cuts=cuts, kinds=[WEIGHTS],
                    adam_steps=dict.fromkeys(shapes, 0), counters={})
    buffers = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in network.state_dict().items()
               if name not in shapes}
    part = MODEL_PARTS[recipe.kind]
    checkpoint, files = checkpoint_path(run_dir, 1), {}
    for tensor_rank in range(TENSOR):
        for data_rank in range(DATA):
            torch.manual_seed(DATA * tensor_rank + data_rank)
            fragments = {name: fragment(shape, data_rank) for name, shape in shapes.items()}
            snapshot = Snapshot(tensor_rank=tensor_rank, data_rank=data_rank, layout=layout,
                                fragments={WEIGHTS: fragments}, full=buffers)
            files |= {f"{part}/{name}": digest for name, digest in snapshot.write(checkpoint / part).items()}
    save_resolved(recipe, checkpoint / RECIPE_FILE)
    state = State(step=1, samples=0, parts=[part], world_size=TENSOR * DATA, tensor_size=TENSOR, stage=3, metrics={},
                  guard={}, files=files)
    (checkpoint / STATE_FILE).write_text(state.to_json())
    return checkpoint


def fragment(shape: list[int], data_rank: int) -> Fragment:
    numel = math.prod(shape)
    size = -(-numel // DATA)
    start = min(data_rank * size, numel)
    return Fragment(start, torch.rand(min(size, numel - start)) - 0.5)


def convert(*words: str | Path) -> Callable[[], float]:
    """A run of `gigatok-ds convert`, which returns its peak resident memory in GB (10^9 bytes)."""

    def run() -> float:
        finished = subprocess.run([sys.executable, "-c", CHILD, "convert", *map(str, words)], stdout=subprocess.PIPE,
                                  text=True, check=True)
        return int(finished.stdout.split()[-1]) * 1024 / 1e9

    return run


def copy(source: Path, to: Path) -> Callable[[], float]:
    def run() -> float:
        files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
        to.mkdir()
        for number, file in enumerate(files):
            shutil.copyfile(file, to / str(number))
            sync(to / str(number))
        return 0.0

    return run


def timed(work: Callable[[], float]) -> tuple[float, float]:
    """(seconds, what the work returned)."""
    os.sync()
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def compare(direction: str, source: Path, words: list[str | Path], folder: Path) -> Figure:
    """Print one row, and return it."""
    size = (source.stat().st_size if source.is_file() else folder_bytes(source)) / 1e6
    copied, _ = timed(copy(source, folder / "copy"))
    shutil.rmtree(folder / "copy")
    seconds, peak = timed(convert(source, *words))
    speed, of_copy = size / seconds, copied / seconds
    print(f"| {direction} | {size / 1e3:.2f} | {speed:.0f} | {size / copied:.0f} | {of_copy:.2f} | {peak:.2f} |",
          flush=True)
    return Figure(case=direction, unit="MB/s", ours=speed, reference=size / copied, reference_name="copying",
                  ratio=of_copy, direction="x the copy's speed",
                  target=f"at least {OF_COPY:g} or {MB_S:g} MB/s, within {PEAK_GB:g} GB",
                  met=peak <= PEAK_GB and (speed >= MB_S or of_copy >= OF_COPY),
                  notes=f"{size / 1e3:.2f} GB; peak {peak:.2f} GB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="VQ_XLXXL256", help="whose model (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the directory for temporary files)")
    figures.add_option(parser)
    args = parser.parse_args()
    needed = 4.2 * 4 * sum(parameter.numel() for parameter
                           in build_on_meta(load_recipe(args.recipe).model).parameters())
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < needed:
            free = shutil.disk_usage(folder).free
            figures.skip(args.json, f"{free / 1e9:.0f} GB are free on the disk; {needed / 1e9:.0f} are needed")
            raise SystemExit(f"{folder} has {free / 1e9:.0f} GB free; {needed / 1e9:.0f} are needed")
        checkpoint = write_checkpoint(args.recipe, folder / "run")
        print("| direction | GB | MB/s | copying, MB/s | of the copy's speed | peak memory, GB "
              "|\n|---|---|---|---|---|---|")
        found = [compare("training checkpoint to standalone", checkpoint, [folder / "model"], folder)]
        shutil.rmtree(folder / "run")
        found.append(compare("standalone to .pt", folder / "model", [folder / "m.pt", "--to", "original"], folder))
        found.append(compare(".pt to standalone", folder / "m.pt", [folder / "again", "--recipe", args.recipe], folder))
        (folder / "m.pt").unlink()
        found.append(compare("standalone to a training start point", folder / "model",
                             [folder / "start", "--to", "training", "--recipe", args.recipe], folder))
        same = read_config(folder / "model")["sha256"] == read_config(folder / "again")["sha256"]
        print("the weights are the same after the way there and back" if same else "THE WEIGHTS DIFFER")
    figures.write(args.json, found, [] if same else ["the weights differ after the way to a .pt and back"])
    return int(not (all(figure.met for figure in found) and same))


if __name__ == "__main__":
    raise SystemExit(main())
