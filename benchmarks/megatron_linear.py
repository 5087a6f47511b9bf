"""Forward and backward of Megatron's parallel linears, compact against its own, in the shapes of a LLaMA block.

python -m benchmarks.megatron_linear --rounds 20

One process, so that no communication is in the figures: a shape is what one of the tensor-parallel ranks multiplies.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.compare import Phases, interleave, ratios, show, write
from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.ranks.environment import ensure_environment

_LAYERS = {
    "linear_qkv": "self_attention.linear_qkv",
    "linear_proj": "self_attention.linear_proj",
    "linear_fc1": "mlp.linear_fc1",
    "linear_fc2": "mlp.linear_fc2",
}


@contextmanager
def engine_of(arguments: argparse.Namespace, optimizer: dict[str, Any]) -> Iterator[Any]:
    """A model of one layer with an optimizer, as ``narrowgauge train`` makes it."""
    sizes = {
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": arguments.hidden // 64,
        "num_key_value_heads": arguments.hidden // 128,
        "vocab_size": 128,
        "max_position_embeddings": arguments.tokens,
        "tie_word_embeddings": False,
    }
    config = load_config(
        {
            "engine": "megatron",
            "train_batch_size": 1,
            "bf16": {"enabled": arguments.dtype == "bfloat16"},
            "optimizer": optimizer,
            "model": {"config": {"model_type": "llama", **sizes}},
        }
    )
    backend = backend_of("megatron")
    backend.check(config)
    ensure_environment()
    backend.init_distributed()
    assert config.parsed.model is not None
    engine = backend.build(config, backend.construct(config.parsed.model, LlamaConfig(**sizes), config), schedule=None)
    yield engine
    engine.close()


def runner(layer: Any, arguments: argparse.Namespace) -> Callable[[Phases], None]:
    """A closure that runs a layer forward and backward once."""
    for weight in getattr(layer, "held", ()):
        # GaLore observes the gradient of the first step.
        weight.drop_probe()
    device, dtype = layer.weight.device, layer.weight.dtype
    outputs, inputs = layer.weight.shape
    x = torch.randn(arguments.tokens, 1, inputs, device=device, dtype=dtype, requires_grad=True)
    grad: Tensor = torch.randn(arguments.tokens, 1, outputs, device=device, dtype=dtype)

    def run(phases: Phases) -> None:
        with phases.phase("both"):
            with phases.phase("forward"):
                y = layer(x)[0]
            with phases.phase("backward"):
                y.backward(grad)
        x.grad = None

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--density", type=float, default=0.125)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2688)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0, help="of one layer's rounds at most")
    parser.add_argument("--json", type=Path, help="write the figures here, one file for all layers")
    arguments = parser.parse_args()
    grass = {"lr": 1e-3, "density": arguments.density}
    optimizers = {
        "Megatron's own": {"type": "AdamW", "params": {"lr": 1e-3}},
        "columns": {"type": "Grass", "params": grass},
        "columns, shared": {"type": "Grass", "params": {**grass, "shared_inputs": "siblings"}},
        "rows": {"type": "Grass", "params": {**grass, "side": "rows"}},
        "GaLore": {"type": "GaLore", "params": grass},
    }
    layers: dict[str, dict[str, Any]] = {}
    for name, optimizer in optimizers.items():
        # Megatron's process groups go with the engine; what is measured needs none.
        with engine_of(arguments, optimizer) as engine:
            block = engine.module.chunks[0].decoder.layers[0]
            for layer, path in _LAYERS.items():
                layers.setdefault(layer, {})[name] = block.get_submodule(path)
    everything = {}
    for layer, made in layers.items():
        alternatives = {name: runner(module, arguments) for name, module in made.items()}
        measured = interleave(alternatives, rounds=arguments.rounds, seconds=arguments.seconds)
        found = ratios(measured, "Megatron's own")
        title = f"{layer}, {arguments.tokens} tokens, {arguments.dtype}"
        everything |= {f"{title}, {name}": figures for name, figures in found.items()}
        show(title, found)
    if arguments.json is not None:
        write(arguments.json, everything, vars(arguments))


if __name__ == "__main__":
    main()
