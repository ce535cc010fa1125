"""The README.md of a standalone checkpoint: a Hugging Face model card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from gigatok_ds.untrusted import as_markdown, printable

_TOKENIZER = """
# {name}

A GigaTok image tokenizer ({layout} layout, {parameters:,} parameters): an image of {size} x {size} pixels becomes
{tokens} codes from a codebook of {codebook:,} entries of {dim} dimensions, and codes become an image again.

## Use

```python
import gigatok_ds

tokenizer = gigatok_ds.load_tokenizer("path/of/this/directory")
codes = tokenizer.encode(images)          # float (batch, 3, {size}, {size}) in [-1, 1] to int64 (batch, {tokens})
reconstruction = tokenizer.decode(codes)  # nominally in [-1, 1], not clamped
```

## Preprocessing

As in validation: RGB, channels first. The image is halved with a box filter while its short side is at least {twice}
pixels, its short side is resized to {size} (bicubic), the middle {size} x {size} are cut out, and bytes become numbers
by `(x / 255 - 0.5) * 2`. `gigatok-ds reconstruct` does all of this to files.
"""

_GPT = """
# {name}

A class-conditional autoregressive transformer ({parameters:,} parameters) that generates the {tokens} codes of an
image of one of {classes:,} classes, from a vocabulary of {vocabulary:,}. A tokenizer with the same
codebook turns codes into an image.

## Use

```python
import gigatok_ds

gpt = gigatok_ds.load_gpt("path/of/this/directory")
codes = gigatok_ds.generate(gpt, classes, cfg_scale=4.0)  # classes: int64 (batch,); codes: int64 (batch, {tokens})
```
"""

_REST = """
## Where it comes from

{provenance}

## Figures

{metrics}

## Files

Parameters are {dtype}. SHA-256, also in `config.json`:

{files}

## Licence

The code that reads this (gigatok_ds) is under the MIT licence. The licence of the weights is up to whoever trained them
and, for ImageNet, its terms of access: set `license` above before publishing.
"""


def model_card(description: Mapping[str, Any], *, parameters: int, dtype: str) -> str:
    """Markdown with YAML front matter, from the content of config.json."""
    model, provenance = description["model"], dict(description["provenance"])
    metrics = provenance.pop("metrics", None) or {}
    tokenizer = description["kind"] == "tokenizer"
    name = as_markdown(provenance.get("recipe") or f"A GigaTok {description['kind']}")
    tags = ["gigatok", "image-tokenizer" if tokenizer else "image-generation"]
    front = {"library_name": "gigatok-ds", "license": "other", "tags": tags}
    if not tokenizer:
        front["pipeline_tag"] = "unconditional-image-generation"
    head = "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items()) + "---\n"
    if tokenizer:
        body = _TOKENIZER.format(name=name, layout=model["layout"], parameters=parameters, size=model["image_size"],
                                 twice=2 * model["image_size"], tokens=model["latent_tokens"],
                                 codebook=model["quantizer"]["codebook_size"], dim=model["quantizer"]["codebook_dim"])
    else:
        body = _GPT.format(name=name, parameters=parameters, tokens=model["sequence_length"],
                           classes=model["num_classes"], vocabulary=model["vocab_size"])
    return head + body + _REST.format(
        provenance=_table(provenance, "It does not say."), dtype=dtype, files=_table(description["sha256"], "None."),
        metrics=_table({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in metrics.items()},
                       "None were measured when it was written.") + _METRICS_NOTE * bool(metrics))


_METRICS_NOTE = """

Measured in training, on the validation data and the weights of that step; not comparable with published figures."""


def _table(rows: Mapping[str, Any], otherwise: str) -> str:
    return "\n".join(f"- {as_markdown(key)}: {_code(value)}" for key, value in rows.items()) or otherwise


def _code(value: object) -> str:
    """A value as code, unless it holds what would end that."""
    return as_markdown(value) if re.search(r"[`<>&]", str(value)) else f"`{printable(value)}`"
