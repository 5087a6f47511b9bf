"""Telling activations, among what a layer's autograd function saves, from its weights and bases."""

from typing import Any

import torch
from torch import Tensor


def as_activation(tensor: Tensor) -> Tensor:
    """Mark what a function makes of its input and saves: such tensors have no gradient of their own to tell by.

    A codec of saved tensors may round what is marked; weights, indices, bases and sketches stay as they are, and so
    does what a compiled function saves.
    """
    if not torch.compiler.is_compiling():
        storage: Any = tensor.untyped_storage()
        storage._narrowgauge_activation = True
    return tensor
