"""The README is true: its set-up commands are CI's, and the commands and names it shows exist."""

import re
from pathlib import Path

from gigatok_ds.cli.main import COMMANDS, build_parser
from gigatok_ds.config.load import load_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def commands():
    """Every gigatok-ds or launch/train.sh command of the README as words, continuation lines joined."""
    for block in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines():
            words = line.partition("#")[0].split()
            words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S+", word)]
            if words[:1] == ["gigatok-ds"]:
                yield words[1:]
            elif words[:1] == ["launch/train.sh"]:
                yield ["train", *words[1:]]


def test_ci_runs_the_command_that_the_readme_gives():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] in README


def test_every_command_parses_and_names_a_recipe():
    parser = build_parser()
    found = list(commands())
    assert {words[0] for words in found} >= set(COMMANDS) - {"demo", "reconstruct"}
    for words in found:
        args, rest = parser.parse_known_args(words)
        assert not any(word.startswith("-") for word in rest), words
        if getattr(args, "recipe", None):
            load_recipe(args.recipe, [*getattr(args, "overrides", []), *rest])


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"`((?:gigatok_ds|tests|launch|docs|ds_configs|tools)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
