"""Training under DeepSpeed ZeRO."""
