"""Megatron's router, which counts where tokens go and has the balance loss of ours."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from .keys import BalanceLoss


class CountingRouter(TopKRouter):
    """A ``TopKRouter`` with the loss ``coefficient * E * sum_e f_e P_e`` for each layer, ``E`` experts.

    ``f_e`` is the share of the chosen (token, expert) pairs that are expert ``e``'s, a constant, so that the ``f_e``
    sum to 1; ``P_e`` is the mean over the tokens of the softmax over all experts. The loss is the coefficient where
    all experts are chosen equally often. Choices are counted before tokens are dropped.

    ``global`` takes ``f`` and ``P`` over all micro-batches of a step and all data-parallel ranks: Qiu et al. (2025),
    "Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized Mixture-of-Expert Models",
    arXiv 2501.11873, section 3. The gradient is exact, the same however the batch is split into micro-batches and over
    process ranks: backward of the first micro-batch already needs the ``f`` of all, which the paper approximates by
    those so far. :class:`.balance.Balance` counts ahead what the step will choose, by a forward without gradients, or
    the forward itself does where a step is one micro-batch. (Equal as far as the two forwards round alike.)
    ``micro_batch`` takes both over the tokens of one micro-batch of one data-parallel rank.

    Attributes:
        is_counting_ahead: what is chosen goes into ``ahead``.
        ahead: choices of each expert on this process rank, int64 ``(E,)``.
        frequencies: ``f`` of the step, where it is known before its forward; float32 ``(E,)``.
        chosen: choices of each expert in the step on this process rank, int64 ``(E,)``.
        kept: how many of all choices were not dropped, int64 scalar.
        probability: sum of each expert's probabilities over the tokens, float64 ``(E,)``.
    """

    def __init__(self, config: Any, pg_collection: Any = None, *, balance: BalanceLoss, coefficient: float) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self._balance, self._coefficient = balance, coefficient
        self.is_counting_ahead = False
        self.begin_step()

    def begin_step(self) -> None:
        """Forget what the last step has counted."""
        self.frequencies: Tensor | None = None
        self.ahead: Tensor | int = 0
        self.chosen: Tensor | int = 0
        self.kept: Tensor | int = 0
        self.probability: Tensor | float = 0.0

    @property
    def has_global_balance(self) -> bool:
        return self._balance == "global"

    @property
    def ranks_of_batch(self) -> dist.ProcessGroup:
        """The process ranks whose tokens are one batch: those with other data, or another part of the sequence."""
        return self.tp_dp_cp_group

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """
        Args:
            logits: ``(sequence, batch, E)``.

        Returns:
            Weights and which experts take a token, ``(tokens, E)`` both; zero and false for what is dropped.
        """
        assert padding_mask is None
        weights, routed = super().routing(logits)
        # Of forwards that backward repeats, that one counts which has gradients.
        if not self.training or not (torch.is_grad_enabled() or self.is_counting_ahead):
            return weights, routed
        flat = logits.view(-1, logits.shape[-1])
        choices, probabilities = compute_routing_scores_for_aux_loss(flat, self.topk, self.score_function)
        counts = choices.sum(0)
        if self.is_counting_ahead:
            self.ahead = self.ahead + counts
            return weights, routed
        self.chosen, self.kept = self.chosen + counts, self.kept + routed.sum()
        sums = probabilities.sum(0)
        self.probability = self.probability + sums.detach().double()
        if self._balance != "none":
            ranks: Any = self.tp_cp_group
            loss = (self._frequencies(counts) * sums).sum() * (
                self._coefficient * sums.numel() / (flat.shape[0] * ranks.size())
            )
            # Megatron's schedule has this divide by the micro-batches, its reduction by the data-parallel ranks.
            weights = MoEAuxLossAutoScaler.apply(weights, loss)
        return weights, routed

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Nothing: there is no such bias. Megatron compiles a function to find that out, in each process."""

    def _frequencies(self, counts: Tensor) -> Tensor:
        """``f``, from this rank's choices in the micro-batch where it is not known yet."""
        if self.frequencies is not None:
            return self.frequencies
        group: Any = self.ranks_of_batch if self._balance == "global" else self.tp_cp_group
        counts = counts.clone()
        dist.all_reduce(counts, group=group)
        return (counts / counts.sum()).float()
