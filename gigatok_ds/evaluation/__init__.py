"""Measuring images, codes and samples."""
