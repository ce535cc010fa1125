"""A tokenizer's figures on real images."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from gigatok_ds.checkpoint.standalone import checkpoint_hash, load_tokenizer
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.cropped import CroppedImages
from gigatok_ds.evaluation.image_metrics import make_grid
from gigatok_ds.evaluation.reconstruction_figures import VALIDATION_IMAGES, best_median_worst, evaluate_reconstruction
from gigatok_ds.evaluation.results import Results, numeric_settings, png_bytes
from gigatok_ds.measurements.feature_networks import FeatureNetworks
from gigatok_ds.parallel.topology import Topology, single_process
from gigatok_ds.precision import float32_arithmetic
from gigatok_ds.shards.remote import short_name


@float32_arithmetic()
def measure_reconstruction(tokenizer: Path, data: str, topology: Topology | None = None, *,
                           networks: FeatureNetworks = FeatureNetworks(), allow: Collection[str] = (),
                           orient: bool = False, batch_size: int = 32, workers: int = 0) -> Results:
    """PSNR, SSIM and use of the codebook; rFID through Inception and LPIPS through VGG16, if those are there.

    tokenizer: a standalone checkpoint. data: image shards or a directory of images. topology: the ranks that share the
    images, each of which counts once; this process alone by default. allow: with "count", another number of images than
    ImageNet's validation has. orient: see `decode_image`. Raises InputError for what cannot be read, or compared.
    """
    topology = topology or single_process()
    network = load_tokenizer(tokenizer, device=str(topology.device))
    images = CroppedImages(data, network.config.image_size, orient=orient)
    if len(images) != VALIDATION_IMAGES and "count" not in allow:
        raise InputError(f"{data} holds {len(images)} images, but published figures are of ImageNet's "
                         f"{VALIDATION_IMAGES:,} validation images; say --allow count to measure these")
    inception, said, suffix = networks.load_inception(topology)
    lpips, vgg_sha256 = networks.load_lpips(topology)
    result = evaluate_reconstruction(network, images, topology, inception=inception, lpips=lpips, suffix=suffix,
                                     batch_size=batch_size, workers=workers)
    settings = {
        "tokenizer": tokenizer.resolve().name, "tokenizer_sha256": checkpoint_hash(tokenizer),
        "data": short_name(data), "data_sha256": images.identity(), "images": len(images),
        "image_size": network.config.image_size, "dtype": "float32", "batch_size": batch_size,
        "orient": orient,
        "pixels": "center crop; reconstructions in 8 bits, rounded down; LPIPS of the unclamped output",
        **said, "vgg16_sha256": vgg_sha256, **numeric_settings(topology.device),
    }
    pictures = {}
    if topology.is_first:
        metric = "lpips" if lpips else "psnr"
        rows, _ = best_median_worst(network, images, result.values[metric], lower_is_better=metric == "lpips")
        caption = f"by {metric}: the best images above their reconstructions, then middle ones, then the worst"
        pictures[caption] = png_bytes(make_grid(rows, gap=2))
    return Results(title=f"Reconstructions of {tokenizer.resolve().name}", figures=result.figures, settings=settings,
                   pictures=pictures)
