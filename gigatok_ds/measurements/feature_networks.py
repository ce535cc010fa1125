"""The networks through which measurements look, by the names of their weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from gigatok_ds.evaluation.inception import InceptionFeatures, inception_file, load_inception, origin_of
from gigatok_ds.losses.perceptual import LPIPS, load_lpips, vgg_file
from gigatok_ds.models.frozen.pretrained_files import WeightFile
from gigatok_ds.parallel.topology import Topology

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FeatureNetworks:
    """Inception's and VGG16's weights: a file, a directory that holds it, "download", or "random", whose distances
    compare with nothing. What has no name is not measured.
    """

    inception: str | None = None
    vgg: str | None = None

    def load_inception(self, topology: Topology) -> tuple[InceptionFeatures | None, dict[str, Any], str]:
        """The network on the rank's device, what is to be said of it, and the suffix of its figures. Collective.

        Raises InputError for weights that are not there, or are not those.
        """
        if self.inception is None:
            return None, {}, ""
        file = inception_file(self.inception, "--inception")
        _fetch(file, topology)
        if topology.is_first:
            logger.info("%s", origin_of(self.inception, "--inception"))
        network = load_inception(self.inception, "--inception").to(topology.device)
        said = {"inception_sha256": file.sha256(),
                "inception": "torch-fidelity's port of TensorFlow's graph of 2015-12-05"}
        return network, said, "_random" if file.is_random else ""

    def load_lpips(self, topology: Topology) -> tuple[LPIPS | None, str | None]:
        """LPIPS on the rank's device, and the SHA-256 of VGG16's weights. Collective. Raises as `load_inception`."""
        if self.vgg is None:
            return None, None
        file = vgg_file(self.vgg, "--vgg")
        _fetch(file, topology)
        return load_lpips(self.vgg, setting="--vgg").to(topology.device).eval(), file.sha256()


def _fetch(file: WeightFile, topology: Topology) -> None:
    if topology.is_first:
        file.fetch()
    topology.barrier()
