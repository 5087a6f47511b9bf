"""Matrices with singular values near 1: the direction of Muon's updates."""

import torch
from torch import Tensor

# Of the quintic of Jordan et al.: it takes singular values of (0, 1] near 1 in five rounds, to about 0.7 to 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_SMALLEST_NORM = 1e-7


def orthogonalized(matrix: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """``U S' V^T`` of a matrix ``U S V^T``, with ``S'`` near 1, by Newton-Schulz iteration; zero stays zero.

    Source: Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein (2024), "Muon: An optimizer for hidden layers in neural
    networks", kellerjordan.github.io/posts/muon. In bf16 bit for bit ``torch.optim.Muon``'s.

    Args:
        matrix: ``(m, n)``; it is not changed.
        dtype: computed in; default fp32, fp64 for an fp64 matrix.

    Returns:
        ``(m, n)`` in that dtype.
    """
    x = matrix.to(dtype or torch.promote_types(matrix.dtype, torch.float32))
    is_tall = x.shape[0] > x.shape[1]
    x = x.t() if is_tall else x
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if is_tall else x
