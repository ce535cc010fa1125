"""Files of other hosts, by whatever protocol."""
