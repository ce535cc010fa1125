"""What replaces something recognises it as ours first, and at every moment the old or the new is there."""

import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_models import small_gpt

from gigatok_ds import files
from gigatok_ds.checkpoint.standalone import damaged_weights, save_standalone
from gigatok_ds.cli.main import main
from gigatok_ds.files import directory_beside, put_back, write_atomically


@pytest.fixture
def model(tmp_path):
    gpt = small_gpt()
    return save_standalone(tmp_path / "model", gpt.config, gpt.state_dict())


def convert(capsys, *words):
    code = main(["convert", *map(str, words)])
    return code, "".join(capsys.readouterr())


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


FOREIGN = {
    "a project": {"config.json": "{}", "notes.txt": "precious"},
    "a Hugging Face model": {"config.json": '{"architectures": ["Llama"]}', "model.safetensors": "precious"},
    "no JSON": {"config.json": "precious"},
    "a list": {"config.json": "[]"},
    "a folder": {"precious/notes.txt": "precious"},
    "ours with a file": {"model.safetensors": None, "notes.txt": "precious"},
    "ours with a folder": {"model.safetensors": None, "src/main.py": "precious"},
    "ours that claims a file": {"config.json": {"sha256": {"notes.txt": "0", "model.safetensors": "0"}},
                                "notes.txt": "precious"},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_only_a_standalone_checkpoint_and_nothing_else_is_overwritten(kind, model, tmp_path, capsys):
    gpt, out = small_gpt(), tmp_path / "out"
    if "ours" in kind:
        save_standalone(out, gpt.config, gpt.state_dict())
    for name, text in FOREIGN[kind].items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(text, dict):
            text = json.dumps(json.loads((out / name).read_text()) | text)
        if text is not None:
            (out / name).write_text(text)
    before = content(out)
    code, said = convert(capsys, model, out, "--overwrite")
    assert code == 2 and len(said.splitlines()) == 1 and "--overwrite leaves it alone" in said, said
    assert content(out) == before and sorted(os.listdir(tmp_path)) == ["model", "out"]
    if "ours" in kind:
        assert "notes.txt" in said or "src" in said


def test_only_a_checkpoint_file_is_overwritten(model, tmp_path, capsys):
    out = tmp_path / "thesis.pt"
    out.write_text("precious")
    torch.save({"model": small_gpt().state_dict(), "optimizer": {"state": 1}}, tmp_path / "training.pt")
    for path in (out, tmp_path / "training.pt"):
        before = path.read_bytes()
        code, said = convert(capsys, model, path, "--to", "original", "--overwrite")
        assert code == 2 and len(said.splitlines()) == 1 and "--overwrite" in said, said
        assert path.read_bytes() == before
    assert convert(capsys, model, tmp_path / "m.pt", "--to", "original")[0] == 0
    assert convert(capsys, model, tmp_path / "m.pt", "--to", "original", "--dtype", "bf16", "--overwrite")[0] == 0


@pytest.mark.parametrize("to", ["standalone", "original"])
def test_a_damaged_source_or_a_failed_verification_leaves_the_earlier_result(to, model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert convert(capsys, model, out, "--to", to)[0] == 0
    before = content(out) if to == "standalone" else out.read_bytes()
    damaged = save_standalone(tmp_path / "damaged", small_gpt().config, small_gpt().state_dict())
    full = bytearray((damaged / "model.safetensors").read_bytes())
    full[-100] ^= 1
    (damaged / "model.safetensors").write_bytes(full)
    code, said = convert(capsys, damaged, out, "--to", to, "--overwrite", "--verify")
    assert code == 2 and "damaged" in said, said
    monkeypatch.setattr("gigatok_ds.checkpoint.verification._same_bits", lambda *_: False)
    code, said = convert(capsys, model, out, "--to", to, "--overwrite", "--verify")
    assert code == 2 and "verification failed" in said, said
    assert (content(out) if to == "standalone" else out.read_bytes()) == before
    assert sorted(os.listdir(tmp_path)) == ["damaged", "model", "out"]


_REPLACER = """
import sys, time
from pathlib import Path
from gigatok_ds import files
if sys.argv[2] == "two renames":
    files._exchanged = lambda one, other: False
number = 0
while True:
    number += 1
    with files.directory_beside(Path(sys.argv[1]), replaceable=lambda path: None) as scratch:
        for name in ("a", "b"):
            (scratch / name).write_text(str(number))
    if number == 1:
        print(flush=True)
"""


def killed_at_random_moments(out, way, number, times, seed):
    """What is at `out` after each kill."""
    draw = random.Random(seed)
    for _ in range(times):
        with subprocess.Popen([sys.executable, "-c", _REPLACER, str(out), way], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(draw.random() * 0.05)
            process.send_signal(number)
        yield out


def check_replacing(folder, times):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        for way in ("exchange", "two renames"):
            out = folder / f"{number.name} {way} [x]"  # brackets: a name is no pattern
            for place in killed_at_random_moments(out, way, number, times, seed=int(number)):
                if number == signal.SIGKILL and way == "two renames":
                    put_back(place)  # as the next command does
                assert (place / "a").read_text() == (place / "b").read_text()
            if number != signal.SIGKILL:
                assert not list(folder.glob(f".{number.name} {way}*"))  # nothing half-made stays


def test_killed_at_random_moments_the_old_or_the_new_is_there(tmp_path):
    check_replacing(tmp_path, 3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["os.mkdir", "shutil.rmtree", "os.rename"])
def test_a_signal_in_the_midst_of_making_replacing_or_removing_leaves_nothing_half_made(place, number, tmp_path,
                                                                                        monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    module, name = getattr(files, place.split(".")[0]), place.split(".")[1]
    todo = getattr(module, name)

    def interrupted(*arguments, **options):
        signal.raise_signal(number)
        todo(*arguments, **options)

    monkeypatch.setattr(module, name, interrupted)
    ended = pytest.raises((SystemExit, KeyboardInterrupt))
    with ended, directory_beside(out, replaceable=lambda path: None) as scratch:
        (scratch / "a").touch()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["out"]
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


@pytest.mark.slow
def test_killed_at_many_random_moments_the_old_or_the_new_is_there(tmp_path):
    check_replacing(tmp_path, 150)


_CONVERTING = "import sys; from gigatok_ds.cli.main import main; print(flush=True); sys.exit(main(sys.argv[1:]))"


def check_converting(model, folder, times, seed):
    """Conversions of a second model over the first, killed at random moments; the result is whole, one or the other."""
    gpt, draw, out = small_gpt(), random.Random(seed), folder / "out"
    save_standalone(out, gpt.config, gpt.state_dict())
    allowed = [content(out)]
    assert main(["convert", str(model), str(folder / "expected"), "--dtype", "bf16"]) == 0
    allowed.append(content(folder / "expected"))
    for number in range(times):
        which = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL][number % 3]
        words = ["convert", str(model), str(out), "--overwrite", "--verify", "--dtype", "bf16"]
        with subprocess.Popen([sys.executable, "-c", _CONVERTING, *words], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL) as process:
            process.stdout.readline()
            time.sleep(draw.random() * 4)
            process.send_signal(which)
        assert content(out) in allowed and damaged_weights(out) is None
        if content(out) == allowed[1]:
            save_standalone(out, gpt.config, gpt.state_dict(), overwrite=True)


def test_a_conversion_killed_leaves_the_old_or_the_new(model, tmp_path):
    check_converting(model, tmp_path, 2, seed=0)


@pytest.mark.slow
def test_a_conversion_killed_at_many_moments_leaves_the_old_or_the_new(model, tmp_path):
    check_converting(model, tmp_path, 60, seed=1)


def test_what_lost_its_name_gets_it_back(model, tmp_path, capsys):
    os.rename(model, tmp_path / ".model.12345678.replaced")
    gpt = small_gpt()
    with pytest.raises(files.InputError, match="exists already"):
        save_standalone(model, gpt.config, gpt.state_dict())
    assert damaged_weights(model) is None and os.listdir(tmp_path) == ["model"]


def test_a_link_is_followed_and_stays(model, tmp_path, capsys):
    (tmp_path / "link").symlink_to("out")
    assert convert(capsys, model, tmp_path / "out")[0] == 0
    assert convert(capsys, model, tmp_path / "link", "--overwrite", "--dtype", "bf16")[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "out") != content(model)


@pytest.mark.parametrize("mask", [0o077, 0o002, 0o022])
def test_permissions_are_those_of_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", b"x")
        with directory_beside(tmp_path / "folder"):
            pass
        gpt = small_gpt()
        save_standalone(tmp_path / "model", gpt.config, gpt.state_dict())
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "file", tmp_path / "folder",
                                                                *(tmp_path / "model").iterdir()]}
    assert modes.pop(tmp_path / "folder") == 0o777 & ~mask
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_no_other_file_of_ours_sets_permissions():
    """What is written to be kept is written by gigatok_ds.files; temporary directories are removed where they are made.
    """
    package = Path(files.__file__).parent
    words = (".chmod(", "mkstemp(", "NamedTemporaryFile", "fchmod")
    found = [path.name for path in package.rglob("*.py") if any(word in path.read_text() for word in words)]
    assert found == ["build.py"]  # which takes them from others: what it writes is executed
