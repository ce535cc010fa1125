"""The measurements of `gigatok-ds evaluate` and `probe`, from files to results."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

import torch

from gigatok_ds.checkpoint.standalone import DTYPES, checkpoint_hash, load_gpt, load_tokenizer
from gigatok_ds.data.codes import CodeDataset
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.cropped import CroppedImages
from gigatok_ds.evaluation.generation import check_comparable, evaluate_generation
from gigatok_ds.evaluation.image_metrics import make_grid
from gigatok_ds.evaluation.image_sets import ImageSet, open_images
from gigatok_ds.evaluation.inception import inception_file, load_inception, origin_of
from gigatok_ds.evaluation.loss import codes_of_images, stored_codes, validation_loss
from gigatok_ds.evaluation.probing.features import GPTFeatures, TokenizerFeatures
from gigatok_ds.evaluation.probing.linear_probe import ProbeRun, ProbeSettings
from gigatok_ds.evaluation.reconstruction_figures import VALIDATION_IMAGES, best_median_worst, evaluate_reconstruction
from gigatok_ds.evaluation.reference_batch import default_cache, load_reference, reference_name
from gigatok_ds.evaluation.results import Results, numeric_settings, png_bytes
from gigatok_ds.losses.perceptual import load_lpips, vgg_file
from gigatok_ds.models.frozen.pretrained_files import WeightFile
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.sampling.images import check_pair
from gigatok_ds.shards.remote import open_shards, short_name
from gigatok_ds.untrusted import read_json

SETTING = "--inception"
GRID_CLASSES, GRID_PER_CLASS = 10, 8


def reconstruction(args: argparse.Namespace, topology: Topology) -> Results:
    """A tokenizer's figures on real images."""
    tokenizer = load_tokenizer(args.source, device=str(topology.device))
    images = CroppedImages(args.data, tokenizer.config.image_size)
    if len(images) != VALIDATION_IMAGES and "count" not in args.allow:
        raise InputError(f"{args.data} holds {len(images)} images, but published figures are of ImageNet's "
                         f"{VALIDATION_IMAGES:,} validation images; say --allow count to measure these")
    inception, network, suffix = _inception(args, topology)
    vgg, lpips = None if args.vgg is None else vgg_file(args.vgg, "--vgg"), None
    if vgg:
        _fetch(vgg, topology)
        lpips = load_lpips(args.vgg, setting="--vgg").to(topology.device).eval()
    result = evaluate_reconstruction(tokenizer, images, topology, inception=inception, lpips=lpips, suffix=suffix,
                                     batch_size=args.batch_size, workers=args.workers)
    settings = {
        "tokenizer": args.source.resolve().name, "tokenizer_sha256": checkpoint_hash(args.source),
        "data": short_name(args.data), "data_sha256": images.identity(), "images": len(images),
        "image_size": tokenizer.config.image_size, "dtype": "float32", "batch_size": args.batch_size,
        "pixels": "center crop; reconstructions in 8 bits, rounded down; LPIPS of the unclamped output",
        **network, "vgg16_sha256": vgg.sha256() if vgg else None, **numeric_settings(topology.device),
    }
    pictures = {}
    if topology.is_first:
        metric = "lpips" if lpips else "psnr"
        rows, _ = best_median_worst(tokenizer, images, result.values[metric], lower_is_better=metric == "lpips")
        caption = f"by {metric}: the best images above their reconstructions, then middle ones, then the worst"
        pictures[caption] = png_bytes(make_grid(rows, gap=2))
    return Results(title=f"Reconstructions of {args.source.resolve().name}", figures=result.figures, settings=settings,
                   pictures=pictures)


def generation(args: argparse.Namespace, topology: Topology) -> Results:
    """Generated images' figures against a reference batch."""
    samples = open_images(args.source, any_dtype="dtype" in args.allow)
    reference_images = open_images(args.reference, lossy=True)
    check_comparable(samples, reference_name(reference_images), reference_images.size, set(args.allow))
    inception, network, suffix = _inception(args, topology)
    reference = load_reference(args.reference, inception, network["inception_sha256"] or "random", topology,
                               cache=args.cache or default_cache(), batch_size=args.batch_size)
    figures = evaluate_generation(samples, reference, inception, topology, suffix=suffix, batch_size=args.batch_size)
    settings = {
        "samples": args.source.name, "samples_sha256": samples.sha256() if topology.is_first else None,
        "images": len(samples), "pixels": list(samples.size), "dtype": samples.dtype,
        **_sampling_record(args), "reference": reference.path.name, "reference_kind": reference.name,
        "reference_sha256": reference.sha256, "reference_images": reference.images, "batch_size": args.batch_size,
        "precision_recall": "3 neighbours, distances in float16 as ADM's evaluator takes them",
        **network, **numeric_settings(topology.device),
    }
    pictures = {"samples, a row for each class": png_bytes(_class_grid(samples))} if topology.is_first else {}
    return Results(title=f"Samples {args.source.name}", figures=figures, settings=settings, pictures=pictures)


