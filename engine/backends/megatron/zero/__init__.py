"""DeepSpeed's ZeRO in the place of Megatron's optimizers, around a tensor-parallel model."""
