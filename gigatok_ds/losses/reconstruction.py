"""How far a reconstruction is from its image, pixel by pixel."""

from __future__ import annotations

import torch.nn.functional as F

# By ReconstructionConfig.kind: the mean over all elements of two tensors of the same shape.
RECONSTRUCTION_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
