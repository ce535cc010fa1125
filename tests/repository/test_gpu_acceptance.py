"""benchmarks/gpu_acceptance.py: its sections in their small form, and what becomes of those that fail, hang or are
killed.
"""

import json
import os
import subprocess
import sys
import textwrap
import zipfile

import pytest
from benchmark_scripts import BENCHMARKS, loaded

SCRIPT = BENCHMARKS / "gpu_acceptance.py"


@pytest.fixture
def acceptance(monkeypatch, tmp_path):
    """The script, and a way to give it sections of the given text instead of its own."""
    with loaded("gpu_acceptance") as module:
        sections = sys.modules["acceptance.sections"]
        known, folder = {}, tmp_path / "sections"
        (folder / "acceptance").mkdir(parents=True)
        # In the section's process: that folder's modules are part of the package.
        monkeypatch.setenv("PYTHONPATH", str(folder))
        (folder / "sitecustomize.py").write_text(textwrap.dedent(f"""
            import os, sys
            if "--as-section" in sys.argv:
                sys.path.insert(0, {str(BENCHMARKS)!r})
                import acceptance, acceptance.sections as sections
                acceptance.__path__.append({str(folder / "acceptance")!r})
                name = sys.argv[sys.argv.index("--as-section") + 1]
                sections.SECTIONS[name] = sections.Section(module="made_up_" + name, what="", share=1)
        """))

        def add(name, text="", share=1.0, **needs):
            path = folder / "acceptance" / f"made_up_{name}.py"
            body = textwrap.indent(text, "    ")
            path.write_text(f"import os, signal, subprocess, sys, time\n\ndef run(setting, found):\n{body}\n    "
                            "return\n")
            known[name] = sections.Section(module=f"made_up_{name}", what=f"about {name}", share=share, **needs)

        monkeypatch.setattr(module, "SECTIONS", known)
        module.add = add
        yield module


def outcome(out):
    report = json.loads((out / "report.json").read_text())
    return {section["name"]: section for section in report["sections"]}, report["unfinished"]


def test_what_fails_hangs_or_is_killed_leaves_the_others_results_and_a_truthful_table(acceptance, tmp_path, capsys):
    acceptance.add(
        "good", "found.check('one', True)\nfound.figure('speed', 1234.5, 'codes/s', 'fast')\nfound.note('a fact')"
    )
    acceptance.add("wrong", "found.check('two', True)\nfound.check('three', False, '5 is not 6')")
    acceptance.add("raising", "found.check('four', True)\nraise ValueError('a|b went wrong')")
    acceptance.add("killed", "found.figure('so far', 3, 'ms')\nos.kill(os.getpid(), signal.SIGKILL)")
    acceptance.add("lacking", "found.lacks('no such thing here')")
    acceptance.add("partly", "found.check('five', True)\nfound.lacks('the rest')")
    acceptance.add("package", packages=("no_such_package",))
    acceptance.add("program", programs=("no-such-program",))
    acceptance.add("hanging", "found.check('six', True)\nchild = subprocess.Popen(['sleep', '600'])\n"
                   "print(child.pid, flush=True)\ntime.sleep(600)")
    acceptance.add("last", "found.check('seven', True)", share=40.0)
    out = tmp_path / "out"
    assert acceptance.main(["--device", "cpu", "--out", str(out), "--minutes", "2"]) == 1
    found, unfinished = outcome(out)
    assert {name: section["status"] for name, section in found.items()} == {
        "good": "passed", "wrong": "failed", "raising": "failed", "killed": "failed", "lacking": "skipped",
        "partly": "passed", "package": "skipped", "program": "skipped", "hanging": "failed", "last": "passed"}
    assert unfinished == []
    why = {name: section["why"] for name, section in found.items()}
    assert why["wrong"] == "three: 5 is not 6" and why["raising"] == "exit code 1: ValueError: a|b went wrong"
    assert why["killed"] == "killed by signal 9" and why["hanging"].startswith("stopped at the end of its time")
    assert why["partly"] == "the rest" and why["lacking"] == "no such thing here"
    assert why["package"] == "needs no_such_package: --wheels DIR, made by benchmarks/bundle_wheels.sh"
    assert why["program"] == "needs no-such-program, which is not on the PATH"
    assert [check["name"] for check in found["hanging"]["checks"]] == ["six"]  # what was found before
    assert found["killed"]["figures"][0]["value"] == 3
    assert not alive((out / "hanging.log").read_text().split()[0])
    report, told = (out / "report.md").read_text(), capsys.readouterr().out
    row = r"| raising | **failed**: exit code 1: ValueError: a\|b went wrong |"
    assert row in report and row in told
    assert "| good | passed |" in report and "1 of 1 checks hold; speed 1,234 codes/s |" in report
    assert "- holds: two" in report and "- **does not hold**: three: 5 is not 6" in report and "- a fact" in report


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_report_is_whole_after_each_section(acceptance, tmp_path):
    """The second section looks at the report of the first."""
    out = tmp_path / "out"
    acceptance.add("first", "found.check('one', True)", share=20)
    acceptance.add("second", f"print(open({str(out / 'report.md')!r}).read())\nfound.check('two', True)", share=20)
    assert acceptance.main(["--device", "cpu", "--out", str(out)]) == 0
    seen = (out / "second.log").read_text()
    assert "- holds: one" in seen and "**Unfinished: second is still to come.**" in seen
    assert "Unfinished" not in (out / "report.md").read_text()


