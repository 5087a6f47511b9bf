"""What a process rank holds of a model, under the model's own names: what our optimizers are made from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from narrowgauge.optimizers import EngineOptimizer
from narrowgauge.optimizers.layers.compact import CompactModule
from narrowgauge.optimizers.layers.watch import unwatch

from ..model import StagedModel
from ..parts import LocalParameter, Part
from .experts import ParallelExperts, StackedParallelWeight, become_compact_experts
from .experts_cut import ExpertsCut
from .linear import become_compact, is_parallel_linear
from .parallel_weight import CompactParallelWeight, ParallelUnit, ParallelWeight, placeholder
from .weight_cut import WeightCut


@dataclass(frozen=True)
class _Packed:
    """A parameter of Megatron's, the parallel linear that it is the weight of, and the names of the weights in it."""

    parameter: nn.Parameter
    layer: nn.Module | None
    names: list[str]


@dataclass(frozen=True)
class _Expert:
    """The weight of an expert's linear, and what it holds of the model's."""

    layer: nn.Module
    described: LocalParameter


class ModelTree(nn.Module):
    """Modules under the model's own names. Each weight is a tensor without memory that stands for its part of
    Megatron's parameters; compact parameters, once there are some, are real.
    """

    def __init__(self, model: StagedModel) -> None:
        super().__init__()
        self._packed: list[_Packed] = []
        self._stands_for: dict[int, list[nn.Parameter]] = {}
        # By the stand-in for experts, Megatron's module.
        self._experts: list[tuple[ParallelExperts, nn.Module]] = []
        for chunk, described in zip(model.chunks, model.held, strict=True):
            experts: dict[tuple[str, str], list[_Expert]] = {}
            parameters = dict(chunk.named_parameters())
            # In the model's own order, not that in which Megatron makes its layers: some choices are among all.
            for name in described:
                parameter = parameters[name]
                layer = chunk.get_submodule(name.rpartition(".")[0])
                if described[name].is_expert:
                    # decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight
                    module = name.split(".local_experts.")[0]
                    weight = described[name].parts[0].name
                    self._experts_with(weight, chunk.get_submodule(module))
                    experts.setdefault((module, weight), []).append(_Expert(layer, described[name]))
                    continue
                if not (is_parallel_linear(layer) and name.startswith("decoder.") and name.endswith(".weight")):
                    layer = None
                self._enter(described[name], parameter, layer)
            for (module, weight), members in experts.items():
                self._enter_experts(weight, chunk.get_submodule(module), members)

    def _enter_experts(self, name: str, module: nn.Module, members: Sequence[_Expert]) -> None:
        """Matrices of experts that are stacked in one weight of the model."""
        experts, key = self._experts_with(name, module), name.rpartition(".")[2]
        linears: list[Any] = [member.layer for member in members]
        stand_in = experts.add(key, linears, ExpertsCut.of([member.described for member in members]))
        self._stands_for[id(stand_in)] = [linear.weight for linear in linears]

    def _experts_with(self, name: str, module: nn.Module) -> ParallelExperts:
        """What stands for the experts with this weight, made if it is not there."""
        parent, _, own = name.rpartition(".")[0].rpartition(".")
        experts = self._child(parent)._modules.get(own)
        if experts is None:
            experts = ParallelExperts()
            self._child(parent).add_module(own, experts)
            self._experts.append((experts, module))
        assert isinstance(experts, ParallelExperts)
        return experts

    def _enter(self, described: LocalParameter, parameter: nn.Parameter, layer: nn.Module | None) -> None:
        by_name: dict[str, list[Part]] = {}
        for part in described.parts:
            by_name.setdefault(part.name, []).append(part)
        for name, parts in by_name.items():
            module, _, key = name.rpartition(".")
            if layer is not None:
                leaf = ParallelWeight(layer, weight_cut(described, parts))
                parent, _, own = module.rpartition(".")
                self._child(parent).add_module(own, leaf)
                self._stands_for[id(leaf.weight)] = [parameter]
            else:
                stand_in = placeholder(parameter, parts[0].box.shape)
                self._child(module).register_parameter(key, stand_in)
                self._stands_for[id(stand_in)] = [parameter]
        self._packed.append(_Packed(parameter, layer, list(by_name)))

    def _child(self, path: str) -> nn.Module:
        """The module at a path, made if there is none."""
        module: nn.Module = self
        names = path.split(".") if path else []
        for position, name in enumerate(names):
            child = module._modules.get(name)
            if child is None:
                is_list = position + 1 < len(names) and names[position + 1].isdecimal()
                child = nn.ModuleList() if is_list else nn.Module()
                module.add_module(name, child)
            module = child
        return module

    def compact_parameters(self) -> Iterator[tuple[LocalParameter, nn.Parameter]]:
        """The compact parameters, as parameters of the model beside those that were there when it was built."""
        for name, module in self.named_modules():
            for unit in module.compact_units() if isinstance(module, CompactModule) else ():
                assert isinstance(unit, ParallelUnit)
                own = f"{name}.{unit.compact_key}"
                is_expert = isinstance(unit, StackedParallelWeight)
                shape, parts = tuple(unit.compact.shape), tuple(unit.compact_parts(own))
                yield LocalParameter(own, shape, parts, is_expert, unit.cut_dim), unit.compact

    def weights_in_groups(self) -> dict[str, nn.Parameter]:
        """By name of each weight that is trained whole, one of Megatron's parameters that hold it."""
        named = {id(p): name for name, p in self.named_parameters() if p.requires_grad}
        return {named[key]: own[0] for key, own in self._stands_for.items() if key in named}

    def hand_over(self, optimizer: EngineOptimizer[Any]) -> None:
        """Let the parallel layers train the compact weights that the optimizer has made, and put Megatron's parameters
        into its groups for what stands for them.

        Raises:
            ValueError: only some of a layer's weights are compact, or its weights belong to several groups.
        """
        leaves = {name: module for name, module in self.named_modules() if isinstance(module, ParallelWeight)}
        for packed in self._packed:
            if packed.layer is None:
                continue
            names = [name.rpartition(".")[0] for name in packed.names]
            compact = {name: own for name in names if isinstance(own := leaves[name], CompactParallelWeight)}
            if compact and len(compact) < len(names):
                raise ValueError(
                    f"target_modules: expected all of {names} to be compact or none of them, which are one layer of"
                    f" Megatron's, got {list(compact)}"
                )
            if compact:
                become_compact(packed.layer, list(compact.values()))
        for experts, module in self._experts:
            if experts.stacked:
                become_compact_experts(module, list(experts.stacked.values()))
        for weight in compact_units_of(optimizer):
            # What others change is looked for in whole weights.
            unwatch(weight)
        self._replace_placeholders(optimizer)

    def _replace_placeholders(self, optimizer: EngineOptimizer[Any]) -> None:
        group_of: dict[int, int] = {}
        for number, group in enumerate(optimizer.param_groups):
            real: dict[int, nn.Parameter] = {}
            for parameter in group["params"]:
                for own in self._stands_for.get(id(parameter), [parameter]):
                    if group_of.setdefault(id(own), number) != number:
                        names = next(packed.names for packed in self._packed if packed.parameter is own)
                        raise ValueError(
                            f"param_groups: expected one group for {names}, which are one parameter, got two (what"
                            " target_modules names has groups of its own)"
                        )
                    real[id(own)] = own
            group["params"] = list(real.values())


def weight_cut(described: LocalParameter, parts: Sequence[Part]) -> WeightCut:
    """What of a weight a parameter holds.

    Args:
        parts: the weight's, in the parameter.
    """
    shape, local = parts[0].box.shape, parts[0].box.local
    assert len(shape) == 2
    rows, columns = local[0] * len(parts), local[1]
    split = 0 if rows < shape[0] else 1 if columns < shape[1] else None
    size = {0: shape[0] // rows, 1: shape[1] // columns, None: 1}[split]
    rank = {0: parts[0].box.offsets[0] // rows, 1: parts[0].box.offsets[1] // columns, None: 0}[split]
    return WeightCut(
        (shape[0], shape[1]),
        split=split,
        rank=rank,
        size=size,
        num_groups=len(parts),
        group_rows=described.shape[0] // len(parts),
        first=parts[0].offset // columns,
    )


def compact_units_of(optimizer: EngineOptimizer[Any]) -> Iterator[ParallelUnit]:
    """What an optimizer has made compact."""
    for layer in optimizer.layers:
        module: Any = layer.module
        assert isinstance(module, ParallelUnit)
        yield module
