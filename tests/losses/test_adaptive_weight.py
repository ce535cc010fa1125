"""The adaptive weight from the last layer's input and output gradients, against the published form."""

import torch
import torch.nn.functional as F
from torch import nn

from gigatok_ds.losses.adaptive import adaptive_weight, kernel_gradient


def test_kernel_gradient_is_autograds():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 3, 3, padding=1)
    inputs = [torch.randn(2, 8, 6, 6) for _ in range(2)]
    outputs = [layer(x) for x in inputs]
    loss = outputs[0].square().mean() + outputs[1].tanh().mean()
    gradients = torch.autograd.grad(loss, outputs, retain_graph=True)
    expected, = torch.autograd.grad(loss, layer.weight)
    torch.testing.assert_close(kernel_gradient(layer, zip(inputs, gradients, strict=True)), expected, rtol=1e-5,
                               atol=1e-7)


def test_the_weight_is_the_ratio_of_gradient_lengths():
    torch.manual_seed(0)
    layer, judge = nn.Conv2d(8, 3, 3, padding=1), nn.Conv2d(3, 1, 4)
    x, images = torch.randn(2, 8, 6, 6), torch.randn(2, 3, 6, 6)
    output = layer(x)
    plain, adversarial = F.mse_loss(output, images), -judge(output).mean()
    lengths = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in (plain, adversarial)]
    ours = adaptive_weight(*(kernel_gradient(layer, [(x, torch.autograd.grad(loss, output, retain_graph=True)[0])])
                             for loss in (plain, adversarial)))
    torch.testing.assert_close(ours, lengths[0] / (lengths[1] + 1e-4), rtol=1e-5, atol=0)
    assert not ours.requires_grad


def test_a_dead_adversarial_gradient_does_not_explode():
    assert adaptive_weight(torch.ones(4), torch.zeros(4)).item() == 1e4
