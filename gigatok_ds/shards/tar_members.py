"""The members of a tar, whatever program wrote it: every one of them, up to the last byte of the file."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gigatok_ds.errors import InputError
from gigatok_ds.untrusted import members_in, open_tar

FILE = "file"

_BLOCK = tarfile.BLOCKSIZE
# Two blocks of zeros end a tar, and fill up a record of the usual size: more of them were never written to.
_LONGEST_END = 2 * _BLOCK + tarfile.RECORDSIZE


class Member(NamedTuple):
    """One member: `size` bytes at `offset` of the outermost file; of a hard link, those of the file that it links to.

    `kind` is FILE, or says in the plural what else it is.
    """

    name: str
    offset: int
    size: int
    kind: str = FILE


def tar_members(path: Path, offset: int = 0, size: int | None = None, name: str | None = None) -> Iterator[Member]:
    """The members, in their order, of the tar that is `size` bytes at `offset` of a file (left out: the whole file).

    Tars that were put one behind the other are read on. Raises InputError, naming the tar (`name`, or the file), when
    it is compressed, cut off or damaged, or ends in more zeros than a tar does, as a download does that was never
    finished.
    """
    name = str(path) if name is None else name
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size if size is None else size
        if not size or size % _BLOCK:
            raise InputError(f"{name} is not a whole uncompressed tar ({size} bytes are no number of blocks of "
                             f"{_BLOCK}); copy it again or write it anew")
        files: dict[str, tuple[int, int]] = {}
        start = 0
        while start < size:
            part = MemberPart(file, offset + start, size - start)
            try:
                with open_tar(fileobj=part, mode="r:", errors="surrogateescape") as tar:
                    for member in members_in(tar, size - start):
                        yield _member(member, offset + start, files)
                    end = tar.offset
            except tarfile.TarError as error:
                raise InputError(
                    f"{name} is not a whole uncompressed tar ({error} at byte {start}); copy it again or write it anew"
                ) from None
            start += _behind_zeros(part, end, start, name)


def _member(member: tarfile.TarInfo, start: int, files: dict[str, tuple[int, int]]) -> Member:
    """`files` has places and sizes of the files so far, by their names."""
    if member.isreg() and not member.issparse():
        files[member.name] = start + member.offset_data, member.size
        return Member(member.name, *files[member.name])
    if member.islnk() and member.linkname in files:
        files[member.name] = files[member.linkname]
        return Member(member.name, *files[member.name])
    kinds = ((member.isdir, "directories"), (member.issym, "symbolic links"), (member.islnk, "links out of the tar"),
             (member.issparse, "sparse files"))
    return Member(member.name, start + member.offset_data, member.size,
                  next((kind for is_so, kind in kinds if is_so()), "special files"))


def _behind_zeros(part: MemberPart, end: int, start: int, name: str) -> int:
    """Where the zeros end that follow the last member, which ends at `end`: at the end of the part, or at another tar.

    tarfile takes a damaged header after the first member for the end of the archive, without a word.
    """
    part.seek(end)
    block = part.read(_BLOCK)
    if block != bytes(_BLOCK):
        raise InputError(f"{name} is cut off or damaged at byte {start + end}; copy it again or write it anew")
    position = end
    while block == bytes(_BLOCK):
        position += _BLOCK
        if position - end > _LONGEST_END:
            raise InputError(f"{name} has nothing but zeros from byte {start + end} on, more than end a tar: an "
                             "unfinished download? copy it again or write it anew")
        block = part.read(_BLOCK)
    return position


class MemberPart(io.RawIOBase):
    """A byte range of a file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int):
        self.file, self.start, self.size, self.position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer) -> int:
        wanted = max(0, min(len(buffer), self.size - self.position))
        data = os.pread(self.file.fileno(), wanted, self.start + self.position)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
