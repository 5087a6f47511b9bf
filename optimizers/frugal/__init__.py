"""FRUGAL: its subspaces and projections."""
