"""Activation offload in an engine."""
