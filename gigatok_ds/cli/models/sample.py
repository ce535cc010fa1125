"""Generate images of given classes from a standalone GPT and tokenizer, as one grid (a row for each class), or many
images for evaluation, as a directory of PNGs or the .npz that ADM's evaluation reads.

  gigatok-ds sample --gpt runs/demo/export/gpt --tokenizer runs/demo/export/tokenizer --classes 3,7 --out grid.png
  gigatok-ds sample --gpt GPT --tokenizer TOKENIZER --count 50000 --balanced --cfg 1.75 --out samples.npz

Image i of a seed is always the same, whatever the batch size and the number of processes; many images may be
interrupted and continued, and drawn by several processes (torchrun --nproc-per-node 8 -m gigatok_ds sample ...).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gigatok_ds.cli.dtypes import add_dtype

HELP = "classes -> images, with classifier-free guidance"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpt", type=Path, required=True, metavar="DIR", help="standalone GPT checkpoint")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="standalone tokenizer checkpoint")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--classes", metavar="A,B,...", help="a grid of these classes, separated by commas: numbers, or "
                                                           "the names "
                                                         "that the GPT has for them")
    what.add_argument("--count", type=int, metavar="N", help="N images of classes drawn at random (see --balanced)")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH",
                        help="the grid's PNG; with --count a directory for PNGs, or a file ending in .npz")
    parser.add_argument("--per-class", type=int, help="images per class in a grid (default: 8)")
    parser.add_argument("--balanced", action="store_true", help="with --count: image i has class i modulo their number")
    parser.add_argument("--cfg", type=float, default=1.75, metavar="SCALE",
                        help="guidance scale; 1 is off (default: 1.75)")
    parser.add_argument("--cfg-schedule", default="constant", help="constant (default), step, linear, cosine, ...")
    parser.add_argument("--cfg-start", type=float, metavar="R",
                        help="where the step schedule (GigaTok: 0.18) or the rectangular one starts")
    parser.add_argument("--cfg-end", type=float, metavar="R", help="where the rectangular schedule ends")
    parser.add_argument("--cfg-interval", type=int, default=-1, metavar="STEP",
                        help="no guidance after this decoding step; -1 is off (default: -1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest codes; 0 keeps all (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus filtering; 1 keeps all (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--batch-size", type=int, metavar="N",
                        help="images at a time (default: 32 on a CPU, on a GPU as many as half of its memory holds)")
    add_dtype(parser, "of the GPT, of which bfloat16 is the faster one on GPUs")
    parser.add_argument("--compile", action="store_true", help="compile the network's part of a step: for GPUs")
    parser.add_argument("--tp", type=int, default=1, metavar="N",
                        help="ranks that share each layer of the GPT (default: 1)")
    parser.add_argument("--force", action="store_true",
                        help="decode with this tokenizer though the GPT was trained on codes of another")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.errors import InputError
    from gigatok_ds.parallel.topology import join_ranks, stop_process_group
    from gigatok_ds.precision import float32_arithmetic
    from gigatok_ds.sampling.images import check_per_class
    from gigatok_ds.sampling.many import SamplingJob, draw_grid, draw_many

    if args.classes is not None and args.balanced:
        raise InputError("--balanced belongs to --count; a grid has the classes that --classes names")
    if args.count is not None and args.per_class is not None:
        raise InputError("--per-class belongs to --classes; --count says how many images there are")
    if args.cfg_start is not None and args.cfg_schedule not in ("step", "rectangular"):
        raise InputError(f"--cfg-start belongs to --cfg-schedule step or rectangular, not {args.cfg_schedule}")
    if args.cfg_end is not None and args.cfg_schedule != "rectangular":
        raise InputError(f"--cfg-end belongs to --cfg-schedule rectangular, not {args.cfg_schedule}")
    windows = {"window_start": args.cfg_start, "window_end": args.cfg_end}
    windows = {name: value for name, value in windows.items() if value is not None}
    settings = {"cfg_scale": args.cfg, "cfg_schedule": args.cfg_schedule, "cfg_interval": args.cfg_interval,
                "cfg_schedule_kwargs": windows or None,
                "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    job = SamplingJob(gpt=args.gpt, tokenizer=args.tokenizer, settings=settings, seed=args.seed,
                      batch_size=args.batch_size, dtype=args.dtype, compile=args.compile, force=args.force)
    per_class = 8 if args.per_class is None else args.per_class
    job.check()
    check_per_class(per_class)
    classes = _classes(args)
    topology = join_ranks(args.device, args.tp)
    try:
        with float32_arithmetic():
            if args.classes is not None:
                draw_grid(job, topology, classes, args.out, per_class=per_class)
                said = f"wrote {args.out}"
            else:
                drawn = draw_many(job, topology, args.out, count=args.count, balanced=args.balanced)
                said = f"wrote {args.out}: {args.count} images, {args.count - drawn} of which were there"
    finally:
        stop_process_group(topology)
    if topology.is_first:
        print(said)
    return 0


def _classes(args: argparse.Namespace) -> list[int]:
    """What --classes says, as numbers; none without it."""
    from gigatok_ds.checkpoint.class_names import ClassNames, class_numbers
    from gigatok_ds.checkpoint.standalone import read_config

    if args.classes is None:
        return []
    return class_numbers([word.strip() for word in args.classes.split(",")],
                         ClassNames(read_config(args.gpt)["classes"], str(args.gpt)))
