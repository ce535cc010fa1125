"""The golden models, whose outputs the original implementation gave: equal in fp32, and how far off in half precision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from golden_models import arrays, golden_model
from golden_weights import image
from torch import Tensor, nn

from acceptance.findings import Findings
from acceptance.section import Setting
from gigatok_ds.config.load import load_recipe
from gigatok_ds.precision import float32_arithmetic

TOLERANCE = 1e-4  # absolute, in fp32: that of the CPU tests
MARGIN = 1e-5  # of squared distances, below which a code may be another
# In half precision: mean absolute deviation from the golden values as a part of their standard deviation. bf16 keeps 8
# bits of a value and fp16 11, and deviations of some ten layers add up.
BOUNDS = {torch.bfloat16: 0.1, torch.float16: 0.02}


@float32_arithmetic()
def run(setting: Setting, found: Findings) -> None:
    cases: list[tuple[str, Callable]] = [("GPT-B", _gpt), ("VQ_SS256", _tokenizer), ("VQ_SS256_2d", _tokenizer)]
    for name, look in cases[:1] if setting.quick else cases:
        if not found.has_time(name, 5):
            continue
        model = golden_model(load_recipe(name).model).to(setting.device)
        look(name, model, setting, found)
        for dtype in BOUNDS:
            if setting.on_gpu or dtype == torch.bfloat16:
                _half(name, copy.deepcopy(model).to(dtype), setting, found)


@torch.no_grad()
def _gpt(name: str, model, setting: Setting, found: Findings) -> None:
    golden = arrays(f"ar_{name}")
    codes, classes = (torch.from_numpy(golden[key]).to(setting.device) for key in ("tokens", "classes"))
    logits = model(codes[:, :-1], classes)
    _equal(found, f"{name}, logits", logits[:, ::32, ::512], golden["logits"])
    loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten()).item()
    expected = float(golden["loss"])
    found.check(f"{name}, loss", abs(loss - expected) <= 1e-5, f"{loss:.6f}, the original's {expected:.6f}")


@torch.no_grad()
def _tokenizer(name: str, model, setting: Setting, found: Findings) -> None:
    golden, images = arrays(f"tokenizer_{name}"), torch.from_numpy(image("golden/image",
                                                                         (2, 3, 256, 256))).to(setting.device)
    output = model(images, semantic=True)
    _equal(found, f"{name}, features of the CNN", output.cnn_feature[:, ::16, ::4, ::4], golden["cnn_feature"])
    _equal(found, f"{name}, features for the teacher", output.semantic_feature[:, ::8, ::16],
           golden["semantic_feature"])
    _equal(found, f"{name}, pixels", output.reconstruction[:, :, ::8, ::8], golden["reconstruction"])
    wrong = output.codes.cpu().numpy() != golden["indices"]
    clear = golden["margin"] > MARGIN
    found.check(f"{name}, codes", not wrong[clear].any(), f"{wrong[clear].sum()} of {clear.sum()} clear ones differ; "
                f"{wrong[~clear].sum()} of {(~clear).sum()} within {MARGIN:g} of a tie")
    decoded = model.decode(torch.from_numpy(golden["indices"].astype(np.int64)).to(setting.device))
    _equal(found, f"{name}, pixels from codes", decoded[:, :, ::8, ::8], golden["reconstruction_from_codes"])


def _equal(found: Findings, what: str, ours: Tensor, golden: np.ndarray) -> None:
    error = float(np.abs(ours.float().cpu().numpy() - golden).max())
    found.check(what, error <= TOLERANCE, f"at most {error:.1e} off, bound {TOLERANCE:g}")


@torch.no_grad()
def _half(name: str, model: nn.Module, setting: Setting, found: Findings) -> None:
    """A GPT's logits, or a tokenizer's pixels from the golden codes; quickly of the first sample only.

    Codes in half precision are others where a latent is near to two of them, so how many are the same is a figure.
    """
    dtype = next(model.parameters()).dtype
    kind, count = str(dtype).removeprefix("torch."), 1 if setting.quick else 2
    if name.startswith("GPT"):
        golden = arrays(f"ar_{name}")
        codes, classes = (torch.from_numpy(golden[key][:count]).to(setting.device) for key in ("tokens", "classes"))
        what, ours, expected = "logits", model(codes[:, :-1], classes)[:, ::32, ::512], golden["logits"][:count]
    else:
        golden = arrays(f"tokenizer_{name}")
        decoded = model.decode(torch.from_numpy(golden["indices"].astype(np.int64)).to(setting.device))
        what, ours, expected = "pixels from codes", decoded[:, :, ::8, ::8], golden["reconstruction_from_codes"]
        images = torch.from_numpy(image("golden/image", (2, 3, 256, 256))).to(setting.device, dtype)
        same = (model.encode(images).cpu().numpy() == golden["indices"]).mean()
        found.figure(f"{name}, {kind}: codes that are the original's", 100 * same, "%")
    deviation = float(np.abs(ours.float().cpu().numpy() - expected).mean() / expected.std())
    found.check(f"{name}, {kind}: {what}", deviation <= BOUNDS[dtype],
                f"on average {deviation:.2%} of a standard deviation off, bound {BOUNDS[dtype]:.0%}")
