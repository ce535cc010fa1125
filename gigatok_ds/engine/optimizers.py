"""The optimizer of a network, and the groups of parameters that share a weight decay and a rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gigatok_ds.config.optimizer import OptimizerConfig
from gigatok_ds.engine.depth import layers_to_last
from gigatok_ds.engine.zero_stages import shape_on_this_rank

LR_FACTOR = "lr_factor"  # of a group: what the schedule's learning rate is multiplied by


def build_optimizer(network: nn.Module, optimizer: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay or, as "adam", with the decay added to the gradient.

    One pass over memory for each tensor, without temporaries. Told by `found_inf` on the device, it leaves an update
    out.
    """
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optimizer.kind]
    adam: torch.optim.Optimizer = kind(parameter_groups(network, optimizer), lr=optimizer.lr, betas=optimizer.betas,
                                       eps=optimizer.eps, fused=True)
    return adam


def parameter_groups(network: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups with and without weight decay, as `optimizer.decay` says, and for each factor of the learning rate."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    factors = rate_factors(network, optimizer)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            dims = len(shape_on_this_rank(parameter))
            decays = {"everything": True, "matrices": dims >= 2, "not_norms": "norm" not in name}[optimizer.decay]
            groups.setdefault((not decays, factors[name]), []).append(parameter)
    return [{"params": groups[plain, factor], "weight_decay": 0.0 if plain else optimizer.weight_decay,
             LR_FACTOR: factor} for plain, factor in sorted(groups)]


def rate_factors(network: nn.Module, optimizer: OptimizerConfig) -> dict[str, float]:
    """What each parameter's learning rate is of the schedule's: its part's factor, times `layerwise_lr` for each layer
    between it and the last (Clark et al. 2020, arXiv:2003.10555; as in the fine-tuning of BEiT, arXiv:2106.08254)."""
    names = [name for name, _ in network.named_parameters()]
    following = layers_to_last(names) if optimizer.layerwise_lr < 1 else dict.fromkeys(names, 0)
    return {name: optimizer.part_lr.get(name.partition(".")[0], 1.0) * optimizer.layerwise_lr**count
            for name, count in following.items()}
