"""Every command that README.md and docs/ show is run, in a small form and in their order; `documented_commands` has the
table.

What one command writes the next ones read, so run the whole file.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import documented_world
import pytest
from documented_commands import (
    EVERYWHERE,
    RULES,
    after_variables,
    blocks,
    commands,
    occurs,
    replacements,
    rule_of,
    small_form,
)
from places import ROOT
from rank_runs import run_main

from gigatok_ds.cli.main import COMMANDS, main, parse
from gigatok_ds.cluster.local_job import free_port
from gigatok_ds.config.load import load_recipe, recipe_names
from gigatok_ds.kernels.build import cache_directory

FOUND = commands()
NAMED = {command: rule_of(command) for command in FOUND}
# Options of launch/train.sh, which come before those of `gigatok-ds train`, and how many values they take.
LAUNCHER_OPTIONS = {"--dry-run": 0, "--max-restarts": 1, "--min-hosts": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documented")
    documented_world.build(folder)
    return folder


@pytest.fixture(autouse=True)
def surroundings(world, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(cache_directory().parent))  # the kernels are compiled once
    monkeypatch.setenv("XDG_CACHE_HOME", str(world / "cache"))
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def ours(words):
    """The words after `gigatok-ds` (those of train for a script of launch/), None for other commands."""
    words = list(after_variables(words))
    if words[:1] == ["gigatok-ds"]:
        return words[1:]
    if "gigatok_ds" in words and words[0] in ("torchrun", "deepspeed"):
        return words[words.index("gigatok_ds") + 1:]
    if words[:1] == ["sbatch"]:
        words = words[next(i for i, word in enumerate(words) if word.startswith("launch/")):]
    if words[0] in ("launch/train.sh", "launch/torchrun.sh", "launch/slurm.sbatch"):
        words = words[1:]
        while words and words[0] in LAUNCHER_OPTIONS:
            words = words[1 + LAUNCHER_OPTIONS[words[0]]:]
        return ["train", *words]
    return None


@pytest.mark.parametrize("command", FOUND, ids=str)
def test_it_means_something_as_it_stands(command):
    """Not only in its small form: options are known, recipes have the settings; and there is a rule to run it by."""
    assert NAMED[command], (
        f"no rule begins like {' '.join(command.words)!r}; add one to RULES in tests/helpers/documented_commands.py"
    )
    assert "..." not in command.words, "a reader cannot run dots"
    if words := ours(command.words):
        args = parse(words)
        if (recipe := getattr(args, "recipe", None)) in recipe_names():
            tensor = [f"parallel.tensor={args.tp}"] if getattr(args, "tp", None) else []
            load_recipe(recipe, [*getattr(args, "overrides", []), *tensor])


# Whose outputs no other command reads.
SLOW = ("docs/performance.md:7", "docs/performance.md:9", "docs/kernels.md:99")


@pytest.mark.parametrize("command", [
    pytest.param(command, marks=[pytest.mark.slow] * str(command).startswith(SLOW)) for command in FOUND], ids=str)
def test_it_runs(command, world, request):
    """The exit code is the rule's, and what --out names is there."""
    rule = NAMED[command]
    if rule.run == "covered":
        file, _, name = rule.by.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"there is no test {rule.by}"
        return
    if rule.run == "stages":
        request.getfixturevalue("forked_stages")
    words = small_form(command, rule, port=free_port(), world=world)
    for place in rule.removes.split():
        if place in words[words.index("convert") + 2:]:
            shutil.rmtree(place, ignore_errors=True)
    said = shlex.join(words)
    assert RUN[rule.run](words) == rule.code, f"{command} failed, run as: {said}"
    if "--out" in words and "--dry-run" not in words and words[1] != "check-cluster":
        assert Path(words[words.index("--out") + 1]).exists(), f"{said} wrote nothing"


def here(words):
    return main(words[1:])


def fork(words):
    """In ranks of their own, the two of a launcher or one: training leaves a process group and DeepSpeed's settings
    behind.
    """
    code, said = run_main(ours(words), 1 if words[0] == "gigatok-ds" else 2)
    print(said)
    return code


def shell(words):
    given = dict(word.split("=", 1) for word in words[:len(words) - len(after_variables(words))])
    finished = subprocess.run(after_variables(words), env=os.environ | given, capture_output=True, text=True,
                              timeout=300, check=False)
    print(finished.stdout, finished.stderr)
    return finished.returncode


RUN = {"here": here, "fork": fork, "shell": shell, "stages": here}


def test_every_rule_and_every_replacement_is_of_use():
    unused = [rule.begins for rule in RULES if rule not in NAMED.values()]
    assert not unused, "no command begins like these rules"
    used = [(rule, command.words) for command, rule in NAMED.items()]
    for old in EVERYWHERE:
        assert any(rule.everywhere and occurs(words, old) is not None
                   for rule, words in used), f"{old!r} is in no command"
    for rule in RULES:
        for old in rule.replace:
            assert any(mine is rule and occurs(words, old) is not None
                       for mine, words in used), f"{rule.begins}: {old!r}"


def test_what_stays_of_a_command_stays_word_for_word():
    for command, rule in NAMED.items():
        small = small_form(command, rule, port=1, world="w")
        replaced = {word for old in replacements(rule) for word in shlex.split(old)}
        assert [word for word in command.words if word not in small and word not in replaced] == []


def test_every_command_of_ours_is_documented():
    """`reconstruct` and `demo` aside: --help of the former and the set-up line of the latter."""
    shown = {words[0] for command in FOUND if (words := ours(command.words))}
    assert set(COMMANDS) - {"demo"} <= shown


def test_the_python_of_the_readme_runs_and_its_shapes_are_true(world):
    ((_, _, text),) = [block for block in blocks("python") if block[0] == "README.md"]
    names = {}
    for line in text.splitlines():
        exec(line, names)
        if shape := re.search(r"# \(([\d, ]+)\)", line):
            value = names[line.partition(" = ")[0]]
            assert str(tuple(value.shape)) == f"({shape[1]})", line
    assert names["codes"].shape == (2, 16)
