"""Several pytest workers share the cores: each computes with its part of them, and so does what it starts."""

import multiprocessing.util
import os
import re
import shutil
import signal
import tempfile
import time
import uuid
from pathlib import Path

import pytest

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if workers > 1:  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))


# What helpers assert is told in full, too. Before any of them is imported.
pytest.register_assert_rewrite(*(path.stem for path in (Path(__file__).parent / "helpers").glob("*.py")))

# Whole files go to workers, in this order: were a long one among the last, the other worker would have nothing to do.
LONG_FILES = ("test_gpu_acceptance.py", "test_layouts.py", "test_disturbed.py", "test_demo.py", "test_elastic.py",
              "test_graphs.py", "test_documented_commands.py", "test_rank_failure.py", "test_stopping.py",
              "test_restarts.py")
SESSION = "GIGATOK_TEST_SESSION"  # in the environment of whatever a session starts
LEFT_SECONDS = 20.0  # for what ends by itself when a session does
# Of temporary files: pytest's own, what torch compiled, logs that torchrun never removes, a file of onnxruntime's, and
# those of a compiler that was killed with the rank whose DeepSpeed asks it what it can do.
EXPECTED = re.compile(r"pytest-of-|torchinductor_|torchelastic_|\.ses|cc\w{6}\.(s|o|res|c|ld|le)$")


def pytest_configure(config):
    """Temporary files of a session and of all that it starts lie in a directory of their own, which is removed if it
    passes. Signals do what they do in a fresh process: a shell's `&` and nohup have them ignored.
    """
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    if not hasattr(config, "workerinput"):
        config.temporary = tempfile.mkdtemp(prefix="gtk-")  # short: sockets lie in it, whose names may have 107 bytes
        config.passed = True  # until a session says otherwise; --help has none
        os.environ["TMPDIR"], tempfile.tempdir = config.temporary, None


def pytest_unconfigure(config):
    if not hasattr(config, "temporary"):
        return
    if config.passed:  # after multiprocessing has removed what it has there, at priority -100
        multiprocessing.util.Finalize(None, shutil.rmtree, args=(config.temporary,), exitpriority=-200)
    else:
        print(f"temporary files are kept in {config.temporary}")


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):
        os.environ[SESSION] = uuid.uuid4().hex
        session.config.shared_memory_before = set(os.listdir("/dev/shm"))


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch  # here, since most of a session's processes import it later

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def handlers_are_left_as_they_were():
    """Tests that leave a handler of signals behind fail, not those that come after them in the same process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    left = {number.name: handler for number in numbers if (handler := signal.getsignal(number)) != before[number]}
    for name in left:
        signal.signal(signal.Signals[name], before[signal.Signals[name]])
    if left.get("SIGINT") is signal.SIG_DFL:  # an interrupted command's end, at which it may be interrupted again
        del left["SIGINT"]
    assert not left, f"handlers left behind: {left}"


@pytest.fixture
def messages():
    """Notes and warnings on standard error, as commands have them, where a test calls what a command is made of."""
    from gigatok_ds.cli.messages import messages_shown

    with messages_shown():
        yield


@pytest.fixture
def forked_stages(monkeypatch):
    """What a study would start as processes of its own, or by torchrun, is forked."""
    from stage_runs import fork_stages  # here, since it imports torch

    fork_stages(monkeypatch)


@pytest.hookimpl(trylast=True)  # after xdist has ended its workers
def pytest_sessionfinish(session):
    """Tests that leave a process, shared memory or a temporary file behind fail as a whole."""
    if hasattr(session.config, "workerinput"):
        return
    deadline = time.monotonic() + LEFT_SECONDS
    while (left := _left(session.config)) and time.monotonic() < deadline:
        time.sleep(0.5)
    if left:
        print("\nleft behind by the tests: " + "; ".join(left))
        session.exitstatus = 1
    session.config.passed = session.exitstatus == 0


def _left(config):
    mark = f"{SESSION}={os.environ[SESSION]}".encode()
    processes = [f"process {pid} ({_read(pid, 'cmdline').replace(bytes(1), b' ').decode(errors='replace')[:120]})"
                 for pid in filter(str.isdigit, os.listdir("/proc"))
                 if int(pid) != os.getpid() and mark in _read(pid, "environ").split(bytes(1))
                 and not _serves_this_session(pid)]
    new = set(os.listdir("/dev/shm")) - config.shared_memory_before
    # What a living process uses is that of others on this machine: ours have ended, or are told above.
    used = b"".join(_read(pid, "maps") for pid in filter(str.isdigit, os.listdir("/proc"))
                    if int(pid) != os.getpid()) if new else b""
    own = multiprocessing.current_process()._config.get("tempdir")  # goes with this process
    files = [path for path in Path(config.temporary).iterdir() if not EXPECTED.match(path.name)
             and str(path) != own]
    return [*processes, *(f"/dev/shm/{name}" for name in sorted(new) if f"/dev/shm/{name}".encode() not in used),
            *map(str, sorted(files))]


def _serves_this_session(pid):
    """Whether it is multiprocessing's fork server or resource tracker of this very process, which ends with it."""
    parent = _read(pid, "stat").rpartition(b")")[2].split()[1:2]
    helper = any(name in _read(pid, "cmdline") for name
                 in (b"multiprocessing.forkserver", b"multiprocessing.resource_tracker"))
    return helper and parent == [str(os.getpid()).encode()]


def _read(pid, name):
    try:
        return Path("/proc", pid, name).read_bytes()
    except OSError:
        return b""
