"""Forward and backward of one linear layer, compact against dense, in the shapes of a LLaMA block.

python -m benchmarks.compact_linear --dtype float32 --rounds 40
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.compare import Phases, interleave, ratios, show, write
from narrowgauge.optimizers import Grass


def runner(
    in_features: int, out_features: int, tokens: int, dtype: torch.dtype, density: float, **options: str
) -> Callable[[Phases], None]:
    """A closure that runs a fresh layer forward and backward once; without options it stays an ``nn.Linear``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype))
    if options:
        Grass(model, density=density, target_modules=["0"], **options)  # type: ignore[arg-type]
    x = torch.randn(tokens, in_features, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(tokens, out_features, device=device, dtype=dtype)

    def run(phases: Phases) -> None:
        with phases.phase("both"):
            with phases.phase("forward"):
                y = model(x)
            with phases.phase("backward"):
                y.backward(grad)
        model.zero_grad()
        x.grad = None

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--density", type=float, default=0.125)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2736)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, help="write the figures here, one file for all shapes")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    everything = {}
    for in_features, out_features in (
        (arguments.hidden, arguments.hidden),
        (arguments.hidden, arguments.intermediate),
        (arguments.intermediate, arguments.hidden),
    ):
        shape = in_features, out_features, arguments.tokens, dtype, arguments.density
        alternatives = {
            "nn.Linear": runner(*shape),
            "columns, uniform": runner(*shape, side="columns"),
            "columns, block": runner(*shape, side="columns", selection="block"),
            "rows, uniform": runner(*shape, side="rows"),
            "rows, block": runner(*shape, side="rows", selection="block"),
        }
        found = ratios(interleave(alternatives, rounds=arguments.rounds), "nn.Linear")
        title = f"{in_features} -> {out_features}, {arguments.tokens} tokens, {arguments.dtype}"
        everything |= {f"{title}, {name}": figures for name, figures in found.items()}
        show(title, found)
    if arguments.json is not None:
        write(arguments.json, everything, vars(arguments))


if __name__ == "__main__":
    main()
