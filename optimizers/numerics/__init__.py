"""Moments, rounding, selection rules."""
