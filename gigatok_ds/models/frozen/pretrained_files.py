"""Files of published weights: where a recipe's setting says they are, how they are fetched, how they are known."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from gigatok_ds.errors import InputError
from gigatok_ds.files import sha256

logger = logging.getLogger(__name__)

RANDOM, DOWNLOAD = "random", "download"
# As torch.hub reads names: the first digits of the file's SHA-256, between a dash and the suffix.
_DIGITS = re.compile(r"-([0-9a-f]{8,})\.")


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """One file that a frozen network needs, as a recipe asks for it.

    `setting` is the recipe's key. Its `value` is the path of a file, or of a directory that holds one of `names`; null
    looks in the usual caches, the word `download` fills them first, and `random` is no file at all but random weights.
    `what` describes the file, `url` says where it is published, `hub` is timm's repository on the Hugging Face Hub. A
    download is kept under the first name.
    """

    setting: str
    value: str | Path | None
    what: str
    names: tuple[str, ...]
    url: str | None = None
    hub: str | None = None

    @property
    def is_random(self) -> bool:
        return str(self.value) == RANDOM

    @property
    def wants_download(self) -> bool:
        """Whether this file is to be downloaded, and is not there yet."""
        return str(self.value) == DOWNLOAD and self._cached() is None

    def find(self) -> Path:
        """The file. Raises InputError that says what to get, from where, and where to put it."""
        assert not self.is_random, f"{self.setting} has no file"
        if self.value is None or str(self.value) == DOWNLOAD:
            found, place = self._cached(), f"{cache_folder() / self.names[0]}"
            looked = f"there is no file {place}" + (f", nor {self.hub} in the Hugging Face cache" if self.hub else "")
        else:
            path = Path(self.value)
            found, looked, place = path, f"there is no file {path}", "there"
            if path.is_dir():
                found = next((path / name for name in self.names if (path / name).is_file()), None)
                looked = f"{path} holds none of {', '.join(self.names)}"
        if found is None or not found.is_file():
            raise InputError(f"{self.setting}: {looked}; it should be {self.what}{self._origin()}; put it {place}, "
                             f"set {self.setting} to its path"
                             + (f", or to {DOWNLOAD}" if self.url else "") + f" (or to {RANDOM}, for a dry run)")
        return found

    def fetch(self) -> None:
        """Download the file into torch's cache if `wants_download`.

        All of it appears at once, and only if its SHA-256 begins as its name says. Raises InputError when it cannot be
        had.
        """
        if not self.wants_download:
            return
        if self.url is None:
            raise InputError(f"{self.setting} is {DOWNLOAD}, but {self.what} is not published; give a path")
        target, digits = cache_folder() / self.names[0], _DIGITS.search(self.names[0])
        logger.info("downloading %s to %s", self.url, target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.url, str(target), hash_prefix=digits and digits[1], progress=False)
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"{self.setting}: {self.url} cannot be downloaded to {target} ({reason}); fetch it by "
                             "other means and put it there") from None

    def sha256(self) -> str | None:
        """The file's SHA-256 in hexadecimal, None for random weights.

        Raises InputError when it does not begin as the file's name says: the file is damaged.
        """
        if self.is_random:
            return None
        path = self.find()
        digest = sha256(path)
        digits = _DIGITS.search(path.name) if path.name in self.names else None
        if digits and not digest.startswith(digits[1]):
            raise InputError(f"{self.setting}: {path} is damaged: its SHA-256 begins with {digest[:8]}, not with "
                             f"{digits[1]}; delete it and get it again{self._origin()}")
        return digest

    def _origin(self) -> str:
        return f" from {self.url}" if self.url else ""

    def _cached(self) -> Path | None:
        for name in self.names:
            if (cache_folder() / name).is_file():
                return cache_folder() / name
        return _in_hugging_face_cache(self.hub) if self.hub else None


def cache_folder() -> Path:
    """Where torch, torchvision and timm keep what they download."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def _in_hugging_face_cache(repository: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # looks, and never downloads

    for name in ("model.safetensors", "pytorch_model.bin"):
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    return None
