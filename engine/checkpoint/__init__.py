"""Checkpoints: their files, the weights and the optimizer's state in them."""
