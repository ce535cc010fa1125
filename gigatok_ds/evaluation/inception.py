"""The Inception network of FID: torch-fidelity's port of the TensorFlow graph that the published evaluators use."""

from __future__ import annotations

import importlib.util
import io
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.image_metrics import to_uint8
from gigatok_ds.models.frozen.pretrained import fill_frozen, read_frozen_weights
from gigatok_ds.models.frozen.pretrained_files import WeightFile
from gigatok_ds.streams import torch_stream

FEATURES = 2048
SPATIAL_CHANNELS = 7  # of the 17 x 17 map that sFID looks at
SPATIAL_FEATURES = 17 * 17 * SPATIAL_CHANNELS
FILE = "weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"


class InceptionOutput(NamedTuple):
    """What ADM's evaluator takes of the network, float32: pooled (B, 2048), `pool_3` in TensorFlow's graph; spatial
    (B, 2023), the first 7 channels of `mixed_6/conv`, flattened in the order row, column, channel; logits (B, 1008),
    the pooled features times the classifier's weights without its bias."""

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


class InceptionFeatures(nn.Module):
    """Frozen, in float32; images are (B, 3, H, W), uint8 or floats in [-1, 1], features float32 (B, 2048).

    An image is taken as a file would hold it, in 8 bits, and resized to 299 pixels as TensorFlow 1 did.
    """

    def __init__(self, network: nn.Module):
        """network: uint8 images (B, 3, H, W) to a tuple that holds their features."""
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self._run(images)[0]

    def outputs(self, images: Tensor) -> InceptionOutput:
        """Everything that ADM's evaluator looks at; the network must be torch-fidelity's."""
        maps: list[Tensor] = []
        hook = self.network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(
            lambda _module, _inputs, output: maps.append(output))
        try:
            pooled, logits = self._run(images)
        finally:
            hook.remove()
        return InceptionOutput(pooled, maps[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1), logits)

    @torch.no_grad()
    def _run(self, images: Tensor) -> tuple[Tensor, ...]:
        # TensorFloat-32, which convolutions use unless told not to, would round features to three digits.
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            return self.network(images if images.dtype == torch.uint8 else to_uint8(images))


def inception_file(weights: str | Path, setting: str) -> WeightFile:
    return WeightFile(setting=setting, value=weights, names=(FILE,), url=URL,
                      what=f"torch-fidelity's Inception v3, {FILE} of its release v0.2.0")


def load_inception(weights: str | Path, setting: str) -> InceptionFeatures:
    """The network with the weights of a file, read as plain data, or with seeded ones, whose distances mean nothing.

    weights as in `WeightFile.value`; setting is the recipe key that names the file. Raises InputError naming it when
    torch-fidelity is not installed, or the file is missing, unreadable or of another network.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise InputError(f"{setting} needs the package torch-fidelity; pip install 'gigatok_ds[eval]'")
    file = inception_file(weights, setting)
    if file.is_random:
        network = _empty_network()
        fill_frozen(network, _random_weights(network), setting)
        return InceptionFeatures(network)
    state = read_frozen_weights(file)
    network = _empty_network()
    # Older files lack these counters of training steps, and evaluation ignores them.
    counters = {name: torch.zeros(()) for name in network.state_dict() if name.endswith("num_batches_tracked")}
    fill_frozen(network, counters | state, f"{setting}: {file.find()} should be {file.what}, but")
    return InceptionFeatures(network)


def origin_of(weights: str | Path, setting: str) -> str:
    """A line that says which weights these are: the SHA-256 of the file, and whether it is the published one."""
    file = inception_file(weights, setting)
    if file.is_random:
        return "warning: the Inception network has random weights: its distances compare with nothing published"
    found = file.sha256()
    if found == SHA256:
        return f"Inception weights: {file.find()}, SHA-256 {found}, the published file"
    return (f"warning: Inception weights: {file.find()}, SHA-256 {found}, which is not {FILE} ({SHA256}): "
            "distances may not compare with published ones")


def _empty_network() -> nn.Module:
    """torch-fidelity's network without weights or storage."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Empty(FeatureExtractorInceptionV3):
        """Its constructor downloads weights, or reads a file that may run code: it is given an empty one instead."""

        def load_state_dict(self, state, *arguments, **options):
            return super().load_state_dict(state, *arguments, **options) if state else None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.device("meta"):
        return Empty("inception-v3-compat", [str(FEATURES), "logits_unbiased"], feature_extractor_weights_path=nothing)


def _random_weights(network: nn.Module) -> dict[str, Tensor]:
    """He-normal kernels, so that features neither vanish nor grow with depth, and normalisations that do nothing."""
    state = {}
    for name, value in network.state_dict().items():
        if value.dim() > 1:
            noise = torch.randn(value.shape, generator=torch_stream(0, "inception", name))
            state[name] = noise * math.sqrt(2 / value[0].numel())
        else:
            scale = name.endswith(("bn.weight", "running_var"))
            state[name] = torch.ones(value.shape) if scale else torch.zeros(value.shape)
    return state
