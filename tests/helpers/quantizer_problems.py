"""Latents and codebooks, and the quantizer's sums over them by their definitions."""

import torch
import torch.nn.functional as F

TEMPERATURE = 0.01


def problem(count, size, dim, kind="unit", seed=0):
    """Latents (count, dim) and a codebook (size, dim) in float32."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, dim, generator=generator)
    codebook = torch.randn(size, dim, generator=generator)
    if kind == "raw":
        return latents / 3, codebook / 3
    if kind == "collapsed":
        codebook = codebook[:1] + 1e-3 * codebook
    if kind == "duplicates":
        codebook = codebook[: size // 4].repeat(4, 1)
    return F.normalize(latents, dim=1), F.normalize(codebook, dim=1)


def distances(latents, codebook):
    return (latents[:, None] - codebook[None]).square().sum(2)


def materialised(latents, codebook):
    """Distances, entropy, average probability and log-sum-exp by their definitions."""
    d = distances(latents, codebook)
    log_p = (-d / TEMPERATURE).log_softmax(1)
    return d, -(log_p.exp() * log_p).sum(1), log_p.exp().mean(0), (-d / TEMPERATURE).logsumexp(1)


def penalty(entropy, average, upstream=None):
    """The entropy penalty, or with `upstream` any weighting of entropies and probabilities."""
    if upstream is None:
        return entropy.mean() + (average * (average + 1e-5).log()).sum()
    return (entropy * upstream[0].to(entropy)).sum() + (average * upstream[1].to(average)).sum()


def assert_close(ours, expected, tolerance):
    """Largest error relative to the largest expected value."""
    expected = expected.to(ours.device)
    error = (ours.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error <= tolerance, f"{error:.2e} > {tolerance:.0e}"


CASES = [(1, 1, 8, "unit"), (1, 700, 8, "unit"), (257, 300, 4, "unit"), (300, 1000, 8, "unit"), (130, 513, 8, "raw"),
         (200, 512, 8, "duplicates"), (150, 400, 5, "unit"), (200, 256, 8, "collapsed")]
