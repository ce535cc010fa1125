"""Convert a model: from a training run, a standalone directory or an original .pt, to any of these.

  gigatok-ds convert runs/ss checkpoints/tokenizer-ss --verify        the newest checkpoint of a run, for inference
  gigatok-ds convert runs/ss checkpoints/ss-390k --step 390000 --weights model --dtype bf16
  gigatok-ds convert VQ_BL256_e200.pt checkpoints/tokenizer-bl --recipe VQ_BL256
  gigatok-ds convert 0300000.pt checkpoints/gpt-b-2d --recipe GPT-B model.positions=rope_2d
  gigatok-ds convert c2i_B_256.pt checkpoints/llamagen-b --recipe GPT-B model.positions=rope_2d     (LlamaGen)
  gigatok-ds convert checkpoints/tokenizer-ss VQ_SS256.pt --to original
  gigatok-ds convert checkpoints/gpt-b runs/fine --to training --recipe GPT-B data.train=codes/train ...
  gigatok-ds train runs/fine/recipe.yaml --out runs/fine
  gigatok-ds convert runs/ss runs/ss-2 --to training --keep all --recipe VQ_SS256 loss.perceptual.weight=0.5 ...
  gigatok-ds convert checkpoints/tokenizer-ss runs/ss512 --to training --recipe VQ_SS256 model.image_size=512

A standalone directory holds config.json and model.safetensors, which gigatok_ds.load_tokenizer and gigatok_ds.load_gpt
read with PyTorch and safetensors alone. With --to training, what has positions is carried over to another image_size,
latent_tokens or sequence_length by interpolation. Few tensors are in memory at a time, whatever the model's size.
Nothing in a file is executed: a .pt that holds anything but tensors and plain data is refused. A failure leaves nothing
half-made.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from gigatok_ds.cli.dtypes import add_dtype

logger = logging.getLogger(__name__)

HELP = "training run, standalone directory, original .pt: from each to each"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="run directory, one of its checkpoints/step-N, "
                        "standalone directory, or .pt")
    parser.add_argument("out", type=Path, metavar="OUT", help="what to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of --recipe")
    parser.add_argument("--to", choices=("standalone", "original", "training"), default="standalone",
                        help="a directory for inference (default), a .pt as GigaTok's own code reads it, or a run "
                             "directory that training starts from with these weights")
    parser.add_argument("--recipe", metavar="NAME",
                        help="of a .pt: what it was trained with; with --to training: what to train")
    parser.add_argument("--weights", choices=("ema", "model"),
                        help="the moving average, or the weights themselves (default: a run's average if it kept one; "
                             "of a .pt as the original does: a tokenizer's ema if present, a GPT's model)")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint of a run (default: the newest)")
    add_dtype(parser, "of the parameters that are written", short=True)
    parser.add_argument("--fresh", action="append", default=[], metavar="PREFIX",
                        help="with --to training: parameters whose names start so get initial values instead, such as "
                             "cls_embedding for other classes; may be repeated")
    parser.add_argument("--keep", type=lambda text: text.split(","), metavar="PART[,PART...]",
                        help="with --to training, of a run: what goes on beside the weights: usage (the window of "
                             "codes in use), ema, moments (the optimizer's), discriminator, or all; the rest begins "
                             "as in a new run (default: usage)")
    parser.add_argument("--verify", action="store_true",
                        help="read it again, and compare every tensor and the outputs of both models")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace OUT if it is of the kind that is written and holds nothing else")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.checkpoint.conversion import convert
    from gigatok_ds.checkpoint.model_sources import open_model
    from gigatok_ds.config.load import load_recipe
    from gigatok_ds.precision import PRECISIONS

    _refuse_useless(args)
    recipe = load_recipe(args.recipe, args.overrides) if args.recipe else None
    model = open_model(args.source, choice=args.weights, recipe=recipe, step=args.step)
    if args.to == "training":
        return _to_training(args, model, recipe)
    written, verified = convert(model, args.out, to=args.to, dtype=PRECISIONS[args.dtype], verified=args.verify,
                                overwrite=args.overwrite)
    print(f"wrote {written}{': ' if verified else ''}{verified}")
    return 0


def _refuse_useless(args: argparse.Namespace) -> None:
    from gigatok_ds.errors import InputError

    training = args.to == "training"
    if args.out.resolve() == args.source.resolve():
        raise InputError(f"{args.out} is what is converted; choose another place for the result")
    if args.recipe and not (training or args.source.is_file()):
        raise InputError(
            f"--recipe says what a .pt is, or what --to training trains; {args.source} says itself what it is"
        )
    if args.overrides and not args.recipe:
        raise InputError(f"{args.overrides[0]} is a setting of a recipe, but there is no --recipe")
    if training and not args.recipe:
        raise InputError("--to training needs --recipe, the recipe to train")
    for option, given in (("--verify", args.verify), ("--dtype", args.dtype != "fp32"),
                          ("--overwrite", args.overwrite)):
        if training and given:
            raise InputError(f"{option} does not apply to --to training, which writes a new run in fp32")
    for option, given in (("--fresh", args.fresh), ("--keep", args.keep)):
        if given and not training:
            raise InputError(f"{option} is for --to training only")


def _to_training(args: argparse.Namespace, model, recipe) -> int:
    from gigatok_ds.checkpoint.conversion import shown
    from gigatok_ds.checkpoint.model_sources import open_model
    from gigatok_ds.errors import InputError
    from gigatok_ds.training.warm_start import kept_of, write_start_point

    if model.kind != recipe.kind:
        raise InputError(f"{args.source} holds a {model.kind}, but recipe {recipe.name} trains a {recipe.kind}")
    kept = kept_of(args.keep, recipe, model.checkpoint)
    if kept.parts & {"ema", "moments"} and model.provenance["weights"] == "ema":
        # They are kept beside the weights that they are of.
        if args.weights == "ema":
            raise InputError("--weights ema starts from the average, beside which --keep can have neither ema nor "
                             "moments; leave one of the two options out")
        model = open_model(args.source, choice="model", step=args.step)
    with shown(model.weights) as weights:
        write_start_point(recipe, weights, args.out, fresh=args.fresh, classes=model.classes, kept=kept)
    beside = f" with {', '.join(sorted(kept.parts)) or 'the weights alone'} of {args.source}" if args.keep else ""
    print(f"wrote {args.out}{beside}; train it with: gigatok-ds train {args.out}/recipe.yaml --out {args.out}")
    _report_start(args.out, model, recipe)
    return 0


def _report_start(run: Path, model, recipe) -> None:
    """How good a tokenizer is at another size at first, where there are images to see it by."""
    from gigatok_ds.config.sources import locations_of
    from gigatok_ds.errors import InputError, MachineError
    from gigatok_ds.measurements.measure_start import measure_start
    from gigatok_ds.shards.shard_cache import ShardCache

    shapes = [(config.image_size, config.latent_tokens) for config in (model.config, recipe.model)
              if recipe.kind == "tokenizer"]
    data = recipe.data
    location = next(iter(locations_of(data.validation)), None)
    if len(set(shapes)) < 2 or location is None:
        return
    try:
        count, value = measure_start(run, location, orient=data.orient,
                                     cache=ShardCache.of(data.cache, data.cache_gb, data.patience))
    except (InputError, MachineError, OSError) as error:
        logger.warning("what it makes of images before any step is not known: %s", error)
    else:
        print(f"PSNR of {count} validation images before any step: {value:.2f} dB")
