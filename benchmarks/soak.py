"""An hour of training in which a random fault happens every minute, beside the same steps left in peace.

    python benchmarks/soak.py [--minutes 60] [--mean 60] [--ranks 4] [--steps 1300] [--seed 0] [--zero 2] [--keep DIR]

The demo's tokenizer with its discriminator trains on handwritten digits through launch/train.sh --max-restarts. Faults
(gigatok-ds train --inject; kinds and ranks drawn from the seed, times from an exponential distribution) strike until
the minutes are over; whoever is slow strikes all along, so that there are enough steps for an hour. Ranks that are
killed, raise, hang or drift, and data workers that are killed or stop, are the launcher's business. A run that was
asked to stop (exit code 75), or that ends for a NaN (faults.in_a_row=1, exit code 2), is started again here, as a
scheduler or a user would.

Exit code 1: the run did not end, its last checkpoint or its losses differ in a bit from those of the undisturbed run,
or a process, a file of shared memory or a temporary file is left.
"""

from __future__ import annotations

import argparse
import collections
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from gigatok_ds.checkpoint.run_directory import newest_checkpoint, read_state
from gigatok_ds.cluster.local_job import free_port
from gigatok_ds.demo.source import digits_source
from gigatok_ds.monitoring.history import read_history
from gigatok_ds.monitoring.metrics import of_the_machine, read_metrics
from gigatok_ds.packing.shard_writer import write_shards
from gigatok_ds.resilience.preemption import REQUEUE

CHECKOUT = Path(__file__).resolve().parents[1]
KINDS = ("kill", "raise", "hang", "term", "usr1", "kill-worker", "hang-worker", "kill-saving", "nan", "drift")
STARTED_HERE = (REQUEUE, 2)  # exit codes that the launcher leaves to others
MOST_STARTS = 200
IMAGE_SIZE = 32
# Of temporary files: what torch compiled, and those of a compiler that was killed when DeepSpeed asked what it can do.
EXPECTED = re.compile(r"torchinductor_.*|cc\w{6}\.(s|o|res|c|ld|le)")


def schedule(minutes: float, mean: float, ranks: int, seed: int) -> list[str]:
    """Faults by the time at which they strike, in seconds since the run was first started."""
    draw, faults, when = random.Random(seed), [], 0.0
    while (when := when + draw.expovariate(1 / mean)) < 60 * minutes:
        faults.append(f"{draw.choice(KINDS)}:rank={draw.randrange(ranks)},after={when:.1f}")
    return faults


