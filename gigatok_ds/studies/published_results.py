"""The rows of GigaTok's tables (its README; Xiong et al. 2025, arXiv:2504.08736), and how each is measured."""

from __future__ import annotations

from dataclasses import dataclass, field

# What we count as reproduced. FIDs of 50,000 samples differ by about 0.05 from seed to seed.
TOLERANCES = {"rfid_val50k": 0.03, "lpips": 0.002, "gfid_adm50k": 0.1, "probe_top1_percent": 0.5}


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance: `scale`, or a search for it that begins at `start`."""

    schedule: str = "step"
    window_start: float | None = 0.18
    scale: float | None = None
    start: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """`tokenizer` and `gpt` are recipes; published: figures by the names that our evaluation gives them."""

    tokenizer: str
    gpt: str | None = None
    guidance: Guidance | None = None
    published: dict[str, float] = field(default_factory=dict)


def _tokenizer(recipe: str, rfid: float, lpips: float) -> Row:
    return Row(tokenizer=recipe, published={"rfid_val50k": rfid, "lpips": lpips})


def _generator(gpt: str, tokenizer: str, gfid: float, top1: float, guidance: Guidance) -> Row:
    return Row(tokenizer=tokenizer, gpt=gpt, guidance=guidance,
               published={"gfid_adm50k": gfid, "probe_top1_percent": top1})


# Where the scale is not documented, the original's search for it starts so.
_SEARCH_B, _SEARCH_LARGE = Guidance(start=2.5), Guidance(start=1.25)

ROWS = {
    "S-S": _tokenizer("VQ_SS256", 1.01, 0.2226),
    "S-B": _tokenizer("VQ_SB256", 0.89, 0.2121),
    "B-L": _tokenizer("VQ_BL256", 0.81, 0.2059),
    "B-L-dino": _tokenizer("VQ_BL256_dino_disc", 0.51, 0.2056),
    "XL-XXL": _tokenizer("VQ_XLXXL256", 0.79, 0.1947),
    "GPT-B/S-S": _generator("GPT-B", "VQ_SS256", 4.05, 62.6, _SEARCH_B),
    "GPT-B/S-B": _generator("GPT-B", "VQ_SB256", 3.83, 62.9, _SEARCH_B),
    "GPT-B/B-L": _generator("GPT-B", "VQ_BL256", 3.26, 67.6, _SEARCH_B),
    "GPT-B/B-L-dino": _generator("GPT-B", "VQ_BL256_dino_disc", 3.33, 67.7, _SEARCH_B),
    "GPT-B/XL-XXL": _generator("GPT-B", "VQ_XLXXL256", 3.15, 72.0, Guidance(scale=1.75)),
    "GPT-XL/B-L": _generator("GPT-XL", "VQ_BL256", 2.13, 70.6, _SEARCH_LARGE),
    "GPT-XXL/B-L": _generator("GPT-XXL", "VQ_BL256", 2.03, 69.4, _SEARCH_LARGE),
    "GPT-XXL/XL-XXL": _generator("GPT-XXL", "VQ_XLXXL256", 1.98, 74.0, _SEARCH_LARGE),
}
