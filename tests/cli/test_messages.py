"""What commands say beside their results: notes, warnings and errors of `logging`, on standard error."""

import io
import logging
import sys

import pytest
from tqdm import tqdm

from gigatok_ds.cli.messages import messages_shown

logger = logging.getLogger("gigatok_ds.some.module")


@pytest.mark.parametrize("level, said", [
    (logging.DEBUG, ""), (logging.INFO, "3 shards\n"), (logging.WARNING, "warning: 3 shards\n"),
    (logging.ERROR, "error: 3 shards\n"),
])
def test_lines_by_level(level, said, capsys):
    with messages_shown():
        logger.log(level, "%d shards", 3)
    assert capsys.readouterr() == ("", said)


def test_the_prefix_comes_first(capsys):
    with messages_shown("train.sh: "):
        logger.warning("a host is away")
        logger.info("100%% of %s", "them")
    assert capsys.readouterr().err == "train.sh: warning: a host is away\ntrain.sh: 100% of them\n"


def test_a_line_comes_once_although_others_have_handlers(capsys):
    others = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(others)
    try:
        with messages_shown():
            logger.warning("once")
    finally:
        logging.getLogger().removeHandler(others)
    assert capsys.readouterr().err == "warning: once\n"


def test_other_packages_are_left_alone(capsys):
    with messages_shown():
        logging.getLogger("another_package").info("a note")
    assert capsys.readouterr().err == ""


def test_afterwards_a_library_again(caplog):
    package = logging.getLogger("gigatok_ds")
    before = package.handlers[:], package.level, package.propagate
    with pytest.raises(ValueError), messages_shown():
        raise ValueError
    assert (package.handlers, package.level, package.propagate) == before
    logger.warning("for whoever has imported it")
    assert caplog.messages == ["for whoever has imported it"]


def test_a_bar_is_not_broken(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with messages_shown(), tqdm(total=2, file=terminal, mininterval=0) as bar:
        bar.update()
        logger.warning("a shard is damaged")
        bar.update()
    lines = terminal.getvalue().replace("\r", "\n").splitlines()
    assert "warning: a shard is damaged" in lines
    assert any(line.startswith("100%") for line in lines)


class _Closed(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("stream", [None, _Closed()])
def test_nobody_who_reads_is_no_reason_to_end(stream, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", stream)
    with messages_shown():
        logger.warning("unheard")
    assert capsys.readouterr().out == ""
