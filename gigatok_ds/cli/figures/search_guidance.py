"""Search for the classifier-free guidance scale with the least gFID, as the original does.

  gigatok-ds search-guidance --gpt GPT --tokenizer TOKENIZER --reference VIRTUAL_imagenet256_labeled.npz \\
      --inception FILE --schedule step --start 2.5 --ranks 8 --device cuda --out results/search

A hill climb in steps of 0.25 from --start; the rectangular schedule also goes through its windows. Each trial draws
and judges --count images; --out keeps their figures (search.csv, best.json), and the same command goes on there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gigatok_ds.cli.dtypes import add_dtype

HELP = "the guidance scale with the least gFID"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpt", type=Path, required=True, metavar="DIR", help="standalone GPT checkpoint")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="standalone tokenizer checkpoint")
    parser.add_argument("--reference", type=Path, required=True, metavar="FILE", help="ADM's reference batch")
    parser.add_argument("--inception", required=True, metavar="FILE", help="as of gigatok-ds evaluate")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for trials and results")
    parser.add_argument("--schedule", choices=("constant", "step", "rectangular"), default="step", help="default: step")
    parser.add_argument(
        "--start",
        type=float,
        default=1.75,
        metavar="SCALE",
        help="first scale, a multiple of 0.25 (default: 1.75; the original: 2.5 for GPT-B, 1.25 for others)",
    )
    parser.add_argument("--cfg-start", type=float, metavar="R", help="where the step schedule starts (default: 0.18)")
    parser.add_argument("--count", type=int, default=50_000, metavar="N", help="images of a trial (default: 50000)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    add_dtype(parser, "of the GPT")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--keep-samples", action="store_true", help="keep every trial's images (10 GB for 50,000)")
    parser.add_argument("--allow", action="append", default=[], choices=("count", "size", "reference"),
                        help="as of gigatok-ds evaluate; may be repeated")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of this host (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.errors import InputError
    from gigatok_ds.evaluation.results import in_words
    from gigatok_ds.studies.guidance_search import search_guidance
    from gigatok_ds.studies.sampling_stages import GenerationSetup
    from gigatok_ds.studies.stages import Launcher

    if args.cfg_start is not None and args.schedule != "step":
        raise InputError(f"--cfg-start belongs to --schedule step, not {args.schedule}")
    setup = GenerationSetup(gpt=args.gpt, tokenizer=args.tokenizer, reference=args.reference, inception=args.inception,
                            count=args.count, seed=args.seed, dtype=args.dtype, batch_size=args.batch_size,
                            device=args.device, allow=tuple(args.allow))
    best, figures = search_guidance(setup, args.out, Launcher(ranks=args.ranks), schedule=args.schedule,
                                    start=args.start, window_start=args.cfg_start, keep_samples=args.keep_samples)
    print(f"best: scale {best.scale:g}, schedule {best.schedule}" + (f", {best.annotation}" if best.annotation else ""))
    for name, value in figures.items():
        print(f"{name}: {in_words(value)}")
    print(f"all trials: {args.out / 'search.csv'}")
    return 0
