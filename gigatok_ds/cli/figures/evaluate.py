"""Measure a tokenizer's reconstructions, generated images, or a GPT's loss, by the definitions of published figures.

  gigatok-ds evaluate reconstruction TOKENIZER shards/val --inception FILE --vgg FILE --out results/rec
  gigatok-ds evaluate generation samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception FILE --out
    results/gen
  gigatok-ds evaluate loss GPT codes/val --out results/loss        or: evaluate loss GPT shards/val --tokenizer
    TOKENIZER

--out gets results.json, results.md and results.html. Figures are named for what they are of: rfid_val50k, gfid_adm50k.
What would not compare with published figures is refused unless --allow says otherwise. Several processes share the
images, each of which counts once: torchrun --nproc-per-node 8 -m gigatok_ds evaluate ... --device cuda.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gigatok_ds.cli.dtypes import add_dtype
from gigatok_ds.cli.orient import add_orient

if TYPE_CHECKING:
    from gigatok_ds.evaluation.results import Results
    from gigatok_ds.parallel.topology import Topology

HELP = "rFID, gFID, IS, precision, recall, PSNR, LPIPS, validation loss"

ALLOWANCES = ("count", "size", "dtype", "reference")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("reconstruction", "generation", "loss"), help="what to measure")
    parser.add_argument("source", type=Path, help="standalone tokenizer; generated images (.npz or directory of PNGs); "
                                                  "or standalone GPT")
    parser.add_argument("data", nargs="?", help="reconstruction: real images, as shards or a directory; "
                                                "loss: code shards, or images with --tokenizer")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the results")
    parser.add_argument("--inception", metavar="FILE",
                        help="weights-inception-2015-12-05-6726825d.pth of torch-fidelity, a directory that holds it, "
                             "download, or random (its distances compare with nothing)")
    parser.add_argument("--vgg", metavar="FILE", help="reconstruction: VGG16's weights for LPIPS; without, no LPIPS")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="generation: ADM's reference batch")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="generation: where computed references are kept "
                                                                  "(default: ~/.cache/gigatok_ds/references)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="loss: encode images with this tokenizer")
    parser.add_argument("--allow", action="append", default=[], choices=ALLOWANCES,
                        help="accept another number, size or type of images, or reference; may be repeated")
    add_dtype(parser, "loss: of the GPT")
    add_orient(parser, "reconstruction, and loss with --tokenizer: ")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes of a rank that decode images")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


BELONGS = {"inception": ("reconstruction", "generation"), "vgg": ("reconstruction",), "reference": ("generation",),
           "cache": ("generation",), "tokenizer": ("loss",), "orient": ("reconstruction", "loss"),
           "data": ("reconstruction", "loss")}


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.evaluation.results import in_words
    from gigatok_ds.measurements.into_directory import measure_into

    _check(args)
    results = measure_into(args.out, args.device, _measurement(args))
    if results:
        for name, value in {**results.settings, **results.figures}.items():
            print(f"{name}: {in_words(value)}")
        print(f"wrote {args.out / 'results.html'}")
    return 0


def _measurement(args: argparse.Namespace) -> Callable[[Topology], Results]:
    """What is measured, but for the ranks that do it."""
    from gigatok_ds.measurements.feature_networks import FeatureNetworks
    from gigatok_ds.measurements.measure_generation import measure_generation
    from gigatok_ds.measurements.measure_loss import measure_loss
    from gigatok_ds.measurements.measure_reconstruction import measure_reconstruction

    networks = FeatureNetworks(inception=args.inception, vgg=args.vgg)
    if args.what == "reconstruction":
        return partial(measure_reconstruction, args.source, args.data, networks=networks, allow=args.allow,
                       orient=bool(args.orient), batch_size=args.batch_size, workers=args.workers)
    if args.what == "generation":
        return partial(measure_generation, args.source, args.reference, networks=networks, allow=args.allow,
                       cache=args.cache, batch_size=args.batch_size)
    return partial(measure_loss, args.source, args.data, tokenizer=args.tokenizer, dtype=args.dtype,
                   orient=bool(args.orient), batch_size=args.batch_size, workers=args.workers)


def _check(args: argparse.Namespace) -> None:
    from gigatok_ds.errors import InputError

    for name, kinds in BELONGS.items():
        if getattr(args, name) is not None and args.what not in kinds:
            said = "a second argument" if name == "data" else f"--{name}"
            raise InputError(f"{said} does nothing for evaluate {args.what}; leave it out")
    if args.batch_size < 1 or args.workers < 0:
        raise InputError(
            f"--batch-size is {args.batch_size} and --workers {args.workers}; they must be at least 1 and 0"
        )
    if args.what != "generation" and args.data is None:
        raise InputError(f"evaluate {args.what} needs the data as its second argument")
    if args.what == "loss" and args.orient and args.tokenizer is None:
        raise InputError("--orient does nothing for stored codes; leave it out")
    if args.what == "generation" and (args.reference is None or args.inception is None):
        raise InputError("evaluate generation needs --reference and --inception")
    if args.what != "loss" and args.dtype != "float32":
        raise InputError(f"--dtype does nothing for evaluate {args.what}, which is defined in float32; leave it out")
    unused = set(args.allow) - ({"count"} if args.what == "reconstruction" else set(ALLOWANCES)
                                if args.what == "generation" else set())
    if unused:
        raise InputError(f"--allow {sorted(unused)[0]} does nothing for evaluate {args.what}; leave it out")
