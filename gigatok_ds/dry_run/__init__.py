"""A training step on tensors without storage: what it computes, moves and keeps."""
