"""Moving saved tensors between memory and storage."""
