"""Clipping by the norm of the full gradient, where the optimizer forms only compact ones."""

import math
from typing import Any

import torch
from torch import Tensor

from ..layers.selected_embedding import SelectedEmbedding
from ..layers.targets import CompactLayer
from ..numerics.seeds import derive_seed
from .optimizer import CompactOptimizer
from .rescaling import Rescaling
from .sketches import directions


class FullNorm:
    """Estimates the norm that the gradient of the whole model would have, from a sketch of every step.

    In each backward every compact layer but embeddings also computes ``G Omega`` with ``sketch_size`` random
    orthonormal directions, from a seed that all ranks share: ``E |G Omega|^2 n / sketch_size = |G|^2``, exactly so at
    ``sketch_size = n``. At a step that is observed anyway, the optimizer's own statistics serve. Parameters that are
    trained whole count with their own gradients, and so do compact embeddings. Where process ranks average gradients
    (DDP), :meth:`norm` averages the sketches over the ranks.

    Gradients may have been scaled since backward, all by one factor, as ``GradScaler.unscale_`` does: the estimate is
    of what they are when :meth:`norm` is called.

    In plain PyTorch and under DDP only: ZeRO clips inside, by the norm of the compact gradients.

    What it costs: ``2 * batch * sketch_size * (m + n)`` operations per layer and backward, ``sketch_size`` numbers per
    token and layer kept for backward, and :attr:`numbers_reduced` per step on several ranks.

    Args:
        optimizer: whose parameters are clipped; made before.
        sketch_size: the relative error of a layer's squared norm is at most about ``sqrt(2 / sketch_size)``, for a
            gradient of rank 1; over many directions and layers errors average out.

    Raises:
        ValueError: ``sketch_size`` is below 1, the optimizer belongs to an engine, or its statistics are ``local``.
    """

    def __init__(self, optimizer: CompactOptimizer[Any], *, sketch_size: int = 16) -> None:
        if sketch_size < 1:
            raise ValueError(f"sketch_size: expected an integer of at least 1, got {sketch_size}")
        if optimizer.in_engine:
            raise ValueError("FullNorm: the optimizer belongs to an engine, which clips by itself (gradient_clipping)")
        if getattr(optimizer.options, "statistics", None) == "local":
            raise ValueError(
                "FullNorm: expected statistics 'sketch' or 'exact', got 'local': ranks observe different gradients"
            )
        self._optimizer, self._size = optimizer, sketch_size
        self._layers = [layer for layer in optimizer.layers if not isinstance(layer.module, SelectedEmbedding)]
        self._own: dict[str, Tensor] = {}
        self._rescaling = Rescaling(self._layers)
        optimizer.forget_hooks.append(self._rescaling.forget)
        # After the optimizer's own hook, which starts the probes of its statistics.
        optimizer.register_step_post_hook(self._after_step)
        self._start()

    @property
    def numbers_reduced(self) -> int:
        """How many fp32 numbers :meth:`norm` reduces over the ranks at a step without other statistics."""
        return sum(layer.module.weight_shape[0] * self._size_of(layer) for layer in self._layers)

    def _size_of(self, layer: CompactLayer) -> int:
        return min(self._size, layer.module.weight_shape[1])

    def _start(self) -> None:
        """Observe the coming step, with the optimizer's own probes where it has some."""
        seed = derive_seed(self._optimizer.options.seed, "norm", self._optimizer.num_steps)
        for layer in self._layers:
            if layer.module.probe is None:
                omega = directions(layer, side="rows", size=self._size_of(layer), seed=seed)
                layer.module.start_probe("rows", torch.linalg.qr(omega).Q)
                assert layer.module.probe is not None
                self._own[layer.name] = layer.module.probe
        self._rescaling.forget()

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for layer in self._layers:
            if layer.module.probe is self._own.pop(layer.name, None):
                layer.module.drop_probe()
        self._start()

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The estimated 2-norm of the full gradient, after backward. Collective where ranks average gradients."""
        squares = [_squared(p.grad) for p in self._exact() if p.grad is not None]
        rescaled = self._rescaling.factor(self._optimizer.backend)
        for layer in self._layers:
            module = layer.module
            if module.probe is None or module.probe.grad is None:
                continue
            observed = module.probe.grad.clone()
            self._optimizer.backend.communicator(layer.name).average_(observed)
            factor = rescaled**2
            if module.omega is not None:
                # |Omega|^2 counts its directions, whatever their scale.
                factor *= module.omega.shape[0] / float(_squared(module.omega))
            squares.append(factor * _squared(observed))
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())

    def _exact(self) -> list[Tensor]:
        estimated = {id(layer.module.compact) for layer in self._layers}
        return [p for group in self._optimizer.param_groups for p in group["params"] if id(p) not in estimated]

    @torch.no_grad()
    def clip_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that the estimated norm is at most ``max_norm``; call it between backward and step.

        Returns:
            The estimated norm before.

        Raises:
            ValueError: ``max_norm`` is not above 0.
        """
        if not (max_norm > 0.0 and math.isfinite(max_norm)):
            raise ValueError(f"max_norm: expected a number above 0, got {max_norm}")
        total = self.norm()
        parameters = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
        return total


def _squared(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
