"""Generated images' figures against a reference batch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.generation import check_comparable, evaluate_generation
from gigatok_ds.evaluation.image_metrics import make_grid
from gigatok_ds.evaluation.image_sets import ImageSet, open_images
from gigatok_ds.evaluation.reference_batch import default_cache, load_reference, reference_name
from gigatok_ds.evaluation.results import Results, numeric_settings, png_bytes
from gigatok_ds.measurements.feature_networks import FeatureNetworks
from gigatok_ds.parallel.topology import Topology, single_process
from gigatok_ds.precision import float32_arithmetic
from gigatok_ds.untrusted import read_json

GRID_CLASSES, GRID_PER_CLASS = 10, 8


@float32_arithmetic()
def measure_generation(samples: Path, reference: Path, topology: Topology | None = None, *, networks: FeatureNetworks,
                       allow: Collection[str] = (), cache: Path | None = None, batch_size: int = 32) -> Results:
    """gFID, sFID, Inception Score, precision and recall as ADM's evaluator defines them, through Inception.

    samples: a .npz or a directory of PNGs. reference: ADM's reference batch, whose features are kept in `cache`
    (default: below ~/.cache). topology: as in `measure_reconstruction`. allow: "count", "size", "dtype" or "reference"
    for images that published figures are not of. Raises InputError for what cannot be read, or compared.
    """
    topology = topology or single_process()
    images = open_images(samples, any_dtype="dtype" in allow)
    reference_images = open_images(reference, lossy=True)
    check_comparable(images, reference_name(reference_images), reference_images.size, set(allow))
    inception, said, suffix = networks.load_inception(topology)
    if inception is None:
        raise InputError("generated images are measured through Inception; name its weights")
    known = load_reference(reference, inception, said["inception_sha256"] or "random", topology,
                           cache=cache or default_cache(), batch_size=batch_size)
    figures = evaluate_generation(images, known, inception, topology, suffix=suffix, batch_size=batch_size)
    settings = {
        "samples": samples.name, "samples_sha256": images.sha256() if topology.is_first else None,
        "images": len(images), "pixels": list(images.size), "dtype": images.dtype,
        **_sampling_record(samples), "reference": known.path.name, "reference_kind": known.name,
        "reference_sha256": known.sha256, "reference_images": known.images, "batch_size": batch_size,
        "precision_recall": "3 neighbours, distances in float16 as ADM's evaluator takes them",
        **said, **numeric_settings(topology.device),
    }
    pictures = {"samples, a row for each class": png_bytes(_class_grid(images))} if topology.is_first else {}
    return Results(title=f"Samples {samples.name}", figures=figures, settings=settings, pictures=pictures)


def _sampling_record(samples: Path) -> dict[str, Any]:
    """What `gigatok-ds sample` left beside the images: models, guidance, seed."""
    path = samples / "sampling.json" if samples.is_dir() else samples.with_name(samples.name + ".json")
    if not path.is_file():
        return {"sampling": "unknown: the images have no record of `gigatok-ds sample` beside them"}
    return {"sampling": read_json(path)}


def _class_grid(samples: ImageSet) -> np.ndarray:
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
