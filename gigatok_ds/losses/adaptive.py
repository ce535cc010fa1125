"""The adaptive weight of the adversarial term (Esser et al. 2021, VQGAN, arXiv:2012.09841, equation 7).

The published form differentiates two losses with respect to the last layer's weight inside the generator's graph,
which no ZeRO stage with partitioned gradients allows. The last layer is a convolution, so both gradients follow from
its input and the losses' gradients at its output, outside of that graph.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

EPSILON, LIMIT = 1e-4, 1e4


def kernel_gradient(layer: nn.Conv2d, passes: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Gradient of the layer's weight, float32, over (input, gradient at the output) of each of its calls."""
    shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    total = sum(
        conv2d_weight(x.detach().float(), shape, gradient.float(), layer.stride, layer.padding)
        for x, gradient in passes
    )
    assert isinstance(total, Tensor), "the layer was not called"
    return total


def adaptive_weight(image_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """|image_gradient| / (|adversarial_gradient| + 1e-4), at most 1e4: a scalar without gradient."""
    return (image_gradient.norm() / (adversarial_gradient.norm() + EPSILON)).clamp(0, LIMIT).detach()
