"""`gigatok-ds COMMAND ...`: find the command, run it, and turn a user's error into one line and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from gigatok_ds.cli.messages import messages_shown
from gigatok_ds.cluster.launched import launched_rank_or_alone
from gigatok_ds.config.location import masked
from gigatok_ds.data.pillow_warnings import say_pillows_once
from gigatok_ds.errors import InputError, MachineError, exit_code
from gigatok_ds.signals import interrupts_noted
from gigatok_ds.untrusted import printable

UNREAD = 128 + signal.SIGPIPE  # as the shell has it of other programs
TURN_SECONDS = 6.0  # after which another rank says what the first should have said

# Command name -> module with HELP, add_arguments(parser) and run(args). The order is that of --help.
COMMANDS = {
    "demo": "training.demo",
    "recipes": "training.recipes",
    "make-shards": "data.make_shards",
    "check-shards": "data.check_shards",
    "doctor": "training.doctor",
    "check-cluster": "training.check_cluster",
    "plan": "training.plan",
    "train": "training.train",
    "status": "training.status",
    "replay": "training.replay",
    "convert": "models.convert",
    "inspect": "models.inspect",
    "export-graph": "models.export_graph",
    "extract-codes": "data.extract_codes",
    "reconstruct": "models.reconstruct",
    "sample": "models.sample",
    "app": "models.app",
    "evaluate": "figures.evaluate",
    "probe": "figures.probe",
    "search-guidance": "figures.search_guidance",
    "reproduce": "figures.reproduce",
    "ar-probe": "figures.ar_probe",
}


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gigatok-ds",
        description="Train GigaTok image tokenizers and generators under DeepSpeed, convert them, and run them.",
        epilog="Start with: gigatok-ds demo --out runs/demo. Every command explains itself: gigatok-ds COMMAND --help.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(f"gigatok_ds.cli.{module_name}")
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__,
                                      formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 on success, 2 for an error that the user has to mend, 1 for one that
    may pass, 130 after Ctrl-C, UNREAD when nobody reads any more what it prints."""
    try:
        try:
            with messages_shown(), warnings.catch_warnings():
                say_pillows_once(threading.Event())
                return _until_interrupted(argv)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever does not want to wait for the end asks again
            print("interrupted; running the same command again continues where it stopped", file=sys.stderr)
            return 130
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _print_no_more()
        return UNREAD


def _until_interrupted(argv: Sequence[str] | None) -> int:
    with interrupts_noted() as interrupted:
        try:
            return _run(parse(argv), interrupted)
        except Exception as error:
            if interrupted():
                raise KeyboardInterrupt from error
            raise


def _run(args: argparse.Namespace, interrupted: Callable[[], bool]) -> int:
    try:
        _check_out(args)
        return args.run(args)
    except (InputError, MachineError, OSError) as error:
        if interrupted():
            raise
        if isinstance(error, BrokenPipeError) and _is_unread():
            raise
        if os.environ.get("GIGATOK_TRACEBACK"):
            raise
        print(f"gigatok-ds {args.command}: error: {one_rank_first()}{printable(masked(_one_line(error)))}",
              file=sys.stderr)
        return exit_code(error)


def _is_unread() -> bool:
    """Whether the reader of what is printed has gone, as `head` does, and it is not another connection that is broken.
    """
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _print_no_more() -> None:
    """Let what is still to be printed vanish: the interpreter would complain about it at its end."""
    with open(os.devnull, "wb") as nowhere:
        for descriptor in (1, 2):
            os.dup2(nowhere.fileno(), descriptor)


def _check_out(args: argparse.Namespace) -> None:
    """InputError when --out is a symbolic link to something that is not there: the system would say that it exists."""
    out = getattr(args, "out", None)
    if isinstance(out, Path) and out.is_symlink() and not out.exists():
        raise InputError(f"{out} is a symbolic link to {os.readlink(out)}, which does not exist; make that, or remove "
                         "the link")


def one_rank_first() -> str:
    """Before a rank says what is wrong with a command line that all ranks were given: the first one says it at once.

    A launcher ends the others as soon as one has ended, which is before their turn; the first of each host has its own,
    in case only its host is at fault. Returns what tells a later rank's message from that of the first.
    """
    rank = launched_rank_or_alone()
    if rank.is_first:
        return ""
    time.sleep(TURN_SECONDS if rank.is_first_of_host else 2 * TURN_SECONDS)
    return f"rank {rank.rank} on host {socket.gethostname()}: "


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.format_usage()}{self.prog}: error: {one_rank_first()}{printable(message)}\n")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line. Unlike plain argparse, key=value settings may also follow the options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())
