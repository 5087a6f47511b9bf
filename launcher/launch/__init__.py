"""``narrowgauge launch``: one machine, the hosts of a hostfile, or a SLURM allocation."""
