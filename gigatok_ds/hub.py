"""Standalone models as Hugging Face hub models: `from_pretrained`, `save_pretrained`, `push_to_hub`.

    tokenizer = gigatok_ds.HubTokenizer.from_pretrained("somebody/tokenizer-ss")    # or a directory
    gigatok_ds.HubTokenizer(tokenizer).push_to_hub("somebody/tokenizer-ss")

These are the networks that load_tokenizer and load_gpt return, with the methods of huggingface_hub's ModelHubMixin.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Self

import torch
from torch import nn

from gigatok_ds.checkpoint.standalone import (
    CONFIG_FILE,
    INDEX_FILE,
    load_gpt,
    load_tokenizer,
    read_config,
    save_standalone,
)
from gigatok_ds.errors import InputError
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tokenizer import Tokenizer

try:
    from huggingface_hub import ModelHubMixin, snapshot_download
except ImportError as error:
    raise InputError(f"huggingface_hub cannot be imported ({error}); pip install 'gigatok_ds[hub]', or load a local "
                     "directory with gigatok_ds.load_tokenizer and load_gpt") from error

WEIGHTS = [INDEX_FILE, "*.safetensors"]
FILES = [CONFIG_FILE, *WEIGHTS, "README.md"]


class _OnHub(ModelHubMixin):
    """What both kinds share. `_load` reads a standalone directory."""

    _load: staticmethod

    # The mixin hands over what config.json holds under the names of these parameters: they are none of its keys.
    def __init__(self, network: nn.Module, origin: dict | None = None):
        """The same network, with the methods of the hub; origin goes into config.json, as provenance, and into the
        card.
        """
        self.__dict__.update(network.__dict__)  # its parameters and modules, not copies
        self.origin = origin or getattr(network, "origin", {})

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, (Tokenizer, GPT))
        with tempfile.TemporaryDirectory(prefix=".gigatok-ds.", dir=save_directory.parent) as scratch:
            written = save_standalone(Path(scratch) / "model", self.config, self.state_dict(), provenance=self.origin,
                                      classes=getattr(self, "class_names", ()))
            for pattern in WEIGHTS:  # an index of weights that were here before would be read instead of the new ones
                for file in save_directory.glob(pattern):
                    file.unlink()
            for file in written.iterdir():
                os.replace(file, save_directory / file.name)

    def push_to_hub(self, repo_id: str, **settings) -> str:
        """As ModelHubMixin has it; weights that were in the repository before and are not of this model are deleted."""
        return super().push_to_hub(repo_id, **{"delete_patterns": WEIGHTS} | settings)

    @classmethod
    def _from_pretrained(  # type: ignore[override]  # of the mixin's "any settings", these models have two
        cls, *, model_id: str, revision: str | None, cache_dir: str | Path | None, force_download: bool,
        local_files_only: bool, token: str | bool | None, device: str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(snapshot_download(model_id, revision=revision, cache_dir=cache_dir,
                                            force_download=force_download,
                                            local_files_only=local_files_only, token=token, allow_patterns=FILES))
        return cls(cls._load(folder, device=device, dtype=dtype), read_config(folder).get("provenance"))


class HubTokenizer(_OnHub, Tokenizer, library_name="gigatok-ds"):
    """A Tokenizer; `from_pretrained(name_or_directory, device="cpu", dtype=torch.float32)`."""

    _load = staticmethod(load_tokenizer)


class HubGPT(_OnHub, GPT, library_name="gigatok-ds"):
    """A GPT for `gigatok_ds.generate`; `from_pretrained(name_or_directory, device="cpu", dtype=torch.float32)`."""

    _load = staticmethod(load_gpt)