def test_shares_are_told_beforehand_and_add_up(acceptance, tmp_path, capsys):
    for name, share in (("a", 10), ("b", 30), ("c", 60)):
        acceptance.add(name, "found.lacks('nothing')", share=share)
    assert acceptance.main(["--device", "cpu", "--out", str(tmp_path / "out"), "--minutes", "4", "--only", "a",
                            "b"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "2 sections, at most 4 minutes: a 60 + b 180 = 240 s"
    assert told[1] == "[1/2] a (at most 60 s): about a"
    left = float(told[3].partition("at most ")[2].split()[0])
    assert 180 < left <= 240  # what the first has left over


def test_eight_minutes_are_what_the_sections_have():
    with loaded("gpu_acceptance") as module:
        assert sum(module.shares(list(module.SECTIONS), 8).values()) == pytest.approx(480) and module.TOTAL == 480


def test_packages_come_from_wheels(acceptance, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried_along-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_along/__init__.py", "VALUE = 7\n")
        wheel.writestr("carried_along-1.0.dist-info/METADATA",
                       "Metadata-Version: 2.1\nName: carried-along\nVersion: 1.0\n")
        wheel.writestr("carried_along-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: "
                                                            "py3-none-any\n")
        wheel.writestr("carried_along-1.0.dist-info/RECORD", "")
    acceptance.add("one", "import carried_along\nfound.figure('value', carried_along.VALUE, 'it')",
                   packages=("carried_along",))
    words = ["--device", "cpu", "--out", str(tmp_path / "out"), "--minutes", "1"]
    assert acceptance.main([*words, "--wheels", str(wheels)]) == 0
    assert outcome(tmp_path / "out")[0]["one"]["figures"][0]["value"] == 7
    assert acceptance.main(words) == 0
    assert outcome(tmp_path / "out")[0]["one"]["status"] == "skipped"


@pytest.mark.parametrize("words, told", [
    (["--minutes", "0"], "--minutes is 0; it must be above 0"),
    (["--device", "cpu", "--wheels", "/nowhere"], "in which there is no .whl file"),
])
def test_bad_options_are_refused(acceptance, tmp_path, words, told):
    with pytest.raises(ValueError, match=told):
        acceptance.main(["--out", str(tmp_path / "out"), *words])


def test_without_a_gpu_it_says_what_can_be_run(tmp_path):
    finished = subprocess.run([sys.executable, SCRIPT, "--out", tmp_path / "out"],
                              env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
                              capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr == ("gpu_acceptance.py: error: --device is cuda, but torch sees no GPU; with --device cpu "
                               "--quick all "
                               "sections run in a small form\n")
    assert not (tmp_path / "out").exists()


def test_every_section_in_its_small_form(tmp_path):
    out = tmp_path / "out"
    finished = subprocess.run([sys.executable, SCRIPT, "--device", "cpu", "--quick", "--out", out, "--minutes", "12"],
                              capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found, _ = outcome(out)
    has_sanitizer = found.pop("sanitizer")
    assert has_sanitizer["status"] == "skipped" and "compute-sanitizer" in has_sanitizer["why"] + has_sanitizer["what"]
    assert {section["status"] for section in found.values()} == {"passed"} and len(found) == 9
    assert all(section["checks"] or section["figures"] for section in found.values())
    assert (
        len(found["kernels"]["checks"]) >= 5
        and len(found["step"]["checks"]) >= 10
        and len(found["engines"]["checks"]) == 4
    )
