"""A training step with the balance losses of the megatron engine, against the stock one of Megatron's.

python -m benchmarks.megatron_balance --rounds 20 --csv benchmarks/results/megatron_balance.csv

One process. ``global`` over several micro-batches counts ahead by a forward without head and gradients; Megatron's own
``global_aux_loss`` takes the counts of the micro-batches so far instead, and its gradient depends on their number.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig

from benchmarks.compare import Phases, interleave, ratios, show
from benchmarks.results_file import Row, write_rows
from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.ranks.environment import ensure_environment

STOCK = "Megatron's own"
_COEFFICIENT = 0.01


def engine_of(arguments: argparse.Namespace, balance: str, num_micro_batches: int) -> Any:
    """A mixture as ``narrowgauge train`` makes it."""
    sizes: dict[str, Any] = {
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.hidden // 64,
        "num_key_value_heads": arguments.hidden // 64,
        "num_local_experts": arguments.experts,
        "vocab_size": arguments.vocabulary,
        "max_position_embeddings": arguments.tokens,
        "sliding_window": None,
        "router_aux_loss_coef": _COEFFICIENT,
    }
    config = load_config(
        {
            "engine": "megatron",
            "train_batch_size": num_micro_batches,
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "model": {"config": {"model_type": "mixtral", **sizes}},
            "data": {"sequence_length": arguments.tokens},
            "training": {"steps": 1},
            "megatron": {"balance_loss": "none" if balance == STOCK else balance},
        }
    )
    backend = backend_of("megatron")
    backend.check(config)
    ensure_environment()
    backend.init_distributed()
    assert config.parsed.model is not None
    engine = backend.build(
        config, backend.construct(config.parsed.model, MixtralConfig(**sizes), config), schedule=None
    )
    if balance == STOCK:
        take_stock_router(engine, num_micro_batches)
    return engine


def take_stock_router(engine: Any, num_micro_batches: int) -> None:
    """Megatron's router and loss in the place of ours."""
    from megatron.core.transformer.moe.router import TopKRouter

    from narrowgauge.engine.backends.megatron.balance import Balance

    class Stock(TopKRouter):
        def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
            """As in ours: Megatron compiles a function to find out that there is none."""

    transformer = engine.module.transformer
    transformer.moe_router_load_balancing_type = "global_aux_loss"
    transformer.moe_aux_loss_coeff = _COEFFICIENT
    for router in engine.module.routers.values():
        router.__class__ = Stock
        router.routing_type = "global_aux_loss"
        del router.global_tokens_per_expert, router.ga_steps
        router.register_buffer("global_tokens_per_expert", torch.zeros(transformer.num_moe_experts))
        router.register_buffer("ga_steps", torch.zeros(()))
        router.to(engine.device)
    engine._balance = Balance(engine.module, num_micro_batches)


def runner(engine: Any, micro_batches: list[Tensor]) -> Callable[[Phases], None]:
    """A closure that trains a step."""

    def run(phases: Phases) -> None:
        with phases.phase("step"):
            engine.train_step(iter(micro_batches), lambda name: nullcontext())

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=448)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=256, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0, help="of the rounds of one number of micro-batches")
    parser.add_argument("--csv", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for number in arguments.micro_batches:
        batches = list(torch.randint(arguments.vocabulary, (number, arguments.tokens)).chunk(number))
        engines = {name: engine_of(arguments, name, number) for name in (STOCK, "none", "micro_batch", "global")}
        measured = interleave(
            {name: runner(engine, batches) for name, engine in engines.items()},
            rounds=arguments.rounds,
            seconds=arguments.seconds,
        )
        found = ratios(measured, STOCK)
        show(f"{number} micro-batches of {arguments.tokens} tokens", found)
        for name, figures in found.items():
            low, high = figures["step"]["ratio_quartiles"]
            own = {"seconds": figures["step"]["seconds_median"], "ratio": figures["step"]["ratio"]}
            rows.append({"micro_batches": number, "balance": name, **own, "ratio_low": low, "ratio_high": high})
        for engine in engines.values():
            engine.close()
    if arguments.csv is not None:
        write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
