"""Shards of flattened parameters."""
