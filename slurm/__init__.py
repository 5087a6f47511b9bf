"""Batch scripts; `narrowgauge slurm` fills them in."""
