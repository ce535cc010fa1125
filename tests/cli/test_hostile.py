"""What a stranger's file, recipe or request may not do: take the machine, the terminal or the time."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import SMALL, small_gpt, small_gpt_config, small_tokenizer_config

from gigatok_ds.checkpoint.model_sources import open_model
from gigatok_ds.checkpoint.original import from_original
from gigatok_ds.checkpoint.pt_file import load_plain_data
from gigatok_ds.checkpoint.standalone import load_gpt, save_standalone
from gigatok_ds.cli import main as main_module
from gigatok_ds.cli.main import main
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.model import gpt_config_from_dict, tokenizer_config_from_dict
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.results import Results, write_results
from gigatok_ds.kernels import build
from gigatok_ds.untrusted import printable

EVIL = "\x1b]0;PWNED\x07\x1b[2J<script>alert(1)</script>`x`\u202e\r\n| **b** [l](javascript:x)"


def one_line(capsys, *words):
    code = main([*map(str, words)])
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    return code, lines


# YAML

def laughs(levels, text="base: GPT-B\nname: {}\n"):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("text", [
    laughs(9),
    "a: &a {k: 1}\n" + "".join(f"b{n}: &b{n} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
                               for n, before in enumerate(["a", *(f"b{n}" for n in range(8))])),
    "a: &a [*a]\n", "a: &a {b: *a}\n", "[" * 5000, "{a: " * 5000, "a: 1\n" * 100_000, "x" * 300_000,
], ids=["lists", "merges", "a list in itself", "a section in itself", "deep lists", "deep sections", "repeated",
        "long"])
def test_a_recipe_that_expands_without_end_is_refused_at_once(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    start = time.monotonic()
    with pytest.raises(InputError) as raised:
        load_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500 and "r.yaml" in str(raised.value)
    assert time.monotonic() - start < 30


def test_anchors_that_people_write_are_read(tmp_path):
    (tmp_path / "r.yaml").write_text("\ufeffbase: GPT-B\nname: x\nmodel: &m {norm_eps: 1e-6}\n")
    assert load_recipe(tmp_path / "r.yaml").model.norm_eps == 1e-6


# config.json

@pytest.fixture
def model(tmp_path):
    gpt = small_gpt()
    return save_standalone(tmp_path / "model", gpt.config, gpt.state_dict())


def change(model, **changes):
    description = json.loads((model / "config.json").read_text())
    description["model"] |= changes
    (model / "config.json").write_text(json.dumps(description))


@pytest.mark.parametrize("changes", [
    {"size": {"width": 32, "layers": 100_000_000, "heads": 2}},
    {"size": {"width": 32 * 10**9, "layers": 2, "heads": 2}},
    {"vocab_size": 10**12}, {"sequence_length": 10**15}, {"num_classes": 2**62}, {"vocab_size": 10**30},
    {"size": {"width": 32.0, "layers": 2, "heads": 2}}, {"size": {"width": True, "layers": 2, "heads": 2}},
    {"size": {"width": "32", "layers": 2, "heads": 2}}, {"size": None}, {"size": [32, 2, 2]}, {"vocab_size": 64.0},
    {"norm_eps": "x"}, {"norm_eps": None}, {"qk_norm": 1}, {"qk_norm": "yes"}, {"positions": ["learned"]},
    {"positions": "x"}, {"drop_path": [0.1]}, {"unknown": 1}, {"size": {"width": 32, "layers": 2}},
    {"size": {"width": 32, "layers": -1, "heads": 2}},
])
def test_a_description_of_a_model_that_the_weights_cannot_be_of_is_refused_at_once(changes, model, tmp_path, capsys):
    change(model, **changes)
    start = time.monotonic()
    for words in (["convert", model, tmp_path / "out"], ["convert", model, tmp_path / "out", "--to", "original"]):
        code, lines = one_line(capsys, *words)
        assert code == 2 and len(lines) == 1 and "Traceback" not in lines[0], lines
    with pytest.raises(InputError):
        load_gpt(model)
    assert time.monotonic() - start < 20


def test_what_we_write_is_what_we_read():
    from dataclasses import asdict

    for config, read in ((small_gpt_config(), gpt_config_from_dict),
                         (small_tokenizer_config(), tokenizer_config_from_dict),
                         (small_tokenizer_config(encoder="tiny", semantic_head=None), tokenizer_config_from_dict)):
        assert read(json.loads(json.dumps(asdict(config)))) == config


def test_a_recipe_that_asks_for_more_than_a_checkpoint_holds_is_refused(tmp_path):
    weights = small_gpt().state_dict()
    config = replace(small_gpt_config(), size=replace(SMALL, layers=10**8))
    with pytest.raises(InputError, match=r"size.layers is 100000000, but the weights hold .* tensors"):
        from_original(config, weights, "x.pt")


# What a file says

def test_what_a_file_says_does_not_rule_the_terminal(tmp_path, capsys):
    torch.save({EVIL: {"w": torch.zeros(2)}, "note": EVIL, "y\x1b[2J": 1, "w": torch.zeros(1)}, tmp_path / "x.pt")
    gpt = small_gpt()
    model = save_standalone(tmp_path / "m\x1b[31m", gpt.config, gpt.state_dict(),
                            provenance={"recipe": EVIL, EVIL: EVIL})
    for words in (["inspect", tmp_path / "x.pt"], ["inspect", model], ["inspect", tmp_path / "no\x1b[2J"],
                  ["convert", tmp_path / "x.pt", tmp_path / "out", "--recipe", "GPT-B", "--weights", "ema"],
                  ["train", "no\x1b[2J.yaml", "--out", tmp_path / "r"],
                  ["train", "GPT-B", "a\x1b[2J", "--out", tmp_path / "r"], ["status", tmp_path / "x\x1b"]):
        main(list(map(str, words)))
        said = "".join(capsys.readouterr())
        assert said and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said), repr(said)
    with pytest.raises(SystemExit):
        main(["train", "--zero", "\x1b[2J", "x", "--out", "y"])
    assert "\x1b" not in "".join(capsys.readouterr())


def test_printable_text_is_as_it_was_and_the_rest_is_escaped():
    assert printable("Größe 12 µm, 東京, C:\\x 'y'") == "Größe 12 µm, 東京, C:\\x 'y'"
    assert printable("\x1b\n\u202e\ud800\x00\x9b") == "\\x1b\\n\\u202e\\ud800\\x00\\x9b"


def test_what_a_file_says_is_text_in_cards_and_results(tmp_path):
    gpt = small_gpt()
    model = save_standalone(tmp_path / "m", gpt.config, gpt.state_dict(), provenance={"recipe": EVIL, EVIL: EVIL})
    write_results(tmp_path / "r", Results(title=EVIL, figures={EVIL: 1.0}, settings={"name": EVIL, EVIL: {"a": EVIL}},
                                          pictures={EVIL: b"png"}))
    for path in (model / "README.md", tmp_path / "r" / "results.md", tmp_path / "r" / "results.html"):
        text = path.read_text()
        assert "<script" not in text and "\x1b" not in text and "\u202e" not in text
        assert "&#60;script" in text.replace("&lt;", "&#60;")
        assert "](javascript" not in text or path.suffix == ".html"
    rows = [line for line in (tmp_path / "r" / "results.md").read_text().splitlines() if line.startswith("|")]
    assert all(line.count("|") == 3 for line in rows)


def test_a_class_that_is_called_a_script_is_text_in_the_demo_report(tmp_path):
    from gigatok_ds.demo.demo_report import ReportContent, Section, write_report

    write_report(tmp_path / "r.html", ReportContent(
        title="t", subtitle=EVIL, facts=[(EVIL, EVIL)], figures=[], sections=[Section(title=EVIL, values={EVIL: EVIL})],
        files=[(EVIL, EVIL)], tokenizer_export="a", gpt_export="b"))
    assert "<script" not in (tmp_path / "r.html").read_text()


# inspect

class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_refused_pickle_is_told_by_what_it_wanted(tmp_path):
    torch.save({"model": Evil()}, tmp_path / "x.pt")
    with pytest.raises(InputError) as raised:
        load_plain_data(tmp_path / "x.pt")
    assert (
        "posix.system" in str(raised.value)
        and "Re-run" not in str(raised.value)
        and "weights_only" not in str(raised.value)
    )


def test_inspect_prints_json_that_is_json(tmp_path, capsys):
    torch.save({"model": {"w": torch.zeros(1)}, "loss": float("nan"), "best": float("inf")}, tmp_path / "x.pt")
    assert main(["inspect", str(tmp_path / "x.pt"), "--json"]) == 0

    def refuse(word):
        raise AssertionError(word)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["other"] == {"loss": None, "best": None}


def test_a_file_whose_name_is_no_text_is_read(tmp_path, capsys):
    gpt = small_gpt()
    path = tmp_path / os.fsdecode(b"caf\xe9.pt")
    torch.save({"model": gpt.state_dict()}, tmp_path / "x.pt")
    os.rename(tmp_path / "x.pt", path)
    assert main(["inspect", str(path)]) == 0
    assert "original" in capsys.readouterr().out
    weights = open_model(path, recipe=replace_recipe(gpt)).weights
    assert torch.equal(weights["norm.weight"], gpt.state_dict()["norm.weight"])


def replace_recipe(gpt):
    return replace(load_recipe("GPT-B"), model=gpt.config)


# Errors of the command line

@pytest.mark.slow
@pytest.mark.parametrize("words", [["train", "NO_SUCH"], ["train", "GPT-B", "--zero", "9"]])
def test_an_error_of_the_command_line_is_printed_once_under_a_launcher(words, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m",
               "gigatok_ds"]
    finished = subprocess.run([*command, *words, "--out", str(tmp_path / "run")], capture_output=True, text=True,
                              timeout=300)
    assert finished.returncode and (finished.stdout + finished.stderr).count(" error: ") == 1, finished.stderr


def test_the_first_rank_says_it_and_others_wait(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(main_module.time, "sleep", waited.append)
    for rank, local, wait in (("0", "0", []), ("1", "1", [12.0]), ("8", "0", [6.0])):
        for name, value in {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": "16"}.items():
            monkeypatch.setenv(name, value)
        for words in (["train", "NO_SUCH", "--out", "x"], ["train", "--zero", "9"]):
            waited.clear()
            try:
                assert main(words) == 2
            except SystemExit as ended:
                assert ended.code == 2
            said = capsys.readouterr().err
            assert waited == wait and (f"rank {rank} on host" in said) == (rank != "0") and "error:" in said


def test_a_link_to_nothing_is_told_as_such(model, tmp_path, capsys):
    (tmp_path / "link").symlink_to("nowhere")
    for words in (["convert", model, tmp_path / "link"], ["train", "GPT-B", "--out", tmp_path / "link"]):
        code, lines = one_line(capsys, *words)
        assert code == 2 and len(lines) == 1 and "symbolic link to nowhere, which does not exist" in lines[0]


def test_a_json_with_a_byte_order_mark_is_read(model, tmp_path):
    from gigatok_ds.config.deepspeed import read_settings

    (model / "config.json").write_bytes(b"\xef\xbb\xbf" + (model / "config.json").read_bytes())
    load_gpt(model)
    (tmp_path / "ds.json").write_bytes(b'\xef\xbb\xbf{"gradient_clipping": 1.0}')
    assert read_settings(tmp_path / "ds.json") == {"gradient_clipping": 1.0}


def test_other_steps_are_refused_with_the_way_that_exists(tmp_path, monkeypatch):
    from gigatok_ds.config.load import save_resolved
    from gigatok_ds.training import run_checks

    monkeypatch.setattr(run_checks, "CHECKS", [run_checks.check_directory])
    save_resolved(load_recipe("GPT-B", ["training.steps=10000"]), tmp_path / "recipe.yaml")
    with pytest.raises(InputError, match=f"training.steps differ; .*--branch-from {re.escape(str(tmp_path))}, or go "
                                          "on here with --extend-to 20000$"):
        run_checks.check_run(load_recipe("GPT-B", ["training.steps=20000"]), tmp_path)
    with pytest.raises(InputError, match=r"choose another --out$"):
        run_checks.check_run(load_recipe("GPT-B", ["optimizer.lr=1"]), tmp_path)


def test_a_warm_up_longer_than_the_run_is_refused(tmp_path):
    from gigatok_ds.training.run_checks import check_run

    recipe = load_recipe("GPT-B", ["training.steps=100", "schedule.warmup_steps=101"])
    with pytest.raises(InputError, match=r"schedule.warmup_steps is 101, but training.steps is 100"):
        check_run(recipe, tmp_path / "run")


# The library of kernels

@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    path = build.library_path()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not loaded")
    for place in (path, path.parent, path.parent.parent, tmp_path):
        place.chmod(0o755)
    return path


def test_a_library_of_one_s_own_is_taken(cached):
    assert build.written_by_others(cached) is None and build.provide(print) == cached


@pytest.mark.parametrize("place", ["library", "directory", "above"])
def test_a_library_that_others_can_write_is_refused(place, cached, monkeypatch):
    path = {"library": cached, "directory": cached.parent, "above": cached.parent.parent}[place]
    path.chmod(0o777)
    with pytest.raises(build.Failed, match=f"other users can write {re.escape(str(path))}.*chmod go-w "
                                           "it.*TORCH_EXTENSIONS_DIR"):
        build.provide(print)
    if place == "above":
        path.chmod(0o1777)
        assert build.provide(print) == cached
    else:
        path.chmod(0o775)
        with pytest.raises(build.Failed):
            build.provide(print)


def test_a_library_of_another_user_is_refused(cached, monkeypatch):
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(cached, 12345, -1)
    with pytest.raises(build.Failed, match="belongs to another user"):
        build.provide(print)


def test_a_directory_that_others_can_write_is_not_built_in(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    folder = Path(build.library_path()).parent
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setattr(build, "compile_apart", lambda *_: pytest.fail("compiled"))
    with pytest.raises(build.Failed, match="other users can write"):
        build.provide(print)
    assert list(folder.iterdir()) == []
