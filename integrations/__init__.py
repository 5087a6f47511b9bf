"""Where people already are: what makes other libraries' training loops use narrowgauge's optimizers and offload."""
