"""Seconds of a step that ``narrowgauge plan``'s arithmetic tells, with rates measured here, against those of the step.

python -m benchmarks.plan_time: one process rank on one core, processor time, so that other work on the machine counts
little; rates and steps are measured in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.forecast.forecast import forecast, seconds_of
from narrowgauge.engine.forecast.machine import Machine
from narrowgauge.engine.run.validate import check_for

_WIDTH, _WIDE, _LAYERS, _VOCAB, _LENGTH = 512, 1376, 4, 4096, 256
_ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
_GRASS = {"optimizer": {"type": "Grass", "params": {"lr": 1e-3, "density": 0.125, "refresh_interval": 1000}}}
CASES: dict[str, dict[str, Any]] = {
    "AdamW": _ADAMW,
    "AdamW, two micro-batches": {**_ADAMW, "gradient_accumulation_steps": 2},
    "AdamW, layers recomputed": {**_ADAMW, "model": {"gradient_checkpointing": "non-reentrant"}},
    "Grass, columns 1/8": _GRASS,
    "Grass, sequences of 512": {**_GRASS, "data": {"sequence_length": 512}},
}


@dataclass(frozen=True, kw_only=True)
class Measured(Machine):
    """This machine: FLOP/s of matrix products and bytes per second of other operations."""

    flops: float
    bytes_per_second: float

    def products(self, *, is_bf16: bool) -> float:
        return self.flops

    @property
    def operations(self) -> float:
        return self.bytes_per_second


def seconds(run: Callable[[], object], rounds: int) -> list[float]:
    """Processor time of each round, after one."""
    found = []
    for _ in range(rounds + 1):
        begin = time.process_time()
        run()
        found.append(time.process_time() - begin)
    return found[1:]


def rates(rounds: int) -> tuple[float, float]:
    """FLOP/s of a linear layer's three products, and bytes per second of operations between layers: SiLU, a product, a
    sum and squares, of 512 tokens.
    """
    x, weight, y = torch.randn(512, _WIDTH), torch.randn(_WIDE, _WIDTH), torch.randn(512, _WIDE)

    def products() -> tuple[Tensor, ...]:
        return x @ weight.t(), y @ weight, y.t() @ x

    flops = 6 * 512 * _WIDTH * _WIDE
    gate, up = torch.randn(512, _WIDE), torch.randn(512, _WIDE)

    def operations() -> tuple[Tensor, ...]:
        return F.silu(gate), gate * up, x + x, x.square()

    moved = 4 * 512 * (5 * _WIDE + 5 * _WIDTH)
    return (
        flops / statistics.median(seconds(products, rounds)),
        moved / statistics.median(seconds(operations, rounds)),
    )


def config_of(changes: dict[str, Any]) -> Any:
    sizes = {
        "model_type": "llama",
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 8,
        "max_position_embeddings": 1024,
    }
    raw = {
        "engine": "ddp",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "training": {"steps": 100},
        "logging": {"run_dir": "runs/plan"},
        **changes,
        "model": {"config": sizes, **changes.get("model", {})},
        "data": {"train": "stdlib", "vocab_size": _VOCAB, "sequence_length": _LENGTH, **changes.get("data", {})},
    }
    return load_config(raw)


def measured_step(config: Any, described: Any, rounds: int) -> float:
    """Seconds of a step of this configuration, the median."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(described)
    if config.parsed.model.gradient_checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
    engine = backend_of("ddp").build(config, model, schedule=lambda opt: LambdaLR(opt, lambda step: 1.0))
    batches = config.batches(1)
    tokens = torch.randint(_VOCAB, (batches.micro, config.parsed.data.sequence_length))

    def micro_batches() -> Iterator[Tensor]:
        for _ in range(batches.accumulation_steps):
            yield tokens

    found = statistics.median(seconds(lambda: engine.train_step(micro_batches(), lambda name: nullcontext()), rounds))
    engine.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    columns = ["", "products", "other operations", "optimizer", "told, ms", "measured, ms", "", "GFLOP/s, GB/s"]
    print(f"| {' | '.join(columns)} |\n|---{'|---:' * (len(columns) - 1)}|")
    for name in arguments.only:
        config = config_of(CASES[name])
        _, described = check_for(config, 1)
        told = forecast(config, described, world_size=1)
        before = rates(4 * arguments.rounds)
        measured = measured_step(config, described, arguments.rounds)
        after = rates(4 * arguments.rounds)
        flops, moved = ((one + other) / 2 for one, other in zip(before, after, strict=True))
        machine = Measured(gpus=1, flops=flops, bytes_per_second=moved)
        found = seconds_of(config, told.batches, *told.ranks[0], machine)
        parts = (found.products, found.operations, found.optimizer, found.step, measured)
        cells = (*(f"{1e3 * s:,.0f}" for s in parts), f"{found.step / measured - 1:+.0%}")
        print(f"| {name} | {' | '.join(cells)} | {flops / 1e9:.0f}, {moved / 1e9:.1f} |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
