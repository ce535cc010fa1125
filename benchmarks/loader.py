"""Images per second and core of our loader beside torchvision's ImageFolder and plain webdataset; resuming; memory.

    python benchmarks/loader.py [--images 1600] [--workers 2] [--rounds 3] [--batch 32] [--samples 1281167]
    python benchmarks/loader.py --scale [--samples 100000000] [--ranks 2] [--workers 2] [--batch 32]

Photographs that scikit-image, scikit-learn and matplotlib ship are cut into JPEG files of ImageNet's sizes
(loader_data.py), as class folders and as shards. All four ways read them once in random order and give float32 batches
in [-1, 1] of 256 x 256 crops:

  torchvision   ImageFolder and DataLoader with the original's transforms: random crop, flip, ToTensor, Normalize
  webdataset    the shards through webdataset's own pipeline, shuffle buffer and the same transforms
  exact         ours with data.decoding exact
  fast          ours with data.decoding fast

Each runs in a process of its own, in turns. "Per core" is images by the CPU seconds of that process and its workers,
which does not depend on who else uses the machine. The difference of the fast path is told as PSNR from the exact one.

Then an index of 1.28 million samples: how long a fresh process takes from opening it to the first batch at 90% of an
epoch, and what its index adds to the memory of a process, at its peak.

With --scale only an index is measured, of 100 million samples in 10,000 tars (small images, hard links to one tar):
memory of a host with several ranks and their workers, time to open it, to agree on it and to the first batch.

Exit code 1: exact is slower than torchvision, fast less than 2 x as fast, resuming takes 5 s, or the index 200 MB; with
--scale, a sample takes more than 40 bytes of the host, or the first batch 30 s.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import figures
import loader_scale
import numpy as np
import torch
import torch.nn.functional as F
import webdataset as wds
from figures import Figure
from loader_data import make_images, make_large_index
from machine import processor
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from gigatok_ds.cpu.malloc import keep_freed_memory
from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.loader import ImageBatches
from gigatok_ds.data.reader import ReadingPlan
from gigatok_ds.data.transforms import open_image, resize_short_side
from gigatok_ds.shards.index import ShardIndex

SIZE, SCALE = 256, (0.8, 1.0)
IMAGENET, MANY = 1_281_167, 100_000_000  # samples
WAYS = ("torchvision", "webdataset", "exact", "fast")
EXACT, FAST, RESUME_SECONDS, INDEX_MB = 1.0, 2.0, 5.0, 200.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 1600), ("workers", 2), ("rounds", 3), ("batch", 32), ("ranks", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--part", nargs="*", help=argparse.SUPPRESS)
    figures.add_option(parser)
    args = parser.parse_args()
    if args.samples is None:
        args.samples = MANY if args.scale else IMAGENET
    if args.part and args.part[0] == "rank":
        loader_scale.rank(*map(Path, args.part[1:]), args)
        return 0
    if args.part:
        way, root = args.part
        json.dump(resume(Path(root), args) if way == "resume" else measure(way, Path(root), args), sys.stdout)
        return 0
    with tempfile.TemporaryDirectory(prefix="gigatok-loader-") as folder:
        root = Path(folder)
        if args.scale:
            return loader_scale.report(root, args)
        make_images(root, args.images)
        make_large_index(root / "shards", root / "large", args.samples)
        return report(root, args)


def report(root: Path, args: argparse.Namespace) -> int:
    size = sum(path.stat().st_size for path in (root / "shards").glob("*.tar"))
    print(f"{date.today()}  python benchmarks/loader.py {' '.join(sys.argv[1:])}".rstrip())
    print(f"{processor()}, {os.cpu_count()} threads; torch {torch.__version__}, Pillow {Image.__version__}; "
          f"{args.workers} workers; {args.images} images of {size / args.images / 1e3:.0f} kB")
    turns = [{way: in_process(way, root, args) for way in WAYS} for _ in range(args.rounds)]
    ratios = {way: statistics.median(turn["torchvision"]["cpu"] / turn[way]["cpu"] for turn in turns) for way in WAYS}
    for way in WAYS:
        per_core, by_clock = (args.images / statistics.median(turn[way][of] for turn in turns) for of
                              in ("cpu", "wall"))
        print(f"  {way:12s} {per_core:6.1f} images/s per core, {by_clock:6.1f} images/s by the clock; "
              f"{ratios[way]:.2f} x torchvision")
    print("fast beside exact, PSNR of the same crops: " + ", ".join(psnr_lines(root / "shards")))
    resumed = [in_process("resume", root, args) for _ in range(args.rounds)]
    seconds, memory = (statistics.median(run[name] for run in resumed) for name in ("seconds", "memory"))
    print(f"{args.samples} samples: first batch at 90% of an epoch after {seconds:.1f} s; "
          f"the index takes {memory:.0f} MB")
    found = [*speed_rows(turns, args.images), *index_rows(seconds, memory, args.samples)]
    figures.write(args.json, found)
    met = all(figure.met is not False for figure in found)
    print(f"targets (exact {EXACT} x, fast {FAST} x, {RESUME_SECONDS:.0f} s, {INDEX_MB:.0f} MB): "
          + ("met" if met else "missed"))
    return 0 if met else 1


def speed_rows(turns: list[dict], images: int) -> Iterator[Figure]:
    """Ratios by turn, so that both sides saw the same machine."""
    for ours, other, target in (("exact", "torchvision", EXACT), ("exact", "webdataset", None),
                                ("fast", "torchvision", FAST)):
        ratio = statistics.median(turn[other]["cpu"] / turn[ours]["cpu"] for turn in turns)
        speeds = {way: images / statistics.median(turn[way]["cpu"] for turn in turns) for way in (ours, other)}
        yield Figure(case=f"data.decoding={ours}", unit="images/s per core", ours=speeds[ours], reference=speeds[other],
                     reference_name=other, ratio=ratio, direction="x faster", **figures.at_least(target, ratio))


def index_rows(seconds: float, memory: float, samples: int) -> list[Figure]:
    return [Figure(case=f"first batch at 90% of an epoch of {samples}", unit="s", ours=seconds,
                   target=f"below {RESUME_SECONDS:g}", met=seconds < RESUME_SECONDS),
            Figure(case=f"memory of an index of {samples}", unit="MB", ours=memory, target=f"below {INDEX_MB:g}",
                   met=memory < INDEX_MB)]


def in_process(way: str, root: Path, args: argparse.Namespace) -> dict:
    options = [f"--{name}={getattr(args, name)}" for name in ("images", "workers", "batch", "samples")]
    command = [sys.executable, __file__, *options, "--part", way, str(root)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(time.ru_utime + time.ru_stime for time in times)


def measure(way: str, root: Path, args: argparse.Namespace) -> dict:
    """CPU and wall-clock seconds for one epoch of batches."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as training on a CPU does
    start, cpu = time.perf_counter(), cpu_seconds()
    seen = 0
    batches = BATCHES[way](root, args)
    while seen < args.images:
        images = next(batches)
        assert images.shape[1:] == (3, SIZE, SIZE) and images.dtype == torch.float32
        seen += len(images)
    del batches  # ends the workers, whose time counts when they have ended
    return {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - start}


