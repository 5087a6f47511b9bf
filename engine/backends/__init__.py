"""The engines that train: one folder each, behind :mod:`narrowgauge.engine.protocol`."""
