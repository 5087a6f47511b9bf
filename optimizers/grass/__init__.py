"""Grass: selected columns or rows of every matrix."""
