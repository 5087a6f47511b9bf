"""Bytes between process ranks: gradients and parameters over data-parallel ones, inputs over tensor-parallel ones."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import make_engine, micro_batches, run_config

from .test_parity import OPTIMIZERS, SP, TP2

STEPS = 2


def bytes_per_step(
    optimizer: dict[str, Any], family: str = "llama", layout: dict[str, Any] = TP2
) -> tuple[float, float, tuple[float, float]]:
    engine = make_engine(run_config("megatron", family, layout, optimizer=optimizer), family)
    engine.traffic.attach()
    for step in range(STEPS):
        engine.train_step(micro_batches(engine, step), lambda name: nullcontext())
    found = engine.traffic.reduced / STEPS, engine.traffic.gathered / STEPS, engine.dense_traffic(gathered=0.0)
    engine.close()
    return found


def padded(elements: int, multiple: int = 64) -> int:
    """Megatron begins each parameter at a multiple of 64 elements of its buffer."""
    return -(-elements // multiple) * multiple


@pytest.mark.parametrize("name", ["columns", "galore-right"])
def test_gradients_and_parameters_are_exchanged_as_the_density_says(megatron_ranks: MegatronPool, name: str) -> None:
    """Of 4 layers at TP2 x DP2; hidden 32, inner 48, GQA 4/2, vocabulary 101. gloo reduces and scatters at twice the
    bytes; parameters are gathered once per step.
    """
    hidden, inner, key, vocab, layers = 32, 48, 16, 51, 4
    # Rows of each rank times selected columns: q, k, v, o, gate, up, down.
    columns = [
        *((rows // 2, hidden // 4) for rows in (hidden, key, key)),
        (hidden, hidden // 4 // 2),
        *((inner // 2, hidden // 4),) * 2,
        (hidden, inner // 4 // 2),
    ]
    if name == "galore-right":
        # A basis of a quarter of the smaller dimension; row-parallel ones are whole on each rank.
        columns = [
            (hidden // 2, hidden // 4),
            *((key // 2, key // 4),) * 2,
            (hidden, hidden // 4),
            *((inner // 2, hidden // 4),) * 2,
            (hidden, hidden // 4),
        ]
    compact = sum(padded(m * r) for m, r in columns)
    others = 2 * padded(vocab * hidden) + (2 * layers + 1) * padded(hidden)
    elements = padded(layers * compact + others, 128)
    for reduced, gathered, dense in megatron_ranks.run(bytes_per_step, OPTIMIZERS[name]):
        assert reduced == 2 * 4 * elements / 2
        assert gathered == 4 * elements / 2
        assert dense[1] > 1.5 * gathered


def gathered_by_a_layer(optimizer: dict[str, Any]) -> list[int]:
    """Bytes that the first layer's qkv gathers, in forward and in backward."""
    engine: Any = make_engine(run_config("megatron", "llama", {**TP2, **SP}, optimizer=optimizer), "llama")
    layer = engine.module.chunks[0].decoder.layers[0].self_attention.linear_qkv
    gather, sizes = dist.all_gather_into_tensor, []

    def counted(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(output.nbytes)
        return gather(output, *args, **kwargs)

    dist.all_gather_into_tensor = counted
    try:
        x = torch.randn(8, 2, 32, requires_grad=True)
        layer(x)[0].sum().backward()
    finally:
        dist.all_gather_into_tensor = gather
    engine.close()
    return sizes


@pytest.mark.parametrize(("shared", "share"), [("siblings", 0.25), (None, 0.75)])
def test_backward_gathers_the_selected_columns_only(
    megatron_ranks: MegatronPool, shared: str | None, share: float
) -> None:
    """A quarter for each choice: one for q, k and v together, or one for each."""
    optimizer = {"type": "Grass", "params": {**OPTIMIZERS["columns"]["params"], "shared_inputs": shared}}
    whole = 16 * 2 * 32 * 4
    for forward, *backward in megatron_ranks.run(gathered_by_a_layer, optimizer, ranks=2):
        assert forward == whole
        assert sum(backward) == share * whole
