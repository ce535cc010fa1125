"""The quantizer's heavy operations: nearest code, and the entropy of the soft assignment."""
