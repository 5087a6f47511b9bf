"""``narrowgauge train``: plan, model, loop, evaluation, sample, export."""
