"""The optimizer of a network, and the groups of parameters that share a weight decay and a rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gigatok_ds.config.optimizer import OptimizerConfig
from gigatok_ds.engine.depth import in_a_layer, layers_to_last
from gigatok_ds.engine.muon import HIDDEN, Muon
from gigatok_ds.engine.zero_stages import shape_on_this_rank

LR_FACTOR = "lr_factor"  # of a group: what the schedule's learning rate is multiplied by


def build_optimizer(network: nn.Module, optimizer: OptimizerConfig, *, half: bool = False) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay or, as "adam", with the decay added to the gradient, or Muon beside the former.

    One pass over memory for each tensor that Adam updates, without temporaries. Told by `found_inf` on the device, it
    leaves an update out. half: Muon's matrices are sent and orthogonalized in bfloat16.
    """
    groups, how = parameter_groups(network, optimizer), {"lr": optimizer.lr, "betas": optimizer.betas,
                                                         "eps": optimizer.eps}
    if optimizer.kind == "muon":
        return Muon(groups, momentum=optimizer.momentum, dtype=torch.bfloat16 if half else torch.float32, **how)
    kind: Any = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optimizer.kind]
    adam: torch.optim.Optimizer = kind(groups, fused=True, **how)
    return adam


def parameter_groups(network: nn.Module, optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups with and without weight decay, as `optimizer.decay` says, for each factor of the learning rate, and for
    Muon's matrices."""
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    factors, hidden = rate_factors(network, optimizer), hidden_matrices(network, optimizer)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            dims = len(shape_on_this_rank(parameter))
            decays = {"everything": True, "matrices": dims >= 2, "not_norms": "norm" not in name}[optimizer.decay]
            groups.setdefault((name in hidden, not decays, factors[name]), []).append(parameter)
    return [{"params": groups[of_muon, plain, factor], "weight_decay": 0.0 if plain else optimizer.weight_decay,
             LR_FACTOR: factor, HIDDEN: of_muon} for of_muon, plain, factor in sorted(groups)]


def hidden_matrices(network: nn.Module, optimizer: OptimizerConfig) -> set[str]:
    """The trained parameters that are Muon's: weights of the linear layers inside of transformer layers, but for
    projections to modulations, which make vectors out of a class."""
    if optimizer.kind != "muon":
        return set()
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad and in_a_layer(name)
            and len(shape_on_this_rank(parameter)) == 2 and "adaLN" not in name}


def rate_factors(network: nn.Module, optimizer: OptimizerConfig) -> dict[str, float]:
    """What each parameter's learning rate is of the schedule's: its part's factor, times `layerwise_lr` for each layer
    between it and the last (Clark et al. 2020, arXiv:2003.10555; as in the fine-tuning of BEiT, arXiv:2106.08254)."""
    names = [name for name, _ in network.named_parameters()]
    following = layers_to_last(names) if optimizer.layerwise_lr < 1 else dict.fromkeys(names, 0)
    return {name: optimizer.part_lr.get(name.partition(".")[0], 1.0) * optimizer.layerwise_lr**count
            for name, count in following.items()}
