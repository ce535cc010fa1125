"""Checkpoints: training state, the standalone format, and the original GigaTok files."""
