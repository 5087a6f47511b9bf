"""The words of the ``narrowgauge`` command, by subject; each imports torch and DeepSpeed only when it is called."""
