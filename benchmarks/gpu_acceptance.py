"""What works on this machine's GPU, what is wrong, and how fast it is: one command, eight minutes, a report to keep.

    python benchmarks/gpu_acceptance.py --out DIR [--minutes 8] [--wheels DIR] [--only SECTION ...]
    python benchmarks/gpu_acceptance.py --out DIR --device cpu --quick

Sections run in the order of their value, each in a process of its own. Each has a share of the time, which is printed
beforehand, and what one leaves over is there for those after it. DIR/report.md and DIR/report.json are written anew
after every section, so that what was found is kept whatever happens next; DIR/SECTION.log is what it printed. A section
that fails, hangs or is killed stops no other.

A checkout is enough, torch and what comes with `pip install gigatok_ds`, pytest and ninja; where the package itself is
not installed, put PYTHONPATH=. before the command. nvcc compiles the CUDA kernels (minutes on a few cores), unless
TORCH_EXTENSIONS_DIR holds a library that was compiled elsewhere for the same sources (there: GIGATOK_BUILD_CUDA=1
TORCH_CUDA_ARCH_LIST=9.0 TORCH_EXTENSIONS_DIR=DIR gigatok-ds doctor --build). Nothing is fetched. Sections that need
more say so, and take it from --wheels, a directory made by benchmarks/bundle_wheels.sh.

`--quick` runs each section in its smallest form, and on a CPU shows that this script works, nothing else.

Exit code 1: a section failed. A section that lacks something is skipped, which is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import machine
from acceptance import section
from acceptance.findings import Findings, read
from acceptance.report import Result, as_json, as_markdown, judged, table
from acceptance.sections import SECTIONS, TOTAL, Section, programs_path
from figures_report import facts, setting
from processes import CHECKOUT, last_line, placeless, run_script, watch

from gigatok_ds.errors import InputError
from gigatok_ds.files import write_atomically
from gigatok_ds.training.environment import anonymise


def run(name: str, entry: Section, options: argparse.Namespace, limit: float, environment: Mapping[str, str]) -> Result:
    """Run one section for at most `limit` seconds, or say what it lacks."""
    found = options.out / f"{name}.json"
    found.unlink(missing_ok=True)
    if reason := entry.missing(sys.path + environment["PYTHONPATH"].split(os.pathsep), environment["PATH"]):
        return Result(name=name, what=entry.what, status="skipped", why=reason, seconds=0.0, findings=Findings(found))
    log, start = options.out / f"{name}.log", time.monotonic()
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(options.out.resolve()), "--device",
               options.device,
               *(["--quick"] if options.quick else []), "--as-section", name, str(limit)]
    code = watch(command, log, limit, environment=environment,
                 tell=lambda seconds: print(f"    {seconds:.0f} s  {last_line(log)}", flush=True))
    findings = read(found)
    status, why = judged(code, findings, limit, last_line(log))
    return Result(name=name, what=entry.what, status=status, why=placeless(why), seconds=time.monotonic() - start,
                  findings=findings)


def run_all(names: list[str], options: argparse.Namespace, environment: Mapping[str, str]) -> list[Result]:
    seconds = shares(names, options.minutes)
    terms = " + ".join(f"{name} {share:.0f}" for name, share in seconds.items())
    print(f"{len(names)} sections, at most {options.minutes:g} minutes: {terms} = {sum(seconds.values()):.0f} s",
          flush=True)
    words = ["python", "benchmarks/gpu_acceptance.py", *map(anonymise, sys.argv[1:])]
    where = setting(shlex.join(words), options.quick, CHECKOUT)
    about = {"date": str(where.day), "command": f"`{where.command}`"} | facts(where)
    results: list[Result] = []
    begun, until = time.monotonic(), 0.0
    for number, name in enumerate(names, 1):
        until += seconds[name]
        limit = begun + until - time.monotonic()
        print(f"[{number}/{len(names)}] {name} (at most {limit:.0f} s): {SECTIONS[name].what}", flush=True)
        results.append(run(name, SECTIONS[name], options, limit, environment))
        print(f"    {results[-1].verdict} in {results[-1].seconds:.0f} s", flush=True)
        to_come = names[number:]
        encoded = json.dumps(as_json(about, results, to_come), indent=1) + "\n"
        write_atomically(options.out / "report.md", as_markdown(about, results, to_come).encode())
        write_atomically(options.out / "report.json", encoded.encode())
    return results


def shares(names: Sequence[str], minutes: float) -> dict[str, float]:
    """Seconds of each section. If some are left out, the others have their shares."""
    asked = sum(SECTIONS[name].share for name in names)
    return {name: 60 * minutes * SECTIONS[name].share / asked for name in names}


@contextmanager
def surroundings(wheels: Path | None) -> Iterator[dict[str, str]]:
    """Variables of the sections' processes: this checkout, and what is in the wheels, can be imported."""
    with tempfile.TemporaryDirectory(prefix="gigatok-wheels-") as folder:
        paths = [str(CHECKOUT), str(CHECKOUT / "tests" / "helpers")]
        if wheels is not None:
            install(wheels, Path(folder))
            paths.append(folder)
        yield {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
               "PATH": programs_path(), "DS_IGNORE_CUDA_DETECTION": "1"}


def install(wheels: Path, folder: Path) -> None:
    """Install all wheels of one directory into another, without network. Raises InputError when pip refuses them."""
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        raise InputError(f"--wheels is {wheels}, in which there is no .whl file; make it with "
                         "benchmarks/bundle_wheels.sh")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target",
           str(folder)]
    finished = subprocess.run([*pip, *found], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if finished.returncode:
        reason = next((line for line in finished.stderr.splitlines() if line.startswith("ERROR")),
                      finished.stderr.strip()[-200:])
        raise InputError(f"--wheels is {wheels}, which pip cannot install for this Python: {reason}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:15} {entry.share:3.0f} s  {entry.what}" for name, entry in SECTIONS.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"Sections, and their shares of {TOTAL:.0f} "
                                                                 f"seconds:\n{listed}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the report is written")
    parser.add_argument("--minutes", type=float, default=TOTAL / 60, metavar="N",
                        help="of all sections together (default: %(default)g)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="each section in its smallest form")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of packages that this machine lacks")
    parser.add_argument("--only", nargs="+", metavar="SECTION", choices=SECTIONS, help="run these alone")
    parser.add_argument("--as-section", nargs=2, metavar=("SECTION", "SECONDS"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        raise InputError(f"--minutes is {options.minutes:g}; it must be above 0")
    if options.device == "cuda" and not options.as_section and not machine.gpus():
        raise InputError("--device is cuda, but torch sees no GPU; with --device cpu --quick all sections run in a "
                         "small form")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    if options.as_section:
        return section.run(*options.as_section, options)
    options.out.mkdir(parents=True, exist_ok=True)
    with surroundings(options.wheels) as environment:
        results = run_all(list(dict.fromkeys(options.only or SECTIONS)), options, environment)
    print(f"\n{table(results)}\n\n{options.out / 'report.md'}")
    return 1 if any(result.status == "failed" for result in results) else 0


if __name__ == "__main__":
    run_script("gpu_acceptance.py", main)