def original_crop(image: Image.Image) -> Image.Image:
    """The original's random crop: resized as a whole, then cut."""
    image = resize_short_side(image, random.randint(round(SIZE / SCALE[1]), round(SIZE / SCALE[0])))
    left, top = random.randint(0, image.width - SIZE), random.randint(0, image.height - SIZE)
    return image.crop((left, top, left + SIZE, top + SIZE))


def original_transforms():
    return transforms.Compose([original_crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                               transforms.Normalize([0.5] * 3, [0.5] * 3)])


def torchvision_batches(root: Path, args: argparse.Namespace) -> Iterator[Tensor]:
    data = ImageFolder(root / "folder", original_transforms())
    for images, _ in DataLoader(data, args.batch, shuffle=True, num_workers=args.workers):
        yield images


def webdataset_batches(root: Path, args: argparse.Namespace) -> Iterator[Tensor]:
    tars = sorted(str(path) for path in (root / "shards").glob("*.tar"))
    data = wds.WebDataset(tars, shardshuffle=len(tars)).shuffle(1000).decode("pil").to_tuple("jpg", "cls")
    data = data.map_tuple(original_transforms(), int).batched(args.batch)
    for images, _ in wds.WebLoader(data, batch_size=None, num_workers=args.workers):
        yield images


def our_batches(root: Path, args: argparse.Namespace, decoding: str) -> Iterator[Tensor]:
    batches = ImageBatches(ShardIndex.open(root / "shards"), training_transform(SIZE, SCALE, True, decoding),
                           ReadingPlan(global_batch_size=args.batch, micro_batch_size=args.batch,
                                       stop_step=-(-args.images // args.batch)), seed=0, workers=args.workers)
    for batch in batches:
        yield batch["images"]


BATCHES = {"torchvision": torchvision_batches, "webdataset": webdataset_batches,
           "exact": functools.partial(our_batches, decoding="exact"),
           "fast": functools.partial(our_batches, decoding="fast")}


def resume(root: Path, args: argparse.Namespace) -> dict:
    """Seconds from opening the large index to the first batch at 90% of an epoch, and MB that the index takes."""
    before = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    start = time.perf_counter()
    index = ShardIndex.open(root / "large")
    memory = memory_mb("VmHWM") - before
    plan = ReadingPlan(global_batch_size=args.batch, micro_batch_size=args.batch,
                       start_step=int(0.9 * len(index)) // args.batch)
    batches = ImageBatches(index, training_transform(SIZE), plan, seed=0, workers=args.workers)
    batch = next(iter(batches))
    assert int(batch["position"][0]) == int(0.9 * len(index)) // args.batch * args.batch
    return {"seconds": time.perf_counter() - start, "memory": memory}


def memory_mb(name: str) -> float:
    """A figure of /proc/self/status in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024 / 1e6


def psnr_lines(shards: Path) -> list[str]:
    """PSNR of the mean squared error, and of the worst image, by whether images are decoded at a fraction."""
    index = ShardIndex.open(shards)
    exact, fast = (training_transform(SIZE, SCALE, True, decoding) for decoding in ("exact", "fast"))
    errors: dict[str, list[float]] = {}
    for i in range(len(index)):
        data = index.read(i)
        ways = [way.decode(data, index.key(i), np.random.default_rng(i)).double() for way in (exact, fast)]
        with open_image(data) as image:
            fraction = min(image.size) >= 2 * exact.draw(image.size, np.random.default_rng(i)).short_side
        errors.setdefault("at a fraction" if fraction else "whole", []).append(F.mse_loss(*ways).item())
    return [f"decoded {how}: {psnr(statistics.mean(found)):.1f} dB (worst {psnr(max(found)):.1f})"
            for how, found in sorted(errors.items())]


def psnr(error: float) -> float:
    return 10 * np.log10(255**2 / error)


if __name__ == "__main__":
    sys.exit(main())
