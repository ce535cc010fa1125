"""Generate images of given classes from a standalone GPT and tokenizer, as one grid (a row for each class).

  gigatok-ds sample --gpt runs/demo/export/gpt --tokenizer runs/demo/export/tokenizer --classes 3,7 --out grid.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "classes -> images, with classifier-free guidance"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpt", type=Path, required=True, metavar="DIR", help="standalone GPT checkpoint")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="standalone tokenizer checkpoint")
    parser.add_argument("--classes", required=True, metavar="A,B,...", help="class numbers, separated by commas")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="grid to write")
    parser.add_argument("--per-class", type=int, default=8, help="images per class (default: 8)")
    parser.add_argument("--cfg", type=float, default=1.75, metavar="SCALE", help="guidance scale; 1 is off (default: 1.75)")
    parser.add_argument("--cfg-schedule", default="constant", help="constant (default), step, linear, cosine, ...")
    parser.add_argument("--cfg-start", type=float, metavar="R", help="where the step schedule starts (GigaTok: 0.18)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest codes; 0 keeps all (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus filtering; 1 keeps all (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.errors import InputError
    from gigatok_ds.sampling.images import sample_grid

    if not all(part.strip().isdigit() for part in args.classes.split(",")):
        raise InputError(f"--classes is {args.classes!r}; give class numbers separated by commas, e.g. 207,980")
    if args.cfg_start is not None and args.cfg_schedule != "step":
        raise InputError(f"--cfg-start belongs to --cfg-schedule step, not {args.cfg_schedule}")
    sample_grid(
        args.gpt,
        args.tokenizer,
        [int(part) for part in args.classes.split(",")],
        args.out,
        per_class=args.per_class,
        seed=args.seed,
        device=args.device,
        cfg_scale=args.cfg,
        cfg_schedule=args.cfg_schedule,
        cfg_schedule_kwargs=None if args.cfg_start is None else {"window_start": args.cfg_start},
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    print(f"wrote {args.out}")
    return 0
