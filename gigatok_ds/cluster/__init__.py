"""Several hosts: the hostfile, what ranks are given over ssh, and the checks before a job can hang."""
