"""What benchmarks/gpu_acceptance.py runs: one file for each section, and what they have in common."""
