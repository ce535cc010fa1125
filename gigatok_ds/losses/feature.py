"""Feature reconstruction: the transformer decoder should return to what the transformer encoder was given."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def feature_mse(decoded: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(decoded, target)


def feature_cosine(decoded: Tensor, target: Tensor) -> Tensor:
    """Mean over positions of one minus the cosine along the channels."""
    return (1 - F.cosine_similarity(decoded, target, dim=1)).mean()


# By AuxiliaryConfig.feature.
FEATURE_LOSSES = {"mse": feature_mse, "cosine": feature_cosine}


def feature_loss(decoded: Tensor, cnn_feature: Tensor, kind: str) -> Tensor:
    """The distance of `kind` between (B, C, h, w) features; cnn_feature is a target and takes no gradient."""
    return FEATURE_LOSSES[kind](decoded.float(), cnn_feature.detach().float())
