"""What a compact parallel layer keeps for backward, and the products that make its gradients.

Every trained tensor of a layer, and every probe, has a gradient ``L(dY)^T K(X)``: a part of, or a projection of, the
outputs' gradient times what is kept of the input. Equal ``K`` are kept once and multiplied once.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .weight_cut import WeightCut


@dataclass(frozen=True)
class Product:
    """How a tensor's gradient follows from the layer's input and output gradient.

    Attributes:
        key: equal for products that keep the same of the input.
        keep: what is kept of the input, of this rank's part of the sequence: ``(..., n)`` to ``(..., k)``.
        left: of the outputs' gradient, ``(tokens, outputs)`` to ``(tokens, l)``; the gradient is ``(l, k)``.
        cut: where ``left`` are the outputs of one weight.
        scale: of the gradient.
    """

    key: Hashable
    keep: Callable[[Tensor], Tensor]
    left: Callable[[Tensor], Tensor]
    cut: WeightCut | None = None
    scale: float = 1.0


def gradients_of(
    products: Sequence[Product], grad_y: Tensor, kept: dict[Hashable, Tensor], wide: Sequence[bool]
) -> list[Tensor]:
    """The gradient of each product.

    Args:
        grad_y: ``(tokens, outputs)``.
        kept: by :attr:`Product.key`, ``(tokens, k)`` each, of the whole sequence.
        wide: which gradients are to be in fp32 at least.
    """
    found: dict[int, Tensor] = {}
    groups: dict[tuple[Hashable, bool], list[int]] = {}
    for number, product in enumerate(products):
        groups.setdefault((product.key, wide[number]), []).append(number)
    for (key, is_wide), numbers in groups.items():
        members = [products[number] for number in numbers]
        right = kept[key]
        if _are_the_layer(members, grad_y.shape[1]):
            whole = _multiply(grad_y, right, is_wide)
            parts = [member.cut.part(whole) for member in members if member.cut is not None]
        else:
            lefts = [member.left(grad_y) for member in members]
            whole = _multiply(torch.cat(lefts, 1) if len(lefts) > 1 else lefts[0], right, is_wide)
            parts = list(whole.split([left.shape[1] for left in lefts]))
        found |= {
            n: part * m.scale if m.scale != 1.0 else part for n, m, part in zip(numbers, members, parts, strict=True)
        }
    return [found[number] for number in range(len(products))]


def _are_the_layer(products: Sequence[Product], num_outputs: int) -> bool:
    """Whether together they are all of the layer's outputs, so that nothing has to be taken apart before."""
    rows = {cut.first: cut.local[0] for product in products if (cut := product.cut) is not None}
    return len(rows) == len(products) and sum(rows.values()) == num_outputs


def _multiply(left: Tensor, right: Tensor, is_wide: bool) -> Tensor:
    """``left^T right``, in at least fp32 where ``is_wide``."""
    if not is_wide or left.element_size() >= 4:
        return left.t().mm(right)
    if left.is_cuda:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.float().t().mm(right.float())
