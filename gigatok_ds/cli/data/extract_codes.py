"""Encode image shards with a standalone tokenizer into code shards, the training data of a GPT.

  gigatok-ds extract-codes runs/export/tokenizer shards/train --out codes/train --crops ten-crop
  torchrun --nproc-per-node 8 -m gigatok_ds extract-codes ... --device cuda     one rank for each GPU

Ranks share the work through the output directory, which all of them must see. Interrupted, the same command goes on
where it was, with any number of ranks, and the files end up the same; until all are written, --out is incomplete and
training refuses it. Codes that the original extracted (NAME_codes/*.npy and NAME_labels/*.npy) are converted with

  gigatok-ds extract-codes --from-npy DIR --codebook-size 16384 --out codes/train
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from gigatok_ds.cli.orient import add_orient

HELP = "image shards + tokenizer -> code shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tokenizer", type=Path, nargs="?", help="standalone tokenizer checkpoint")
    parser.add_argument("shards", nargs="?", help="directory or URL of image shards")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of code shards to write")
    parser.add_argument("--crops", metavar="KIND", help="center, flip, ten-crop (default, as GigaTok) or random-N")
    parser.add_argument("--batch-size", type=int, metavar="N", help="crops in a forward pass (default: 32)")
    parser.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="default: 10000")
    parser.add_argument("--workers", type=int, metavar="N",
                        help="processes of each rank that decode images (default: 4, or the number of cores)")
    parser.add_argument("--device", help="cpu or cuda, of which each rank takes its own (default: cpu)")
    parser.add_argument("--tf32", action="store_true", default=None,
                        help="on GPUs: round factors to 10 bits; faster, and some codes are others (default: float32)")
    add_orient(parser)
    parser.add_argument("--from-npy", type=Path, metavar="DIR", help="convert the original's codes instead: its folder "
                        "NAME_codes, with NAME_labels beside it, or the folder that holds both")
    parser.add_argument("--codebook-size", type=int, metavar="K", help="of those codes")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.cluster.launched import launched_rank

    _check(args)
    rank = launched_rank()
    if args.from_npy:
        from gigatok_ds.packing.npy_codes import convert_npy_codes

        convert_npy_codes(args.from_npy, args.out, codebook_size=args.codebook_size, rank=rank,
                          samples_per_shard=args.samples_per_shard)
    else:
        _extract(args, rank)
    print(f"wrote {args.out}" if rank.is_first else f"rank {rank.rank} wrote its share of {args.out}")
    return 0


def _extract(args: argparse.Namespace, rank) -> None:
    from gigatok_ds.checkpoint.standalone import identify, load_tokenizer
    from gigatok_ds.parallel.rank_device import rank_device
    from gigatok_ds.sampling.augmented_views import views_of
    from gigatok_ds.sampling.extract import Extraction, extract_codes

    tokenizer = load_tokenizer(args.tokenizer, device=str(rank_device(rank, args.device or "cpu")))
    extract_codes(
        tokenizer, args.shards, args.out, rank=rank,
        views=views_of("ten-crop" if args.crops is None else args.crops, tokenizer.config.image_size,
                       orient=bool(args.orient)),
        provenance={"tokenizer": identify(args.tokenizer)},
        extraction=Extraction(
            batch_size=32 if args.batch_size is None else args.batch_size, samples_per_shard=args.samples_per_shard,
            workers=min(4, len(os.sched_getaffinity(0))) if args.workers is None else args.workers,
            tf32=bool(args.tf32)),
    )


def _check(args: argparse.Namespace) -> None:
    """InputError unless the arguments belong to one of the two sources."""
    from gigatok_ds.errors import InputError

    if not args.from_npy:
        if args.shards is None:
            raise InputError("give a tokenizer and a directory of image shards, or --from-npy")
        if args.codebook_size is not None:
            raise InputError("--codebook-size goes with --from-npy; a tokenizer knows its own")
        if args.workers is not None and args.workers < 0:
            raise InputError(f"--workers is {args.workers}; it must be 0 or more")
        if args.tf32 and (args.device or "cpu") == "cpu":
            raise InputError("--tf32 does nothing on a CPU; leave it out, or give --device cuda")
        return
    if args.codebook_size is None:
        raise InputError("--from-npy needs --codebook-size, which the files do not tell (published recipes: 16384)")
    for name in ("tokenizer", "shards", "crops", "batch_size", "workers", "device", "tf32", "orient"):
        if getattr(args, name) is not None:
            option = name if name in ("tokenizer", "shards") else f"--{name.replace('_', '-')}"
            raise InputError(f"--from-npy converts codes that exist; {option} would do nothing, leave it out")
