"""Standalone models run in a virtual environment that holds torch, numpy, pyyaml and safetensors, and nothing else.

Its site-packages are links to those distributions of this environment, what they require, and this package.
"""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from small_models import small_gpt, small_tokenizer

import gigatok_ds
from gigatok_ds.checkpoint.standalone import save_standalone

ALLOWED = ("torch", "numpy", "pyyaml", "safetensors")

USES = """
import importlib.util, sys, torch
import gigatok_ds
folder = sys.argv[1]
for absent in ("deepspeed", "megatron", "pydantic", "PIL", "tqdm", "timm", "webdataset", "huggingface_hub"):
    assert importlib.util.find_spec(absent) is None, absent
tokenizer, gpt = gigatok_ds.load_tokenizer(folder + "/tokenizer"), gigatok_ds.load_gpt(folder + "/gpt")
images = torch.load(folder + "/images.pt", weights_only=True)
codes = tokenizer.encode(images)
samples = gigatok_ds.generate(gpt, torch.tensor([0, 3]), cfg_scale=2.0, seed=1)
torch.save({"codes": codes, "images": tokenizer.decode(codes), "samples": samples}, folder + "/results.pt")
"""


def closure(names):
    """Distributions of this environment by those names, and all that they require here."""
    found, waiting = {}, list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        for text in found[name].requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for distribution in closure(ALLOWED).values():
        for top in {path.parts[0] for path in distribution.files if path.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    (site / "gigatok_ds").symlink_to(Path(gigatok_ds.__file__).parent)
    return folder / "bin" / "python"


def test_a_tokenizer_and_a_gpt_run_there_and_give_the_same_bits(clean_python, tmp_path):
    tokenizer, gpt = small_tokenizer(), small_gpt()
    save_standalone(tmp_path / "tokenizer", tokenizer.config, tokenizer.state_dict())
    save_standalone(tmp_path / "gpt", gpt.config, gpt.state_dict())
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    torch.save(images, tmp_path / "images.pt")
    subprocess.run([clean_python, "-I", "-c", USES, tmp_path], check=True, cwd=tmp_path)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    loaded = gigatok_ds.load_gpt(tmp_path / "gpt")
    assert torch.equal(results["codes"], tokenizer.encode(images))
    assert torch.equal(results["images"], tokenizer.decode(results["codes"]))
    assert torch.equal(results["samples"], gigatok_ds.generate(loaded, torch.tensor([0, 3]), cfg_scale=2.0, seed=1))


def test_nothing_else_is_there(clean_python):
    said = subprocess.run([clean_python, "-I", "-c", "import importlib.metadata as m; print(*(d.name for d in "
                                                     "m.distributions()))"],
                          capture_output=True, text=True, check=True).stdout.lower().split()
    assert {"torch", "numpy", "pyyaml", "safetensors"} <= set(said)
    assert not {"deepspeed", "megatron-core", "pydantic", "pillow", "tqdm", "timm"} & set(said)
