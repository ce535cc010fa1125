"""The demo: the whole system on real images, from files to a report."""
