"""`python -m gigatok_ds.demo.verify RUN`: reload a demo's exports where DeepSpeed and Megatron cannot be imported.

Compares with what the training processes themselves computed (their probe.npz), and prints the differences.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

IMAGE_TOLERANCE = 1e-4  # of [-1, 1]; kernels may sum in another order in another process
LOGIT_TOLERANCE = 1e-3


def main(run: Path) -> int:
    """0 when both exports give the same codes, images and logits as the models that were trained."""
    for name in ("deepspeed", "megatron"):
        sys.modules[name] = None  # type: ignore[assignment]  # `import deepspeed` now raises ImportError
    import numpy as np
    import torch

    from gigatok_ds import generate, load_gpt, load_tokenizer

    tokenizer, gpt = load_tokenizer(run / "export" / "tokenizer"), load_gpt(run / "export" / "gpt")
    probe = dict(np.load(run / "tokenizer" / "probe.npz"))
    codes = tokenizer.encode(torch.from_numpy(probe["images"]))
    images = tokenizer.decode(codes)
    different_codes = int((codes.numpy() != probe["codes"]).sum())
    image_error = float(np.abs(images.numpy() - probe["reconstruction"]).max())

    probe = dict(np.load(run / "gpt" / "probe.npz"))
    with torch.no_grad():
        logits = gpt(torch.from_numpy(probe["codes"])[:, :-1], torch.from_numpy(probe["classes"]))
    logit_error = float(np.abs(logits.numpy() - probe["logits"]).max())

    expected = dict(np.load(run / "samples.npz"))
    settings = json.loads(str(expected["settings"]))
    again = generate(gpt, torch.from_numpy(expected["classes"]), **settings)  # all in one batch: it must not matter
    different_samples = int((again.numpy() != expected["codes"]).sum())

    result = {"different_codes": different_codes, "max_image_error": image_error, "max_logit_error": logit_error,
              "different_sampled_codes": different_samples}
    scratch = run / "verify.partial"
    scratch.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(scratch, run / "verify.json")
    print(json.dumps(result))
    same = different_codes == 0 and different_samples == 0
    return 0 if same and image_error <= IMAGE_TOLERANCE and logit_error <= LOGIT_TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