class Soak:
    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder, self.options = folder, options
        source = digits_source(IMAGE_SIZE)
        for split, samples in (("train", source.train), ("validation", source.test)):
            if not (folder / split).exists():
                write_shards(samples(), folder / split, prefix=source.name, classes=source.classes)

    def launch(self, out: str, faults: list[str]) -> int:
        """One start of the launcher, which starts ranks as often as it sees fit; its exit code."""
        steps = self.options.steps
        settings = [f"data.train={self.folder / 'train'}", f"data.validation={self.folder / 'validation'}",
                    f"training.steps={steps}", f"training.validate_every={steps}", "training.log_every=1",
                    "training.ema_decay=0.99", f"loss.adversarial.start_step={steps // 3}",
                    f"loss.auxiliary.end_step={steps // 2}", "checkpoint.every=10", "checkpoint.keep=2",
                    "data.workers=1", "monitor.stall_seconds=20", "faults.in_a_row=1"]
        command = [CHECKOUT / "launch" / "train.sh", "--max-restarts", "20", "demo_tokenizer", "--out",
                   self.folder / out, "--zero", str(self.options.zero), *settings,
                   *(word for fault in faults for word in ("--inject", fault))]
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "GPUS": str(self.options.ranks), "MASTER_PORT": str(free_port()),
            "TMPDIR": str(temporary), "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        with open(self.folder / f"{out}.log", "ab") as log:
            return subprocess.run(list(map(str, command)), env=environment, stdout=log, stderr=log,
                                  check=False).returncode

    def until_done(self, out: str, faults: list[str]) -> collections.Counter:
        """Start until the run has finished; how the launcher's tries ended, by exit code."""
        codes: collections.Counter = collections.Counter()
        while codes[0] == 0:
            code = self.launch(out, faults)
            codes[code] += 1
            print(f"{time.strftime('%H:%M:%S')} {out}: the launcher ended with exit code {code}", flush=True)
            if code not in (0, *STARTED_HERE) or codes.total() == MOST_STARTS:
                raise SystemExit(f"soak.py: {out} does not go on; see {self.folder / out}.log")
        return codes

    def differences(self) -> list[str]:
        """What is not, bit for bit, as in the undisturbed run."""
        states = [read_state(newest_checkpoint(self.folder / out)) for out in ("disturbed", "undisturbed")]
        own = ("recipe.yaml", "deepspeed.json", "environment.json")
        files = [{name: digest for name, digest in state.files.items() if name not in own} for state in states]
        found = [f"{name} of the last checkpoint differs" for name in sorted(files[0].keys() | files[1].keys())
                 if files[0].get(name) != files[1].get(name)]
        curves = [self._curve(out) for out in ("disturbed", "undisturbed")]
        if curves[0] != curves[1]:
            found.append("what was logged differs")
        return found + (["the last steps differ"] if states[0].step != states[1].step else [])

    def _curve(self, out: str) -> list[dict]:
        return [{name: value for name, value in line.items() if not of_the_machine(name)}
                for line in read_metrics(self.folder / out) if "warning" not in line]

    def leftovers(self, shared_before: set[str]) -> list[str]:
        found = [f"process {pid}" for pid in filter(str.isdigit, os.listdir("/proc"))
                 if str(self.folder / "disturbed").encode() in _command_line(pid)]
        found += [f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - shared_before]
        found += [str(path) for path in (self.folder / "tmp").iterdir() if not EXPECTED.fullmatch(path.name)]
        return found + [str(path) for path in (self.folder / "disturbed").rglob("*partial*")]


def _command_line(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def report(soak: Soak, codes: collections.Counter, seconds: dict[str, float], problems: list[str]) -> str:
    history, options = read_history(soak.folder / "disturbed"), soak.options
    struck = [line["fault"].partition(":")[0] for line in history if line["event"] == "injected"]
    starts = [line for line in history if line["event"] == "started"]
    lines = [
        f"benchmarks/soak.py, {date.today()}, {platform.machine()}, {os.cpu_count()} cores, {options.ranks} ranks, "
        f"ZeRO {options.zero}, seed {options.seed}",
        f"{options.steps} steps of demo_tokenizer, a checkpoint every 10: {seconds['disturbed'] / 60:.1f} minutes with "
        f"{len(struck)} faults and {len(starts)} starts, {seconds['undisturbed'] / 60:.1f} without",
        "faults: " + ", ".join(f"{count} {kind}" for kind, count in sorted(collections.Counter(struck).items())),
        "the launcher ended by "
        + ", ".join(f"exit code {code}: {count}" for code, count in sorted(codes.items()) if count),
        "last checkpoint, loss curve, leftovers: " + ("; ".join(problems) or "the same bits, the same lines, none"),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long faults strike")
    parser.add_argument("--mean", type=float, default=60.0, help="seconds between faults, on average")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zero", type=int, default=2)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there, and leave both runs")
    options = parser.parse_args()
    shared_before = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        folder = (options.keep or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        soak, seconds = Soak(folder, options), {}
        faults = schedule(options.minutes, options.mean, options.ranks, options.seed)
        slow = "slow:rank=0,step=1"
        began = time.monotonic()
        codes = soak.until_done("disturbed", [slow, *faults])
        seconds["disturbed"] = time.monotonic() - began
        problems = soak.leftovers(shared_before)
        began = time.monotonic()
        soak.until_done("undisturbed", [])
        seconds["undisturbed"] = time.monotonic() - began
        problems = [*soak.differences(), *problems]
        print(report(soak, codes, seconds, problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
