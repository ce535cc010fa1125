"""Hosts and ranks: the hostfile, what a launcher says, what goes over ssh, the checks before a job can hang."""
