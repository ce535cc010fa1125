"""Machines that lack something: room, files, memory to share, a home, a language, rights. A command works there, or
says why not in one line; and nothing is lost."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from places import ROOT
from rank_runs import run_ranks
from saved_models import save_models
from small_models import small_gpt, small_tokenizer
from small_shards import encoded, make_images
from training_runs import TOKENIZER, image_shards, prepare, start, train_with_faults

from gigatok_ds.checkpoint.run_directory import checkpoint_path, complete_checkpoints, damage, read_state
from gigatok_ds.config.load import load_recipe
from gigatok_ds.monitoring.history import read_history, record_event
from gigatok_ds.parallel.topology import single_process
from gigatok_ds.resilience.watchdog import Watchdog

SETTINGS = ["checkpoint.every=2", "training.validate_every=2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Recipes, data, and an undisturbed run of each kind."""
    folder = tmp_path_factory.mktemp("surroundings")
    names = prepare(folder)
    for kind, given in names.items():
        recipe = load_recipe(folder / f"{kind}.yaml", [*given, *SETTINGS])
        run_ranks(train_with_faults, 1, recipe, folder / kind, 1, [])
    return folder, names


def trained(run):
    """SHA-256 of what was trained."""
    return {name: digest for name, digest in read_state(checkpoint_path(run, 8)).files.items() if "/" in name}


# Full disks ---


@contextlib.contextmanager
def disk(folder, options):
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def check_small_disk(data, folder, kind, options):
    """A run ends in one line where there is no room for it; given room, the same command ends as if there always had
    been.
    """
    place, names = data
    with disk(folder, options) as small:
        (small / "precious").write_text("mine")
        command = [place / f"{kind}.yaml", "--out", small / "run", *names[kind], *SETTINGS]
        code, said = start(command)
        if code:
            errors = [line for line in said.splitlines() if "error:" in line]
            assert code == 2 and len(errors) == 1 and "No space left on device" in errors[0], (options, said)
            assert str(small) in errors[0] and "Traceback" not in said and "Exception" not in said, (options, said)
        for _, checkpoint in complete_checkpoints(small / "run"):
            assert damage(checkpoint, single_process("cpu")) is None
        subprocess.run(["mount", "-o", "remount,size=200M,nr_inodes=100000", small], check=True)
        again, said_again = start(command)
        assert again == 0, (options, said, said_again)
        assert trained(small / "run") == trained(place / kind) and (small / "precious").read_text() == "mine"
        assert read_history(small / "run")[-1]["event"] == "finished"
        assert not list((small / "run").rglob("*partial*")), options
    return code


@pytest.mark.parametrize("kind, options", [("gpt", "size=300k"), ("tokenizer", "size=200k"), ("gpt", "nr_inodes=14"),
                                           ("tokenizer", "nr_inodes=23")])
def test_a_full_disk_ends_a_run_in_one_line_and_nothing_is_lost(data, tmp_path, kind, options):
    assert check_small_disk(data, tmp_path / "disk", kind, options) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt", "tokenizer"])
def test_a_disk_may_be_full_at_any_moment(data, tmp_path, kind):
    sizes = [f"size={4 * pages}k" for pages
             in (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)]
    codes = [check_small_disk(data, tmp_path / options, kind, options)
             for options in [*sizes, *(f"nr_inodes={number}" for number in range(4, 60, 2))]]
    assert codes.count(2) > 10 and 0 in codes


def test_stacks_that_cannot_be_written_keep_no_run_from_ending(tmp_path):
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks" / "rank-00000.txt").symlink_to("/dev/full")
    ended = []
    with Watchdog(0.2, tmp_path, 0, lambda *what: ended.append(what)):
        deadline = time.monotonic() + 30
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    (text, code), = ended
    assert code == 1 and "monitor.stall_seconds" in text


def test_a_history_has_whole_lines_only(tmp_path):
    """On a disk that has no room for a line, and after a power failure in the middle of one."""
    with disk(tmp_path / "disk", "size=8k") as small:
        record_event(small, "started", text="x" * 4000)
        with open(small / "filler", "wb") as filler, contextlib.suppress(OSError):
            filler.write(bytes(2**20))
        with pytest.raises(OSError, match="No space left on device"):
            record_event(small, "failed", text="y" * 300)
        assert [line["event"] for line in read_history(small)] == ["started"]
        (small / "filler").unlink()
        record_event(small, "finished")
        assert [line["event"] for line in read_history(small)] == ["started", "finished"]
    record_event(tmp_path, "started")
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('{"time": 1, "event": "sav')
    record_event(tmp_path, "failed")
    assert [line["event"] for line in read_history(tmp_path)] == ["started", "failed"]


