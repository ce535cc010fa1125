"""Functions on several ranks of this machine, forked from a server that has done the imports: seconds instead of a
minute. CPU only, since a forked process cannot start CUDA."""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import queue
import signal
import tempfile
import time
import traceback
from pathlib import Path

from places import HELPERS

from gigatok_ds.cluster.local_job import free_port

OTHERS_SECONDS = 30  # for the other ranks, once one has failed
ON_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["gigatok_ds.engine.engine", "gigatok_ds.training.run",
                                 "gigatok_ds.parallel.megatron", "gigatok_ds.training.tokenizer_task",
                                 "gigatok_ds.training.gpt_task", "gigatok_ds.training.loop",
                                 "torch._dynamo", "torch.utils.tensorboard",
                                 "torch_fidelity.feature_extractor_inceptionv3", "frozen_heap"])


class RanksFailed(Exception):
    """One rank's traceback, or what else went wrong."""


def run_ranks(function, ranks, *arguments, timeout=300):
    """[function(*arguments) of each of `ranks` ranks]; an exception on one ends them all.

    function must be importable by name; it finds RANK, WORLD_SIZE and so on in its environment.
    """
    results = _context.Queue()
    port = free_port()
    processes = [_context.Process(target=_rank, args=(rank, ranks, port, results, function, arguments), daemon=True)
                 for rank in range(ranks)]
    try:
        with _server_environment():
            for process in processes:
                process.start()
        return _collect(results, processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.join(timeout=0.5)
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def _server_environment():
    """Variables as the server is to see them: it starts with the first process. It finds modules by PYTHONPATH alone.
    """
    before = dict(os.environ)
    path = os.pathsep.join([str(HELPERS), *filter(None, [before.get("PYTHONPATH")])])
    os.environ.update(ON_CPU, PYTHONPATH=path)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_main(words, ranks=1, timeout=300):
    """(exit code, all that was printed) of `gigatok-ds WORDS` on so many ranks, in this folder and environment.

    The exit code is that of the first rank that failed, as a launcher has it; once one has, the others end soon.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said.txt"
        said.touch()
        port, processes = free_port(), []
        for rank in range(ranks):
            surroundings = os.environ | ON_CPU | ({} if ranks == 1 else _rank_variables(rank, ranks, port))
            processes.append(_context.Process(target=_apart, args=(surroundings, os.getcwd(), (said, said), _main,
                                                                   (list(map(str, words)),))))
        try:
            with _server_environment():
                for process in processes:
                    process.start()
            return _exit_code(processes, time.monotonic() + timeout), said.read_text()
        finally:
            for process in processes:
                process.kill()
                process.join()


def start_rank(function, *arguments, rank, ranks, port, output):
    """A process that runs function(*arguments) as one of `ranks` ranks, for the caller to wait for; output: the files
    that its stdout and stderr are written to."""
    surroundings = os.environ | ON_CPU | _rank_variables(rank, ranks, port)
    process = _context.Process(target=_apart, args=(surroundings, os.getcwd(), output, function, arguments))
    with _server_environment():
        process.start()
    return process


def _exit_code(processes, deadline):
    first = 0
    while any(process.exitcode is None for process in processes):
        if time.monotonic() > deadline:
            if first:
                break
            raise RanksFailed("not all ranks ended in time")
        if not first and (first := next((p.exitcode for p in processes if p.exitcode), 0)):
            deadline = min(deadline, time.monotonic() + OTHERS_SECONDS)
        time.sleep(0.02)
    return first or next((p.exitcode for p in processes if p.exitcode), 0)


def _main(words):
    """`python -m gigatok_ds WORDS`."""
    from gigatok_ds.__main__ import end
    from gigatok_ds.cli.main import main

    end(main(words))


def _apart(surroundings, folder, output, function, arguments):
    """function(*arguments) in a fork of the server, as a process of its own would run it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with the server
    os.environ.clear()
    os.environ.update(surroundings)
    os.chdir(folder)
    for number, path in enumerate(output, 1):
        with open(path, "ab", buffering=0) as file:
            os.dup2(file.fileno(), number)
    import torch

    torch.set_num_threads(1)
    function(*arguments)


def _rank_variables(rank, ranks, port):
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _collect(results, processes, deadline):
    found = {}
    while len(found) < len(processes):
        try:
            rank, error, value = results.get(timeout=0.5)
        except queue.Empty:
            if time.monotonic() > deadline:
                raise RanksFailed(f"only ranks {sorted(found)} finished in time") from None
            died = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
            if died and results.empty():
                raise RanksFailed(f"a rank died with exit code {died[0]}") from None
            continue
        if error:
            raise RanksFailed(f"rank {rank}:\n{error}")
        found[rank] = pickle.loads(value)
    return [found[rank] for rank in sorted(found)]


def _rank(rank, ranks, port, results, function, arguments):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with the server that forked this rank
    os.environ.update(_rank_variables(rank, ranks, port))
    import torch

    torch.set_num_threads(1)
    try:
        # Pickled here: the queue would hand tensors over by sockets that close with this process.
        results.put((rank, None, pickle.dumps(function(*arguments))))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
