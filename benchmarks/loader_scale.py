"""Part of loader.py: what an index of very many samples takes of a host, and how long a start waits for it.

Each rank is a process with data workers of its own. Memory is what all of them hold for themselves (anonymous and
shared memory of /proc, which counts a page of several processes once), less the same with a small index, and the whole
file of the index, which they share.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from datetime import date
from pathlib import Path

import figures
import torch.distributed as dist
from figures import Figure
from loader_data import make_large_index, make_small_images
from machine import processor

from gigatok_ds.cluster.local_job import free_port
from gigatok_ds.cluster.share import Share
from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.loader import ImageBatches
from gigatok_ds.data.reader import ReadingPlan
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.shards.contents import TABLE_FILE
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.remote import open_shards
from gigatok_ds.training.data_record import check_identity, write_identity

PER_TAR = 10_000
BYTES, SECONDS = 40.0, 30.0


def report(root: Path, args: Namespace) -> int:
    per_tar = min(PER_TAR, args.samples)
    tiny = make_small_images(root, per_tar)
    start = time.perf_counter()
    for name, count in (("few", per_tar), ("many", args.samples)):
        make_large_index(tiny, root / name, count)
    samples = len(ShardIndex.open(root / "many"))
    print(f"{date.today()}  python benchmarks/loader.py {' '.join(sys.argv[1:])}".rstrip())
    print(f"{processor()}, {os.cpu_count()} threads; {args.ranks} ranks of a host, {args.workers} workers each; "
          f"{samples} samples in {samples // per_tar} tars (index written in {time.perf_counter() - start:.0f} s)")
    few, many = (measured(root / name, root / f"run-{name}", args) for name in ("few", "many"))
    file = (root / "many" / TABLE_FILE).stat().st_size
    own = max(many["memory"] - few["memory"], 0)
    took = {name: max(rank[name] for rank in many["ranks"]) for name in ("opened", "agreed", "first")}
    said = many["ranks"][0]["said"]
    print(f"  memory of the host: {(own + file) / samples:.1f} bytes a sample: {file / samples:.1f} in the file, "
          f"{own / samples:.1f} of processes' own")
    print(f"  slowest rank: opened after {took['opened']:.1f} s, agreed after {took['agreed'] - took['opened']:.2f} s "
          f"more, first batch at 90% of an epoch after {took['first']:.1f} s in all")
    print(f"  ranks agree in 3 collectives (2 broadcasts, a maximum of one number): the first rank sends {said} bytes, "
          f"whatever the number of samples; the first of a host asks for the size of each of {samples // per_tar} tars")
    rows = [Figure(case=f"host memory of an index of {samples} samples", unit="bytes/sample",
                   ours=(own + file) / samples, target=f"at most {BYTES:g}", met=(own + file) / samples <= BYTES),
            Figure(case=f"first batch at 90% of an epoch of {samples}", unit="s", ours=took["first"],
                   target=f"below {SECONDS:g}", met=took["first"] < SECONDS)]
    figures.write(args.json, rows)
    met = all(row.met for row in rows)
    print(f"targets ({BYTES:g} bytes a sample, {SECONDS:g} s): {'met' if met else 'missed'}")
    return 0 if met else 1


def measured(shards: Path, run: Path, args: Namespace) -> dict:
    """What the ranks tell, and the bytes that they and their workers hold once each has its first batch."""
    run.mkdir()
    write_identity({"train": ShardIndex.open(shards).identity()}, run)
    meeting = {"WORLD_SIZE": str(args.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
               "LOCAL_WORLD_SIZE": str(args.ranks), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(Path(__file__).with_name("loader.py")), f"--workers={args.workers}",
               f"--batch={args.batch}", "--part", "rank", str(shards), str(run)]
    ranks = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              env=os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
             for rank in range(args.ranks)]
    try:
        told = [json.loads(rank.stdout.readline()) for rank in ranks]
        return {"ranks": told, "memory": sum(own_bytes(pid) for rank in ranks for pid in family(rank.pid))}
    finally:
        for rank in ranks:
            rank.communicate()  # ends its input, upon which it ends


def rank(shards: Path, run: Path, args: Namespace) -> None:
    """Open, agree, read the first batch as a training run does; tell the seconds, and wait."""
    dist.init_process_group("gloo")
    topology = Topology(rank=dist.get_rank(), world_size=dist.get_world_size(), device="cpu",
                        data_rank=dist.get_rank(), data_size=dist.get_world_size())
    topology.barrier()
    start = time.perf_counter()
    index = open_shards(shards)
    opened = time.perf_counter() - start
    identity = {"train": index.identity()}
    check_identity(identity, run, topology)
    topology.barrier()
    agreed = time.perf_counter() - start
    plan = ReadingPlan(global_batch_size=args.batch * topology.world_size, micro_batch_size=args.batch,
                       share=Share(rank=topology.rank, size=topology.world_size),
                       start_step=int(0.9 * len(index)) // (args.batch * topology.world_size))
    batches = iter(ImageBatches(index, training_transform(32), plan, seed=0, workers=args.workers, num_classes=1000))
    batch = next(batches)
    assert len(batch["images"]) == args.batch
    print(json.dumps({"opened": opened, "agreed": agreed, "first": time.perf_counter() - start,
                      "said": len(json.dumps(identity))}), flush=True)
    sys.stdin.read()
    del batches
    dist.destroy_process_group()


def family(pid: int) -> list[int]:
    """A process and those it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(own for child in children for own in family(int(child)))]


def own_bytes(pid: int) -> int:
    """Memory of a process that is no file's, its share of what several hold."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(found) * 1024 for found in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB", rollup, re.M))
