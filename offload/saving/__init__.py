"""What a forward saves: graphs of saved tensors, and recomputation inside layers."""
