"""GaLore's bases: random ones, singular vectors of the gradient or its sketch, and one step of subspace iteration.

Those that follow a gradient also take a stack of them, ``(experts, m, n)``, and give each its own basis.
"""

import torch
from torch import Tensor


def random_basis(dim: int, rank: int, *, seed: int) -> Tensor:
    """Orthonormal columns ``(dim, rank)``, uniformly distributed, fp64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(dim, rank, generator=generator, dtype=torch.float64))
    # QR's signs are a convention; without it the distribution is uniform.
    return (q * r.diagonal().sign()).contiguous()


def leading_basis(statistic: Tensor, rank: int, *, of_rows: bool) -> Tensor:
    """The leading left (``of_rows``) or right singular vectors of a gradient or its sketch, ``(m, rank)`` or
    ``(n, rank)``.

    With a sketch this is the randomised range finder of Halko, Martinsson, Tropp (2011), arXiv 0909.4061, Algorithm
    4.1, cut to the leading directions.
    """
    u, _, vh = torch.linalg.svd(statistic, full_matrices=False)
    return u[..., :rank].contiguous() if of_rows else vh[..., :rank, :].mT.contiguous()


def aligned(basis: Tensor, former: Tensor) -> Tensor:
    """The vectors of ``basis`` with the signs that agree with those of ``former``; both ``(dim, rank)``."""
    return torch.where((basis * former).sum(-2, keepdim=True) < 0.0, -basis, basis)


def iterated_basis(gradient: Tensor, basis: Tensor, *, of_rows: bool) -> Tensor:
    """One step of subspace iteration with ``G G^T`` (``of_rows``) or ``G^T G`` from the present basis."""
    image = gradient @ (gradient.mT @ basis) if of_rows else gradient.mT @ (gradient @ basis)
    return torch.linalg.qr(image).Q
