"""Layer-wise trust ratios: LAMB and LARS."""
