"""Steps of a run computed once more, on any layout, and compared with what the run has written down."""
