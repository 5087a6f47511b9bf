"""One linear layer, compact against dense."""

import torch

from benchmarks.compact_linear import runner
from benchmarks.compare import interleave
from benchmarks.gpu.measure import rows
from benchmarks.gpu.stages import Emit

_DENSITY = 1 / 8
# Tokens, hidden and intermediate size: LLaMA's of 1B and of 7B.
_SIZES = [(8192, 2048, 5504), (8192, 4096, 11008)]


def run(emit: Emit, *, small: bool) -> None:
    for tokens, hidden, intermediate in [(64, 64, 96)] if small else _SIZES:
        for dtype in (torch.bfloat16, torch.float32):
            for in_features, out_features in ((hidden, hidden), (hidden, intermediate), (intermediate, hidden)):
                shape = in_features, out_features, tokens, dtype, _DENSITY
                alternatives = {
                    "nn.Linear": runner(*shape),
                    "columns, uniform": runner(*shape, side="columns"),
                    "columns, block": runner(*shape, side="columns", selection="block"),
                    "rows, uniform": runner(*shape, side="rows"),
                    "rows, block": runner(*shape, side="rows", selection="block"),
                }
                phases = interleave(alternatives, rounds=3 if small else 40, seconds=8.0)
                what = {"shape": f"{in_features} -> {out_features}", "tokens": tokens, "dtype": str(dtype)[6:]}
                for name, figures in rows(phases, "nn.Linear").items():
                    emit(case=name, **what, **figures)
