"""Pillow's warnings are said once a run, whatever images and processes there are."""

import re
import threading
import warnings

import pytest
from made_pictures import encode, picture
from small_shards import make_images

from gigatok_ds.cli.main import main
from gigatok_ds.data.pillow_warnings import say_pillows_once
from gigatok_ds.data.transforms import decode_image

BROKEN = b"Exif\0\0II*\0\x08\0\0\0\x02\0"  # a directory of two entries that are not there


def odd(number):
    return encode(picture(30 + number, 30), "JPEG", exif=BROKEN + bytes([number]))


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("default")
def test_make_shards_and_check_shards_say_it_once(workers, tmp_path, capfd):
    make_images(tmp_path / "in", {f"{number % 3}/{number}.jpg": odd(number) for number in range(9)})
    for words in (["make-shards", tmp_path / "in", "--out", tmp_path / "out", "--samples-per-shard", "2"],
                  ["check-shards", tmp_path / "out"]):
        assert main([*map(str, words), "--workers", workers]) == 0
        said = capfd.readouterr().err
        assert len(re.findall("Corrupt EXIF data", said)) == 1, said


@pytest.mark.filterwarnings("default")
def test_others_are_shown_and_afterwards_all_are_as_before(caplog):
    before, shown, said = warnings.showwarning, [], threading.Event()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest: shown.append(str(message))
        say_pillows_once(said)
        for number in range(3):
            decode_image(odd(number), "x", orient=True)
        warnings.warn("of another package", UserWarning, stacklevel=1)
        assert said.is_set()
    assert len(caplog.messages) == 1 and "Pillow says of an image: Corrupt EXIF data" in caplog.text
    assert shown == ["of another package"]
    assert warnings.showwarning is before


def test_whoever_is_not_to_say_it_does_not(caplog):
    said = threading.Event()
    said.set()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        say_pillows_once(said)
        decode_image(odd(1), "x", orient=True)
    assert not caplog.messages
