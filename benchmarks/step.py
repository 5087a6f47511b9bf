"""A training step of a LLaMA with Grass against dense AdamW: forward, backward, optimizer with fold, and the whole.

python -m benchmarks.step --dtype float32 --rounds 15
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.compare import Phases, interleave, ratios, show, write
from benchmarks.quality_methods import Method
from narrowgauge.optimizers import Grass

_NEVER = 1 << 30


def build(arguments: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        max_position_embeddings=arguments.length,
        use_cache=False,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, dtype=getattr(torch, arguments.dtype))
    return model


def stepper(arguments: argparse.Namespace, **options: object) -> Callable[[Phases], None]:
    """A closure that takes one step of a fresh model; without options the optimizer is dense AdamW."""
    model = build(arguments)
    optimizer = (
        Grass(model, lr=1e-3, density=arguments.density, refresh_interval=None, **options)  # type: ignore[arg-type]
        if options
        else torch.optim.AdamW(model.parameters(), lr=1e-3)
    )
    tokens = torch.randint(arguments.vocab, (arguments.batch, arguments.length)).to(model.device)

    def step(phases: Phases) -> None:
        with phases.phase("step"):
            with phases.phase("forward"):
                loss = model(input_ids=tokens, labels=tokens).loss
            with phases.phase("backward"):
                loss.backward()
            with phases.phase("optimizer + fold"):
                optimizer.step()
            optimizer.zero_grad()
        if isinstance(optimizer, Grass):
            with phases.phase("refresh"):
                optimizer.refresh()

    return step


def method_stepper(
    method: Method, model: Any, tokens: Tensor, *, interval: int = _NEVER
) -> tuple[Callable[[Phases], None], Callable[[Phases], None]]:
    """Closures that take one step with a method of ``benchmarks.quality_methods``, and that change its subspace once.

    Args:
        interval: steps between the changes that fall into a step.
    """
    optimizer: Any = method.make(
        model, lr=1e-3, matrix_lr_scale=0.1, betas=(0.9, 0.999), interval=interval, **method.options
    )

    def step(phases: Phases) -> None:
        with phases.phase("step"):
            model(input_ids=tokens, labels=tokens).loss.backward()
            with phases.phase("optimizer"):
                optimizer.step()
            optimizer.zero_grad()

    def refresh(phases: Phases) -> None:
        if hasattr(optimizer, "refresh"):
            with phases.phase("refresh"):
                optimizer.refresh()
        elif type(optimizer).__module__.startswith("galore_torch"):
            model(input_ids=tokens, labels=tokens).loss.backward()
            with phases.phase("refresh"):
                for parameter, state in optimizer.state.items():
                    if "projector" in state:
                        # It decomposes the gradient at the steps that its gap divides.
                        state["projector"].project(parameter.grad, 0)
            optimizer.zero_grad()

    return step, refresh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--density", type=float, default=0.125)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2736)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--interval", type=int, default=50, help="steps over which the cost of a refresh is spread")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    alternatives = {
        "dense AdamW": stepper(arguments),
        "columns, uniform": stepper(arguments, side="columns"),
        "columns, block": stepper(arguments, side="columns", selection="block"),
        "rows, uniform": stepper(arguments, side="rows"),
    }
    phases = interleave(alternatives, rounds=arguments.rounds)
    refresh = {name: own.seconds.pop("refresh", []) for name, own in phases.items()}
    for name, own in phases.items():
        steps = own.seconds["step"]
        shares = [r / arguments.interval / s for r, s in zip(refresh[name], steps, strict=False)] or [0.0]
        share = 100 * sorted(shares)[len(shares) // 2]
        print(f"{name}: a refresh every {arguments.interval} steps costs {share:.2f} % of a step")
    count = sum(p.numel() for p in build(arguments).parameters())
    title = f"{count / 1e6:.1f} M parameters, {arguments.batch * arguments.length} tokens, {arguments.dtype}"
    found = ratios(phases, "dense AdamW")
    show(title, found)
    if arguments.json is not None:
        write(arguments.json, found, vars(arguments))


if __name__ == "__main__":
    main()
