"""Adam's moments and directions for lists of tensors."""

# torch's foreach functions have no public names.
# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def adam_directions(
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    steps: Sequence[int],
    betas: tuple[float, float],
    eps: float,
    corrected: bool = True,
) -> list[Tensor]:
    """Update the moments in place and return Adam's directions, new tensors that are to be multiplied by ``-lr``.

    Source: Kingma, Ba (2015), "Adam", arXiv 1412.6980, Algorithm 1.

    Args:
        grads, exp_avgs, exp_avg_sqs: of equal shapes, position by position.
        steps: the number of each tensor's step, from 1.
        corrected: ``m_hat / (sqrt(v_hat) + eps)``; if not, ``m / (sqrt(v) + eps)``, for callers that multiply by
            :func:`late_correction`.
    """
    beta1, beta2 = betas
    torch._foreach_lerp_(list(exp_avgs), list(grads), 1.0 - beta1)
    torch._foreach_mul_(list(exp_avg_sqs), beta2)
    torch._foreach_addcmul_(list(exp_avg_sqs), list(grads), list(grads), 1.0 - beta2)
    denominators = torch._foreach_sqrt(list(exp_avg_sqs))
    if corrected:
        torch._foreach_div_(denominators, [math.sqrt(1.0 - beta2**step) for step in steps])
    torch._foreach_add_(denominators, eps)
    if corrected:
        torch._foreach_mul_(denominators, [1.0 - beta1**step for step in steps])
    return list(torch._foreach_div(list(exp_avgs), denominators))


def late_correction(step: int, betas: tuple[float, float]) -> float:
    """What turns ``m / sqrt(v)`` into ``m_hat / sqrt(v_hat)``; an epsilon added to ``sqrt(v)`` before it weighs more in
    the first steps than Adam's.
    """
    return math.sqrt(1.0 - betas[1] ** step) / (1.0 - betas[0] ** step)
