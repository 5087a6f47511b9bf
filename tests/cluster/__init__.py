"""Several hosts on one machine: network namespaces, real sshd, real SLURM."""
