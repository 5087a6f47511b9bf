"""What process ranks agree on, and how they end together."""
