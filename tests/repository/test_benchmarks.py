"""benchmarks/run_all.py: what it runs, what it does with failures, and the report that it writes."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmark_scripts import BENCHMARKS, loaded

SCRIPT = BENCHMARKS / "run_all.py"
FIGURES = f"""
import argparse, subprocess, sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
import figures
parser = argparse.ArgumentParser()
figures.add_option(parser)
path = parser.parse_args().json
"""
ROW = ("figures.Figure(case='a|b', unit='ms', ours=2, reference=3, reference_name='theirs', ratio=1.5, "
       "direction='x faster', ")


@pytest.fixture(scope="module")
def run_all():
    with loaded("run_all") as module:
        yield module


@pytest.fixture
def script(run_all, monkeypatch, tmp_path):
    """Puts a script of the given text into the list, under its name."""
    def add(name, text, **needs):
        path = tmp_path / f"{name}.py"
        path.write_text(FIGURES + text)
        known[name] = run_all.Benchmark(script=str(path), measures="nothing", minutes=1, **needs)

    known = {}
    monkeypatch.setattr(run_all, "BENCHMARKS", known)
    return add


def table(report):
    """The rows of the report's table, as lists of cells."""
    lines = [line for line in report.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_every_script_is_run_or_named_as_a_long_proof(run_all):
    scripts = {path.name for path in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert scripts == {benchmark.script for benchmark
                       in run_all.BENCHMARKS.values()} | set(run_all.LONG) | {SCRIPT.name}


def test_the_help_names_all_of_them(run_all, capsys):
    with pytest.raises(SystemExit):
        run_all.main(["--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in [*run_all.BENCHMARKS, *run_all.LONG])


@pytest.mark.slow
def test_two_benchmarks_in_their_quick_form(tmp_path):
    report = tmp_path / "report.md"
    finished = subprocess.run([sys.executable, SCRIPT, "--quick", "--only", "cross-entropy", "sampling", "--out",
                               report],
                              capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    head, _, *rows = table(report)
    assert head == ["benchmark", "case", "ours", "reference", "ratio", "notes"]
    assert [row[0] for row in rows] == ["cross-entropy"] * 2 + ["sampling"] * 3
    for row in rows:
        ours, reference, ratio = (float(cell.split()[0].replace(",", "")) for cell in row[2:5])
        of_ours = reference / ours if row[2].split()[1] != "codes/s" else ours / reference
        assert ours > 0 and ratio == pytest.approx(of_ours, rel=0.02) and row[4].split(" ", 1)[1] in ("x faster",
                                                                                                      "x smaller")
    text = report.read_text()
    assert "quick: figures mean little" in text and "Unfinished" not in text
    for fact in ("- machine: ", " cores", "- commit: ", "torch ", "deepspeed ", "megatron-core ",
                 "python benchmarks/soak.py"):
        assert fact in text, fact
    left = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert left == ["cross-entropy.json", "cross-entropy.txt", "sampling.json", "sampling.txt"]
    assert "all logits, float32" in (tmp_path / "report" / "cross-entropy.txt").read_text()


@pytest.mark.slow
def test_all_that_need_no_gpu_run_in_their_quick_form(run_all, tmp_path):
    names = [name for name, benchmark in run_all.BENCHMARKS.items() if not benchmark.gpus]
    finished = subprocess.run([sys.executable, SCRIPT, "--quick", "--only", *names, "--out", tmp_path / "report.md"],
                              capture_output=True, text=True, check=False, timeout=3600)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert {row[0] for row in table(tmp_path / "report.md")[2:]} == set(names)


def test_a_failure_is_named_and_the_others_are_run(run_all, script, tmp_path, capsys):
    script("missing-its-target", f"figures.write(path, [{ROW} target='at least 2', met=False)])\nsys.exit(1)")
    script("crashing", "sys.exit('no such thing')")
    script("void", f"figures.write(path, [{ROW})], ['the sides differ'])\nsys.exit(1)")
    script("skipping", "figures.skip(path, 'no toolkit')\nsys.exit(2)")
    script("on-gpus", "", gpus=1000)
    script("of-a-package", "", packages=("no_such_package",))
    report = tmp_path / "all.md"
    assert run_all.main(["--out", str(report)]) == 1
    rows = {(row[0], row[1]): row[2:] for row in table(report)[2:]}
    assert rows == {
        ("missing-its-target", r"a\|b"): ["2 ms", "3 ms (theirs)", "1.5 x faster", "target at least 2: **missed**"],
        ("crashing", "**failed**"): ["", "", "", "exit code 1: no such thing"],
        ("void", r"a\|b"): ["2 ms", "3 ms (theirs)", "1.5 x faster", ""],
        ("void", "**failed**"): ["", "", "", "the sides differ"],
        ("skipping", "skipped"): ["", "", "", "no toolkit"],
        ("on-gpus", "skipped"): ["", "", "", rows["on-gpus", "skipped"][-1]],
        ("of-a-package", "skipped"): ["", "", "", "needs no_such_package: pip install 'gigatok_ds[test]'"],
    }
    assert "needs 1000 GPUs" in rows["on-gpus", "skipped"][-1]
    told = capsys.readouterr().out
    assert "[2/6] crashing" in told and "failed: crashing, void" in told

    assert run_all.main(["--out", str(report), "--only", "missing-its-target", "skipping"]) == 0
    assert len(table(report)) == 4


def test_the_report_is_whole_after_each_benchmark(run_all, script, tmp_path):
    """The second one looks at the report of the first."""
    report = tmp_path / "all.md"
    script("first", f"figures.write(path, [{ROW})])")
    script("second", f"print(open({str(report)!r}).read())\nfigures.write(path, [{ROW})])")
    assert run_all.main(["--out", str(report)]) == 0
    seen = (tmp_path / "all" / "second.txt").read_text()
    assert "| first |" in seen and "1 benchmarks are still to come" in seen
    assert "still to come" not in report.read_text()


def test_one_that_hangs_is_ended_with_what_it_started(run_all, script, tmp_path):
    script("hanging", "child = subprocess.Popen(['sleep', '600'])\nprint(child.pid, flush=True)\ntime.sleep(600)")
    report = tmp_path / "all.md"
    assert run_all.main(["--out", str(report), "--limit", "0.05"]) == 1
    assert table(report)[2][-1] == "stopped after 0.05 minutes (--limit)"
    child = Path("/proc", (tmp_path / "all" / "hanging.txt").read_text().strip(), "stat")
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_report_never_takes_the_place_of_another(run_all, monkeypatch, tmp_path):
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    where = run_all.Setting(command="", quick=False, commit=None, modified=False, gpus=["NVIDIA H100"], load=0.0)
    first = run_all.free_name(where)
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d-[a-z0-9-]+-{len(os.sched_getaffinity(0))}-cores-1x-nvidia-h100\.md",
                        first.name)
    first.touch()
    assert run_all.free_name(where).name == first.name.replace(".md", "-2.md")


@pytest.mark.parametrize("words, told", [(["--out", "report.txt"], "ends in .md"), (["--limit", "0"], "above 0")])
def test_bad_options_are_refused(run_all, words, told):
    with pytest.raises(ValueError, match=told):
        run_all.main(words)


def test_the_rows_of_a_step_hold_its_target():
    options = SimpleNamespace(recipe="VQ_SS256", batch=1, precision="fp32", zero=0, overrides=[])
    found = {"ours": {"seconds": 2.0, "peak_gb": 5.0, "flops": 0},
             "plain": {"seconds": 2.5, "peak_gb": 10.0, "flops": 10**12}}
    with loaded("tokenizer_step") as tokenizer_step:
        time, memory = tokenizer_step.rows("auxiliary", found, "cpu", options)
    assert (time.ours, time.reference, time.unit, time.ratio, time.direction) == (2000, 2500, "ms", 1.25, "x faster")
    assert (time.target, time.met) == ("at least 1.3", False) and "0.5 TFLOP/s" in time.notes
    assert (memory.ratio, memory.direction, memory.met) == (2.0, "x smaller", None)


def test_the_rows_of_a_zero_stage_say_whether_the_theory_holds():
    with loaded("zero_memory") as zero_memory:
        theory = zero_memory.theoretical_bytes(10**6, 1, 4, "bf16")
        options = SimpleNamespace(size="tiny", ranks=4, precision="bf16")
        for factor, met in ((1.0, True), (1.2, False)):
            held = {kind: round(factor * value) for kind, value in theory.items()}
            measured = zero_memory.Measurement(parameters=10**6, device="CPU", measured=held | {"other": 0}, peak=held)
            row = zero_memory.figure(1, zero_memory.rows(measured, theory), options)
            assert (row.ratio, row.met) == (pytest.approx(factor, rel=1e-6), met)
            assert row.reference == pytest.approx(7.0)  # MB: 2 and 2 bytes per parameter, and a quarter of 12
