"""Discriminators: PatchGAN, StyleGAN's, and DINO's heads."""
