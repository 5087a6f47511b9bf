"""Training on a chosen part of each large batch."""
