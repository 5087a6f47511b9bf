"""Products in 8-bit floating point, by torchao's casts, scales and matrix products (``torchao.float8``)."""

import importlib
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

Recipe = Literal["tensorwise", "rowwise"]
# What a matrix product in FP8 needs of each dimension on a GPU.
MULTIPLE = 16


class Float8Quantizer:
    """A :class:`.Quantizer` of FP8: e4m3 for weights and inputs, what torchao's recipe says for gradients, with scales
    from the largest magnitude of each tensor or row.

    All three products of a layer are in FP8; of a compact layer, whose weight is frozen between folds, forward and
    ``dX``. There what is made of the weight is kept until the weight changes, at one byte per element.

    Args:
        recipe: torchao's name.
        emulate: compute with the rounded values in the precision of the input, on any device.

    Raises:
        ImportError: torchao is not installed.
    """

    def __init__(self, recipe: Recipe = "tensorwise", *, emulate: bool = False) -> None:
        float8 = importlib.import_module("torchao.float8")
        layer = importlib.import_module("torchao.float8.float8_linear")
        self._casts = importlib.import_module("torchao.float8.float8_scaling_utils")
        self._roles = importlib.import_module("torchao.float8.float8_training_tensor").GemmInputRole
        self._config: Any = replace(float8.Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
        with torch.device("meta"):
            # What the recipe asks of the products.
            self._products = layer.Float8Linear(MULTIPLE, MULTIPLE, bias=False, config=self._config).linear_mm_config
        self._recipe, self._emulate = recipe, emulate
        # By the side that is scaled, the cast weight and which one it was made of.
        self._kept: dict[int, tuple[tuple[int, int], Any]] = {}

    def activations(self, x: Tensor) -> Tensor:
        return x

    def product(self, x: Tensor, weight: Tensor, *, keeps: bool) -> Tensor:
        c, roles = self._config, self._roles
        rows = self._cast(x.reshape(-1, x.shape[-1]), c.cast_config_input, roles.INPUT, -1)
        y = torch.mm(rows, self._weight(weight, x.dtype, c.cast_config_weight, 0, keeps=keeps))
        return y.view(*x.shape[:-1], -1)

    def input_gradient(self, grad_y: Tensor, weight: Tensor, *, keeps: bool) -> Tensor:
        c, roles = self._config, self._roles
        rows = self._cast(grad_y.reshape(-1, grad_y.shape[-1]), c.cast_config_grad_output, roles.GRAD_OUTPUT, -1)
        cast = self._weight(weight, grad_y.dtype, c.cast_config_weight_for_grad_input, -1, keeps=keeps)
        return torch.mm(rows, cast.t()).view(*grad_y.shape[:-1], -1)

    def weight_gradient(self, grad_y: Tensor, x: Tensor) -> Tensor:
        c, roles = self._config, self._roles
        left = self._cast(grad_y, c.cast_config_grad_output_for_grad_weight, roles.GRAD_OUTPUT, 0)
        right = self._cast(x, c.cast_config_input_for_grad_weight, roles.INPUT, 0)
        return torch.mm(left.t(), right)

    def _weight(self, weight: Tensor, dtype: torch.dtype, cast: Any, axis: int, *, keeps: bool) -> Any:
        """The transposed weight, cast; ``axis`` is of it."""
        made_of = (weight.data_ptr(), weight._version)
        if keeps and axis in self._kept and self._kept[axis][0] == made_of:
            return self._kept[axis][1]
        found = self._cast(weight.detach().to(dtype).t(), cast, self._roles.WEIGHT, axis)
        if keeps:
            self._kept[axis] = (made_of, found)
        return found

    def _cast(self, tensor: Tensor, cast: Any, role: Any, axis: int) -> Any:
        if cast.scaling_type.name == "DISABLED":
            return tensor
        return self._casts.hp_tensor_to_float8_dynamic(
            tensor,
            cast.target_dtype,
            self._products,
            gemm_input_role=role,
            scaling_granularity=cast.scaling_granularity,
            axiswise_dim=self._casts.get_maybe_axiswise_dim(axis, cast.scaling_granularity),
            round_scales_to_power_of_2=self._config.round_scales_to_power_of_2,
        )

    def __repr__(self) -> str:
        return f"float8, recipe={self._recipe}{', emulated' if self._emulate else ''}"
