"""Forward and backward of one layer's experts, compact against dense, in the form of Mixtral.

python -m benchmarks.experts --rounds 20
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from benchmarks.compare import Phases, interleave, ratios, show, write
from narrowgauge.optimizers import Grass


def runner(
    config: MixtralConfig, tokens: int, dtype: torch.dtype, *, implementation: str = "eager", **options: object
) -> Callable[[Phases], None]:
    """A closure that runs fresh experts forward and backward once; with options they are compact."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config._experts_implementation = implementation
    experts = MixtralExperts(config).to(device, dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    model = nn.ModuleDict({"experts": experts})
    if options:
        Grass(model, target_modules=["*"], **options)  # type: ignore[arg-type]
    x = torch.randn(tokens, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
    scores = torch.randn(tokens, config.num_local_experts, device=device).softmax(-1)
    weights, chosen = scores.topk(config.num_experts_per_tok, dim=-1)
    weights, grad = weights.to(dtype).requires_grad_(), torch.randn_like(x)

    def run(phases: Phases) -> None:
        with phases.phase("both"):
            with phases.phase("forward"):
                y = experts(x, chosen, weights)
            with phases.phase("backward"):
                y.backward(grad)
        model.zero_grad()
        x.grad = weights.grad = None

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--density", type=float, default=0.125)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1792)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    config = MixtralConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_local_experts=arguments.experts,
        num_experts_per_tok=2,
    )
    layer = config, arguments.tokens, getattr(torch, arguments.dtype)
    density = arguments.density
    alternatives = {
        "dense, eager": runner(*layer),
        "dense, grouped_mm": runner(*layer, implementation="grouped_mm"),
        "columns, uniform": runner(*layer, density=density, side="columns"),
        "columns, block": runner(*layer, density=density, side="columns", selection="block"),
        "rows, uniform": runner(*layer, density=density, side="rows"),
    }
    phases = interleave(alternatives, rounds=arguments.rounds)
    everything = {}
    for baseline in ("dense, eager", "dense, grouped_mm"):
        found = ratios(phases, baseline)
        show(f"against {baseline}, {arguments.tokens} tokens, {arguments.dtype}", found)
        everything |= {f"{name} against {baseline}": figures for name, figures in found.items()}
    if arguments.json is not None:
        write(arguments.json, everything, vars(arguments))


if __name__ == "__main__":
    main()