def loss(args: argparse.Namespace, topology: Topology) -> Results:
    """A GPT's validation loss on stored codes, or on images through a tokenizer."""
    gpt = load_gpt(args.source, device=str(topology.device), dtype=DTYPES[args.dtype])
    if args.tokenizer is None:
        dataset = CodeDataset.open(args.data).number_as(gpt.class_names, args.source)
        batches, origin = stored_codes(dataset, topology, args.batch_size), {"codes": dataset.metadata["provenance"]}
    else:
        tokenizer = load_tokenizer(args.tokenizer, device=str(topology.device))
        images = CroppedImages(args.data, tokenizer.config.image_size)
        images.number_as(gpt.class_names, args.source)
        batches = codes_of_images(tokenizer, images, topology, args.batch_size, workers=args.workers)
        origin = {"tokenizer_sha256": checkpoint_hash(args.tokenizer), "data_sha256": images.identity()}
    figures = validation_loss(gpt, batches, topology)
    settings = {"gpt": args.source.resolve().name, "gpt_sha256": checkpoint_hash(args.source),
                "data": short_name(args.data), **origin, "dtype": args.dtype, **numeric_settings(topology.device)}
    return Results(title=f"Validation loss of {args.source.resolve().name}", figures=figures, settings=settings)


def probe(args: argparse.Namespace, topology: Topology) -> Results:
    """A linear probe's accuracy, trained as far as it is not yet."""
    tokenizer = load_tokenizer(args.tokenizer, device=str(topology.device))
    identity = {"tokenizer_sha256": checkpoint_hash(args.tokenizer)}
    features: TokenizerFeatures | GPTFeatures
    if args.gpt is None:
        features, name = TokenizerFeatures(tokenizer, args.features or "encoder"), args.tokenizer.resolve().name
    else:
        gpt = load_gpt(args.gpt, device=str(topology.device))
        check_pair(gpt, tokenizer)
        features, name = GPTFeatures(tokenizer, gpt, depth=args.depth,
                                     dropout=not args.no_dropout), args.gpt.resolve().name
        identity["gpt_sha256"] = checkpoint_hash(args.gpt)
    train, test = open_shards(args.train), CroppedImages(args.val, tokenizer.config.image_size)
    test.number_as(train.classes, args.train)
    identity["train_sha256"] = train.identity()
    settings = ProbeSettings(
        classes=len(train.classes) or int(train.labels.max()) + 1, epochs=args.epochs, warmup_epochs=args.warmup_epochs,
        base_lr=args.base_lr, batch_size=args.batch_size, flip=not args.no_flip, seed=args.seed)
    run = ProbeRun(features, train, settings, topology, args.out, identity=identity, workers=args.workers)
    run.run()
    top1 = 100 * run.accuracy(test, max(args.batch_size // topology.world_size, 1))
    said = {**identity, **features.describe(), **asdict(settings), "val_sha256": test.identity(),
            "train_images": len(train), "val_images": len(test), **numeric_settings(topology.device)}
    return Results(title=f"Linear probe of {name}", figures={"probe_top1_percent": top1}, settings=said)


MEASURES = {"reconstruction": reconstruction, "generation": generation, "loss": loss}


def _inception(args: argparse.Namespace, topology: Topology):
    """The network on the rank's device (None without --inception), what is to be said of it, the suffix of its figures.
    """
    if args.inception is None:
        return None, {}, ""
    file = inception_file(args.inception, SETTING)
    _fetch(file, topology)
    if topology.is_first:
        print(origin_of(args.inception, SETTING), file=sys.stderr)
    network = load_inception(args.inception, SETTING).to(topology.device)
    said = {"inception_sha256": file.sha256(), "inception": "torch-fidelity's port of TensorFlow's graph of 2015-12-05"}
    return network, said, "_random" if file.is_random else ""


def _fetch(file: WeightFile, topology: Topology) -> None:
    if topology.is_first:
        file.fetch()
    topology.barrier()


def _sampling_record(args: argparse.Namespace) -> dict:
    """What `gigatok-ds sample` left beside the images: models, guidance, seed."""
    path = args.source / "sampling.json" if args.source.is_dir() else args.source.with_name(args.source.name + ".json")
    if not path.is_file():
        return {"sampling": "unknown: the images have no record of `gigatok-ds sample` beside them"}
    return {"sampling": read_json(path)}


def _class_grid(samples: ImageSet):
    """The first images of up to ten classes, evenly spaced among those there are; without labels, the first images."""
    if samples.labels is None:
        rows = [list(range(min(GRID_PER_CLASS, len(samples))))]
    else:
        members: dict[int, list[int]] = {}
        for number, label in enumerate(samples.labels.tolist()):
            members.setdefault(label, []).append(number)
        classes = sorted(members)
        step = max(len(classes) // GRID_CLASSES, 1)
        rows = [members[label][:GRID_PER_CLASS] for label in classes[::step][:GRID_CLASSES]]
        columns = min(map(len, rows))
        rows = [row[:columns] for row in rows]
    return make_grid(torch.stack([torch.cat([samples.read(range(n, n + 1)) for n in row]) for row in rows]), gap=2)
