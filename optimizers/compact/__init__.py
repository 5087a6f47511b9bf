"""What compact optimizers share: groups, fold, refresh, inner optimizers, sketches."""
