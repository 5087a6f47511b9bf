"""TRAlgorithm: any optimizer, held near an anchor that moves every few steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .compact.optimizer import CompactOptimizer

_ANCHOR = "anchor"


class TrustRegion:
    """Pulls what an optimizer trains toward where it was at the start of the cycle, before each of its steps.

    Step ``t`` of a cycle of ``steps``, counted from 0, is ``w <- w - 2 pull / (t + 1) (w - anchor)`` and then the
    optimizer's own, at a rate that :func:`inner_rate` divides by ``t + 1``. The anchor is ``w`` at ``t = 0``; with
    ``steps = 1`` nothing is left but the optimizer.

    Source: the code of Qiu, "TRAlgorithm" (github.com/huiqu18/TRAlgorithm), whose proximal term has a weight in inverse
    proportion to the rate: the pull of a step does not depend on the rate there either. It is added to the gradient
    there. Here it is apart from it, as AdamW's decay is: the same for SGD without momentum; momentum, Adam's moments
    and the clipping of gradients do not see it.

    The anchors are in the optimizer's state under ``anchor``, one for each tensor of its groups, on the same device and
    cut as they are; so they are saved with it. Compact parameters have theirs in the subspace: a change of subspace
    moves it to where they are then.

    Args:
        optimizer: after an engine has made it. Its state is created by its first step.
        position: optimizer steps taken so far, as a schedule's ``last_epoch``.
        pull: the proximal term's weight, lambda.
        steps: of a cycle.

    Raises:
        ValueError: a number out of range, or the optimizer keeps its state in a form of its own.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, position: Callable[[], int], *, pull: float = 0.1, steps: int = 10
    ) -> None:
        if not 0.0 <= pull <= 1.0:
            raise ValueError(f"pull: expected a number of at least 0 and of at most 1, got {pull}")
        if steps < 1:
            raise ValueError(f"steps: expected an integer of at least 1, got {steps}")
        self._optimizer, self._position, self._pull, self._steps = optimizer, position, pull, steps
        self._own = optimizer if isinstance(optimizer, CompactOptimizer) else None
        if self._own is not None and self._own.options.base != "AdamW":
            raise ValueError(f"base: expected AdamW with a trust region, got {self._own.options.base}")
        if self._own is not None and self._own.changes_in_step:
            raise ValueError(
                "expected subspaces that change after a step with a trust region, got reference_compatible"
            )
        # Copies that wait for the optimizer to make its state: it does so where there is none.
        self._fresh: dict[Tensor, Tensor] = {}
        # At which change of subspace a compact parameter's anchor was taken; of those not yet met, the saved number.
        self._taken: dict[Tensor, int] = {}
        self._saved_refreshes = 0
        # A compact optimizer's base steps between the checks of its layers and their fold.
        stepping = self._own.base if self._own is not None else optimizer
        self._handles = [
            stepping.register_step_pre_hook(self._before_step),
            stepping.register_step_post_hook(self._after_step),
        ]

    @property
    def position(self) -> int:
        """The place in the cycle of the step that comes next, from 0."""
        return self._position() % self._steps

    def state(self) -> dict[str, Any]:
        """What a resume needs beside the optimizer's state: JSON values."""
        return {
            "steps": self._steps,
            "position": self.position,
            "num_refreshes": next(iter(self._taken.values()), self._saved_refreshes),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`; after the optimizer's own, and the number of its steps, were restored.

        Raises:
            ValueError: it is of another cycle, or of another place in it.
        """
        for key, own in (("steps", self._steps), ("position", self.position)):
            if state.get(key) != own:
                raise ValueError(f"trust region: expected {key} {own}, got {state.get(key)}")
        self._taken, self._saved_refreshes = {}, state["num_refreshes"]

    def close(self) -> None:
        """Leave the optimizer as it was; the anchors stay in its state."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        number = self.position
        for group in self._optimizer.param_groups:
            is_compact = self._own is not None and group["kind"] == "compact"
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                if number == 0 or (is_compact and self._has_moved(tensor)):
                    self._fresh[tensor] = tensor.detach().clone()
                elif self._pull > 0.0:
                    tensor.lerp_(self._optimizer.state[tensor][_ANCHOR], 2.0 * self._pull / (number + 1))
                if is_compact and self._own is not None:
                    self._taken[tensor] = self._own.num_refreshes

    def _has_moved(self, tensor: Tensor) -> bool:
        assert self._own is not None
        return self._taken.get(tensor, self._saved_refreshes) != self._own.num_refreshes

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        state = self._optimizer.state
        for tensor, anchor in self._fresh.items():
            state[tensor][_ANCHOR] = anchor
        self._fresh = {}
        if self._own is None or not self._own.folds_to_zero:
            return
        # Compact values that start each step at zero are counted from there: their anchor moves the other way.
        for group in self._own.param_groups:
            for tensor in group["params"] if group["kind"] == "compact" else ():
                if tensor.grad is not None:
                    state[tensor][_ANCHOR].sub_(tensor)


def inner_rate(step: int, steps: int) -> float:
    """What the rate of a step, the first being 0, is multiplied by in cycles of ``steps``."""
    return 1.0 / (step % steps + 1)
