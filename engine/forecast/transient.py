"""What an optimizer's step takes in passing."""

from narrowgauge.optimizers import CompactOptimizer
from narrowgauge.optimizers.apollo.apollo import Apollo
from narrowgauge.optimizers.frugal.frugal import Frugal

from ..config.config import Config
from .subject import FP32, Subject


def step_transient(config: Config, subject: Subject, numel: int, *, on_gpu: bool) -> int:
    """Bytes that the step of ``numel`` neighbouring elements makes and drops."""
    optimizer, block = subject.optimizer, config.parsed.optimizer
    assert block is not None
    if optimizer is None:
        # DeepSpeed's kernels work in place; torch's as below.
        if config.parsed.engine == "deepspeed" and not block.params.get("torch_adam"):
            return 0
        return _adam(numel, on_gpu=on_gpu)
    if subject.muon is not None:
        # What is orthogonalized, and the matrices of its iteration.
        largest = max(spec.size for spec in subject.muon.matrices.values())
        return max(_adam(numel, on_gpu=on_gpu), FP32 * (numel + 4 * largest))
    if isinstance(optimizer, CompactOptimizer):
        return 0 if getattr(optimizer.options, "base", "AdamW") == "AdamW8bit" else _adam(numel, on_gpu=on_gpu)
    if isinstance(optimizer, Frugal):
        # The directions of the largest matrix; values, gradients and Adam's directions of the chosen coordinates.
        return FP32 * (2 * min(subject.largest, numel) + 4 * numel * subject.moments(FP32) // (8 * subject.trained))
    if isinstance(optimizer, Apollo):
        return FP32 * 2 * min(subject.largest, numel)
    return _adam(numel, on_gpu=on_gpu)


def _adam(numel: int, *, on_gpu: bool) -> int:
    """The root of the second moment; on the CPU once more, divided."""
    return FP32 * numel * (1 if on_gpu else 2)
