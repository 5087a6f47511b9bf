"""``narrowgauge report``."""
