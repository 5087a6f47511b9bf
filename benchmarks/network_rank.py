"""One host's process rank of ``benchmarks.network``: obeys orders, a JSON line each, on its standard input."""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "dense AdamW, ZeRO-2": {"stage": 2},
    "Grass, ZeRO-1": {"stage": 1, "density": True},
    "Grass, ZeRO-2": {"stage": 2, "density": True},
    "Grass, ZeRO-3": {"stage": 3, "density": True},
}


# Gathers of a few MB: in larger ones between two hosts, gloo's one connection is busy with writing and does not read,
# so that the link is used in one direction at a time.
_GATHERS = {"allgather_bucket_size": 1_500_000, "stage3_prefetch_bucket_size": 500_000}


@dataclass(frozen=True)
class Shape:
    """The model, a LLaMA whose head is its embedding, and a rank's one micro-batch of ``length`` tokens."""

    hidden: int = 640
    intermediate: int = 1728
    layers: int = 5
    vocab: int = 4096
    length: int = 512
    density: float = 0.125


class _Engines:
    """The engines of all methods, each with a model of its own from the same seed."""

    def __init__(self, shape: Shape) -> None:
        import torch

        from narrowgauge.engine.backends.deepspeed.traffic import TrafficCounter

        self._shape = shape
        self._made: dict[str, Any] = {}
        for name, method in METHODS.items():
            self._made[name] = self._make(method)
        self._tokens = torch.randint(shape.vocab, (1, shape.length))
        self._counter = TrafficCounter()
        self._counter.attach()

    def _make(self, method: dict[str, Any]) -> Any:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from narrowgauge.engine import initialize

        shape = self._shape
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=max(1, shape.hidden // 64),
            max_position_embeddings=shape.length,
            tie_word_embeddings=True,
            use_cache=False,
        )
        model = LlamaForCausalLM(config)
        self.parameters = sum(p.numel() for p in model.parameters())
        optimizer: dict[str, Any] = {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}
        if "density" in method:
            params = {"lr": 1e-4, "density": shape.density, "refresh_interval": 1000}
            optimizer = {"type": "Grass", "params": params}
        return initialize(
            model=model,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": method["stage"], **_GATHERS},
                "optimizer": optimizer,
            },
        )[0]

    def step(self, method: str) -> dict[str, float]:
        """One training step; seconds, bytes this host sent, and bytes its collectives amount to."""
        import torch.distributed as dist

        engine = self._made[method]
        dist.barrier()
        counted, sent, begin = self._counter.reduced + self._counter.gathered, _sent(), time.perf_counter()
        engine.backward(engine(input_ids=self._tokens, labels=self._tokens).loss)
        engine.step()
        seconds = time.perf_counter() - begin
        dist.barrier()
        counted = self._counter.reduced + self._counter.gathered - counted
        return {"seconds": seconds, "sent": _sent() - sent, "counted": counted}


def _sent() -> int:
    """Bytes sent by this host's interface, as the kernel counts them."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("eth0:"))


def main() -> None:
    """Answer each line of standard input with one on standard output; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    shape = Shape(**json.loads(sys.argv[1]))
    engines = None
    for line in sys.stdin:
        order = json.loads(line)
        if engines is None:
            engines = _Engines(shape)
        answer = {"parameters": engines.parameters} if order["do"] == "build" else engines.step(order["method"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
