"""What kind of file one is, by its name; and where its name is wrong, for downloads go wrong in few ways."""

from __future__ import annotations

import struct
from pathlib import Path

_LONGEST_HEADER = 100_000_000  # of safetensors
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.lz4", ".tar.z")


def is_tar(name: str) -> bool:
    """Whether a file of this name is an uncompressed tar, and not hidden."""
    return name.lower().endswith(".tar") and not name.startswith(".")


def is_compressed_tar(name: str) -> bool:
    """Whether a file of this name is a compressed tar, and not hidden."""
    return name.lower().endswith(_COMPRESSED) and not name.startswith(".")


def mistaken_weights(path: Path) -> str | None:
    """What a file that is called a `.pt` is instead and what to do, as far as its first bytes tell; None where they do
    not.
    """
    with open(path, "rb") as file:
        start = file.read(1024)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "it is empty; download it again"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "it is a web page, as of a download that asks for a confirmation or a login; download the file itself"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, which stands for the file; run: git lfs pull"
    if len(start) > 9 and struct.unpack("<Q", start[:8])[0] < _LONGEST_HEADER and start[8:9] == b"{":
        return ("it is a safetensors file; give it a name that ends in .safetensors, or convert the directory "
                "that it lies in")
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "it is compressed; unpack it first"
    if text.startswith((b"{", b"[")):
        return "it is JSON, as of a server's error; download the file itself"
    return None
