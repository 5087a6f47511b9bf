"""Ready configurations: DeepSpeed JSON files, and model sizes under ``models``."""
