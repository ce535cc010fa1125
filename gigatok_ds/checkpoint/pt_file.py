"""`.pt` files, as torch.save writes them, read and written a tensor at a time, and never executed."""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gigatok_ds.checkpoint.tensor_files import LazyTensors, Spec, raw_bytes
from gigatok_ds.errors import InputError
from gigatok_ds.file_kinds import mistaken_weights
from gigatok_ds.untrusted import brief

_MAPPED_BYTES = 128 * 1024**2


def load_plain_data(path: Path) -> dict[str, Any]:
    """The dictionary that a `.pt` file holds; tensors are mapped, and read when they are touched.

    Raises InputError when the file is not a checkpoint or holds anything but tensors and plain data.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file")
    if mistaken := mistaken_weights(path):
        raise InputError(f"{path} is not a checkpoint: {mistaken}")
    try:
        # Original checkpoints carry the command line they were trained with. Those of old torch versions cannot be
        # mapped.
        with torch.serialization.safe_globals([argparse.Namespace]), _encodable(path) as name:
            content = torch.load(name, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} was refused: it holds something other than plain tensors and numbers "
                         f"({_refused(error)})") from None
    except Exception as error:
        raise InputError(f"{path} is not a readable checkpoint ({brief(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a checkpoint dictionary")
    return content


@contextmanager
def _encodable(path: Path) -> Iterator[str]:
    """A name of the file that torch can encode: its own, if that is text, else one of its descriptor."""
    try:
        str(path).encode()
        yield str(path)
    except UnicodeEncodeError:
        with open(path, "rb") as file:
            yield f"/proc/self/fd/{file.fileno()}"


def _refused(error: Exception) -> str:
    """What a pickle wanted, without torch's advice to trust it."""
    said = re.split(r"trusted source\.|WeightsUnpickler error:", str(error))[-1]
    return brief(re.split(r"Check the documentation|This file can still|\bPlease\b", said)[0])


def lazy_tensors(path: Path, choose: Callable[[dict[str, Any]], dict[str, Tensor]]) -> Mapping[str, Tensor]:
    """The tensors that `choose` picks from a file's dictionary, each copied when asked for.

    Pages that were read count as memory while they are mapped, so the file is opened anew now and then.
    """
    tensors, read = choose(load_plain_data(path)), 0

    def copy(name: str) -> Tensor:
        nonlocal tensors, read
        value = tensors[name].clone()
        read += value.nbytes
        if read > _MAPPED_BYTES and zipfile.is_zipfile(path):
            tensors, read = choose(load_plain_data(path)), 0
        return value

    return LazyTensors({name: tensor.shape for name, tensor in tensors.items()}, copy)


def write_pt(path: Path, key: str, specs: Mapping[str, Spec], read: Callable[[str], Tensor]) -> None:
    """Write {key: state_dict} as torch.save would, asking for each tensor when it is its turn.

    torch lays out a file with holes; these and their checksums in the zip's directory are then filled in.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        empty = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({key: empty}, path)
    with open(path, "r+b") as file:
        entries = _entries(file)
        for number, (name, spec) in enumerate(specs.items()):
            if spec.nbytes == 0:
                continue
            entry, crc_place = entries[str(number)]
            assert entry.file_size == spec.nbytes, (name, entry.file_size, spec)
            data = raw_bytes(read(name), spec)
            file.seek(entry.header_offset + 26)
            lengths = struct.unpack("<HH", file.read(4))  # of the name, and of what pads
            start = entry.header_offset + 30 + sum(lengths)
            file.seek(start)
            file.write(data)
            crc = struct.pack("<I", zlib.crc32(data))
            file.seek(start + spec.nbytes + 4)  # behind the data: a mark, and the checksum again
            file.write(crc)
            file.seek(crc_place)
            file.write(crc)


def _entries(file: BinaryIO) -> dict[str, tuple[zipfile.ZipInfo, int]]:
    """The data records by number, with the place of each one's CRC-32 in the zip's directory."""
    with zipfile.ZipFile(file) as archive:
        infos, place = archive.infolist(), archive.start_dir
    found = {}
    for info in infos:
        room, _, number = info.filename.rpartition("/")
        if room.endswith("/data"):
            found[number] = (info, place + 16)
        file.seek(place + 28)
        place += 46 + sum(struct.unpack("<HHH", file.read(6)))  # name, extra field, comment
    return found
