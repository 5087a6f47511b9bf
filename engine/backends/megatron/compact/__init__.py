"""Column- and row-parallel linears of Megatron-core that train compact parameters."""
