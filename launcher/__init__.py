"""The ``narrowgauge`` command."""
