"""Runs all benchmarks, one after the other, and writes a dated Markdown report: machine, commit, and one table of
ratios.

    python benchmarks/run_all.py [--quick] [--only NAME ...] [--out FILE] [--limit MINUTES]

Each is a process of its own, measures ours and a reference in turns, and hands its figures over as JSON. The report
(benchmarks/results/DATE-MACHINE.md) is written anew after each, so that what was measured is kept whatever happens
next; what a benchmark printed, and its figures as JSON, are in the folder beside it. What a benchmark needs and is not
there (a GPU, a CUDA toolkit, a package) leaves it out, with the reason. Nothing else should use the machine meanwhile.

Exit code 1: a benchmark failed; the others are run all the same. A missed target is told in the table and is no
failure.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import figures
import machine
from benchmark_list import BENCHMARKS, LONG, Benchmark
from figures_report import Result, Setting, report, setting
from processes import last_line, run_script, watch

from gigatok_ds.errors import InputError
from gigatok_ds.files import write_atomically
from gigatok_ds.training.environment import anonymise

HERE = Path(__file__).resolve().parent


def run(name: str, benchmark: Benchmark, folder: Path, *, quick: bool, limit: float) -> Result:
    """Run one benchmark for at most `limit` seconds."""
    words = benchmark.words(quick=quick)
    told, log = folder / f"{name}.json", folder / f"{name}.txt"
    told.unlink(missing_ok=True)
    start = time.monotonic()
    code = watch([sys.executable, str(HERE / benchmark.script), *words, "--json", str(told)], log, limit,
                 environment={} if benchmark.gpus else {"CUDA_VISIBLE_DEVICES": ""},
                 tell=lambda seconds: print(f"    {seconds / 60:.1f} min  {last_line(log)}", flush=True))
    outcome = figures.read(told) if told.exists() else figures.Outcome()
    return Result(name=name, command=shlex.join(["python", f"benchmarks/{benchmark.script}", *words]), outcome=outcome,
                  minutes=(time.monotonic() - start) / 60, failure=failure(code, outcome, log, limit))


def failure(code: int | None, outcome: figures.Outcome, log: Path, limit: float) -> str | None:
    """Why a benchmark counts as failed. Exit code 1 with figures is a missed target, which is in the table."""
    if code is None:
        return f"stopped after {limit / 60:g} minutes (--limit)"
    if outcome.skipped is not None:
        return None
    if outcome.problems:
        return "; ".join(outcome.problems)
    if outcome.figures and code in (0, 1):
        return None
    return f"exit code {code}: {last_line(log) or 'it said nothing'}"


def run_all(names: list[str], where: Setting, out: Path, limit: float) -> list[Result]:
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    can_run = [name for name in names if BENCHMARKS[name].missing(len(where.gpus)) is None]
    if not where.quick:
        minutes = sum(BENCHMARKS[name].minutes for name in can_run)
        print(f"{len(can_run)} benchmarks, on two cores about {minutes:g} minutes", flush=True)
    for number, name in enumerate(names, 1):
        benchmark = BENCHMARKS[name]
        about = "" if where.quick else f" (about {benchmark.minutes:g} min)"
        print(f"[{number}/{len(names)}] {name}{about}: {benchmark.measures}", flush=True)
        if reason := benchmark.missing(len(where.gpus)):
            results.append(Result(name=name, command="", outcome=figures.Outcome(skipped=reason)))
        else:
            results.append(run(name, benchmark, folder, quick=where.quick, limit=limit))
        print(f"    {verdict(results[-1])}", flush=True)
        write_atomically(out, report(where, results, len(names) - number).encode())
    return results


def verdict(result: Result) -> str:
    if result.failure:
        return f"FAILED: {result.failure}"
    if result.outcome.skipped is not None:
        return f"skipped: {result.outcome.skipped}"
    met = [figure.met for figure in result.outcome.figures if figure.met is not None]
    return f"{len(result.outcome.figures)} figures in {result.minutes:.1f} min; {sum(met)} of {len(met)} targets met"


def free_name(where: Setting) -> Path:
    """A report's path that nothing has yet."""
    stem = f"{where.day}-{machine.slug(where.gpus)}{'-quick' if where.quick else ''}"
    names = (HERE / "results" / f"{stem}{f'-{number}' if number > 1 else ''}.md" for number in range(1, sys.maxsize))
    return next(path for path in names if not path.exists() and not path.with_suffix("").exists())


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    listed = [f"  {name:19} {benchmark.measures}" for name, benchmark in BENCHMARKS.items()]
    listed += ["", "Left out, since they are long proofs and no ratios; run them by themselves:"]
    listed += [f"  python benchmarks/{script:17} {what}" for script, what in LONG.items()]
    parser = argparse.ArgumentParser(description=__doc__, epilog="Benchmarks:\n" + "\n".join(listed),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="the smallest settings, for a look at whether everything works: figures mean little")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=BENCHMARKS, help="run these alone")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the report, ending in .md; one that is there is "
                                                                 "replaced "
                        "(default: a new benchmarks/results/DATE-MACHINE.md)")
    parser.add_argument("--limit", type=float, default=30.0, metavar="MINUTES",
                        help="of a benchmark; one that takes longer "
                        "is stopped and counts as failed (default: %(default)g)")
    arguments = parser.parse_args(argv)
    if arguments.out and arguments.out.suffix != ".md":
        raise InputError(f"--out is {arguments.out}; the report is Markdown, so give a name that ends in .md")
    if not arguments.limit > 0:
        raise InputError(f"--limit is {arguments.limit:g} minutes; it must be above 0")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    words = sys.argv[1:] if argv is None else argv
    where = setting(shlex.join(["python", "benchmarks/run_all.py", *map(anonymise, words)]), arguments.quick,
                    HERE.parent)
    out = arguments.out or free_name(where)
    names = list(dict.fromkeys(arguments.only or BENCHMARKS))
    if where.load > machine.cores() / 4:
        print(f"the load of this machine is {where.load:.1f}: figures of a busy machine are not worth keeping",
              flush=True)
    results = run_all(names, where, out, 60 * arguments.limit)
    failed = [result.name for result in results if result.failure]
    print(f"{out}\n" + (f"failed: {', '.join(failed)}" if failed else "no benchmark failed"))
    return 1 if failed else 0


if __name__ == "__main__":
    run_script("run_all.py", main)
