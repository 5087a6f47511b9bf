"""The slab file and its free ranges."""
