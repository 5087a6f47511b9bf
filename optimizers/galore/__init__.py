"""GaLore without the full gradient."""
