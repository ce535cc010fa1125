"""The command line: one file per command, each a thin adapter over a function of the library."""
