"""Training data: text or Megatron token files, packed to fixed length, in an order that only depends on the seed."""
