"""Generating codes from classes: cache, guidance, token choice, the decoding loop."""
