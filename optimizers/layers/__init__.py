"""Compact layers: modules whose trainable parameter is a part of their weight."""