# Other things that a machine may not have ---


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Small models, and images in more shards than a process with few files may hold open."""
    folder = tmp_path_factory.mktemp("world")
    save_models(folder, tok=small_tokenizer(), gpt=small_gpt())
    make_images(folder / "photos",
                {f"class-{label}/{number}.jpg": encoded(number) for label in range(3) for number in range(4)})
    (folder / "tokenizer.yaml").write_text(TOKENIZER)
    image_shards(folder / "images", 80, samples_per_shard=1)
    image_shards(folder / "test_images", 8)
    return folder


def commands(world, out):
    """What each command is asked to do, in `out`."""
    return {
        "train": ["train", world / "tokenizer.yaml", "--out", out / "run", f"data.train={world / 'images'}",
                  f"data.validation={world / 'test_images'}", "data.workers=1", "training.steps=2",
                  "schedule.warmup_steps=1",
                  "loss.auxiliary.end_step=1", "loss.quantizer.entropy_end_step=1", "loss.adversarial.start_step=1"],
        "make-shards": ["make-shards", world / "photos", "--out", out / "shards", "--samples-per-shard", "4",
                        "--workers", "2"],
        "extract-codes": ["extract-codes", world / "tok", world / "images", "--out", out / "codes", "--crops", "center",
                          "--workers", "2"],
        "sample": ["sample", "--gpt", world / "gpt", "--tokenizer", world / "tok", "--count", "4", "--out",
                   out / "x.npz"],
    }


RESULTS = {"train": "run/probe.npz", "make-shards": "shards/index.json", "extract-codes": "codes/metadata.json",
           "sample": "x.npz"}


def run_in(words, out, name, *, before=(), become=(), environment=None, **how):
    """Run a command; `before` are shell statements in a mount namespace of its own. Its end: a result, or one line."""
    command = [*become, sys.executable, "-m", "gigatok_ds", *map(str, words)]
    if before:
        if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
            pytest.skip("a mount namespace needs root")
        command = ["unshare", "-m", "sh", "-c", "set -e\n" + "\n".join(before) + '\nexec "$@"', "sh", *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                                "DS_ACCELERATOR": "cpu"} | (environment or {})
    environment = {key: value for key, value in environment.items() if value is not None}
    how.setdefault("cwd", out)
    finished = subprocess.run(command, env=environment, capture_output=True, timeout=300, check=False, **how)
    said = (finished.stdout + finished.stderr).decode(errors="replace")
    assert "Traceback" not in said and "Exception" not in said, said
    if finished.returncode:
        errors = [line for line in said.splitlines() if "error:" in line]
        assert finished.returncode in (1, 2) and len(errors) == 1, said
        return errors[0]
    assert (out / RESULTS[name]).is_file(), said
    return None


def limit_files(most):
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


FULL_SHM = ["mount -t tmpfs -o size=4k,nr_inodes=1 none /dev/shm"]
HOMELESS = {"HOME": "/dev/null/none", "XDG_CACHE_HOME": None, "TORCH_EXTENSIONS_DIR": None}

LACKS = {
    "files": {"preexec_fn": limit_files(64)},
    "shared memory": {"before": FULL_SHM},
    "a temporary directory": {"environment": {"TMPDIR": "/dev/null/none"}},
    "a home": {"environment": HOMELESS},
    "HOME and TMPDIR": {"environment": {"HOME": None, "TMPDIR": None, "XDG_CACHE_HOME": None}},
    "a language": {"environment": {"LANG": "C", "LC_ALL": "C"}},
    "UTF-8": {"environment": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}},
}


def check_lacking(world, tmp_path, name, lacking):
    out = tmp_path / "größe 大 é"
    out.mkdir()
    return run_in(commands(world, out)[name], out, name, **LACKS[lacking])


@pytest.mark.parametrize("name, lacking",
                         [("sample", "a home"), ("train", "UTF-8")])  # others: below
def test_without_it_a_command_works_or_says_why_not(world, tmp_path, name, lacking):
    said = check_lacking(world, tmp_path, name, lacking)
    expected = {"UTF-8": "whose bytes are no text"}.get(lacking)
    assert expected in said if expected and said else said is None, said
    if lacking == "UTF-8":
        assert said and not list(tmp_path.glob("*/*")), "nothing is written"


@pytest.mark.slow
@pytest.mark.parametrize("lacking", LACKS)
@pytest.mark.parametrize("name", RESULTS)
def test_without_anything_of_that_any_command_works_or_says_why_not(world, tmp_path, name, lacking):
    said = check_lacking(world, tmp_path, name, lacking)
    if (name, lacking) == ("train", "shared memory"):
        assert "/dev/shm" in said


@pytest.fixture
def elsewhere(world, tmp_path):
    """A copy of the world that another user can reach; a function gives it to one, with an empty directory for results.
    """
    if os.getuid() or not shutil.which("setpriv"):
        pytest.skip("becoming another user needs root")
    folder = Path(tempfile.mkdtemp(prefix="gtk-user-", dir="/tmp"))
    folder.chmod(0o755)

    def given_to(user):
        shutil.copytree(world, folder / "world")
        (folder / "out").mkdir()
        subprocess.run(["chown", "-R", f"{user}:{user}", folder / "world", folder / "out"], check=True)
        return folder / "world", folder / "out"

    yield given_to
    shutil.rmtree(folder)


def run_as(user, world, out, name, **variables):
    environment = HOMELESS | {"TMPDIR": "/tmp", "USER": None, "LOGNAME": None} | variables
    # It may read everything, wherever the interpreter and this checkout lie, and write what is its own.
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--inh-caps=+dac_read_search",
              "--ambient-caps=+dac_read_search"]
    return run_in(commands(world, out)[name], out, name, become=become, environment=environment)


@pytest.mark.parametrize("name", ["train",
                                  *(pytest.param(name, marks=pytest.mark.slow) for name in RESULTS if name != "train")])
def test_another_user_needs_nothing_of_the_installation_but_to_read_it(elsewhere, name):
    """It is root's, and this user has no home that exists."""
    said = run_as(65534, *elsewhere(65534), name, HOME="/nonexistent")
    assert said is None, said


@pytest.mark.slow
def test_a_user_that_no_list_of_users_has(elsewhere):
    """As in a container that is started with a number."""
    world, out = elsewhere(54321)
    for name in RESULTS:
        said = run_as(54321, world, out, name, HOME=None)
        assert said is None, said
