"""Whole measurements, from files to results with a record of what was measured how; `evaluation` has the figures."""
