"""What samples are compared with: a reference batch's statistics and features, kept once they are computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from gigatok_ds.evaluation.adm import gaussian_of
from gigatok_ds.evaluation.distribution import Gaussian
from gigatok_ds.evaluation.extraction import extract_features
from gigatok_ds.evaluation.image_sets import ImageSet, NpzImages, open_images
from gigatok_ds.evaluation.inception import InceptionFeatures
from gigatok_ds.files import write_atomically
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.user_cache import user_cache

ADM_IMAGES = 10_000


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Gaussians of the pooled and the spatial features, and the pooled features (M, 2048) of its images."""

    name: str  # "adm" for ADM's batch of ImageNet at 256 pixels, "custom" for any other
    path: Path
    sha256: str
    size: tuple[int, int]
    images: int
    pooled: Gaussian
    spatial: Gaussian
    features: Tensor


def default_cache() -> Path:
    """Where computed references are kept: below XDG_CACHE_HOME, which is ~/.cache if unset."""
    return user_cache() / "gigatok_ds" / "references"


def reference_name(images: ImageSet) -> str:
    """ADM's batches are known by what they hold: 10,000 images of 256 pixels, and statistics of all of ImageNet."""
    is_adm = (isinstance(images, NpzImages) and images.statistics is not None and len(images) == ADM_IMAGES
              and images.size == (256, 256))
    return "adm" if is_adm else "custom"


def load_reference(path: Path, inception: InceptionFeatures, weights_sha256: str, topology: Topology, *,
                   cache: Path, batch_size: int = 64) -> Reference:
    """The reference at `path`, an .npz or a directory; collective.

    Statistics in the file (mu, sigma, mu_s, sigma_s) are used as they are, as ADM's evaluator does; others, and the
    features, are computed once for each content and network and kept in `cache`.
    """
    images = open_images(path, lossy=True)
    digest = topology.from_first(images.sha256() if topology.is_first else None)
    file = cache / f"{digest[:16]}-{weights_sha256[:16]}.safetensors"
    tensors = topology.from_first(_read(file) if topology.is_first else None)
    if tensors is None:
        features = extract_features(images, inception, topology, batch_size=batch_size, title="reference")
        tensors = {"features": features.pooled} | _statistics(images, features)
        tensors = {name: value.cpu() for name, value in tensors.items()}
        if topology.is_first:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, save({name: value.contiguous() for name, value in tensors.items()}))
    tensors = {name: value.to(topology.device) for name, value in tensors.items()}
    return Reference(name=reference_name(images), path=path, sha256=digest, size=images.size, images=len(images),
                     pooled=Gaussian(tensors["mu"], tensors["sigma"]),
                     spatial=Gaussian(tensors["mu_s"], tensors["sigma_s"]), features=tensors["features"])


def _statistics(images: ImageSet, features) -> dict[str, Tensor]:
    if images.statistics is not None:
        return {name: torch.from_numpy(value).double() for name, value in images.statistics.items()}
    pooled, spatial = gaussian_of(features.pooled), gaussian_of(features.spatial)
    return {"mu": pooled.mean, "sigma": pooled.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}


def _read(file: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(file)
    except (OSError, SafetensorError):  # absent, or damaged: it is computed again
        return None
