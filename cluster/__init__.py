"""The same commands on one machine and on a cluster."""
