"""What is used of DeepSpeed beside its public interface (0.19): an upgrade has to look here.

ZeRO-3 puts ``ds_*`` attributes on parameters; ZeRO-1 and 2 link each parameter to its piece of the fp32 masters by
``_hp_mapping``; the optimizer wrappers name their flat groups each in its own way.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as process_groups
from torch import Tensor

from narrowgauge.optimizers.layers.compact import compact_units
from narrowgauge.optimizers.layers.shape import add_shape_source

# Of the weights, given the keywords for the schedule's step.
Update = Callable[[Any], None]

# From the moment that ZeRO-3 has cut a parameter, before there is an engine.
add_shape_source(lambda parameter: getattr(parameter, "ds_shape", None))

# By wrapper: the attribute with the parameters of each group, and the one with the flat masters of this rank.
_GROUPS_AND_MASTERS = (
    ("bit16_groups", "single_partition_of_fp32_groups"),  # ZeRO-1 and 2
    ("bf16_groups", "fp32_groups_flat_partition"),  # ZeRO-1 in bf16 with fp32 accumulation
    ("fp16_groups", "fp32_partitioned_groups_flat"),  # ZeRO-3: sub-groups
)


def groups_and_masters(wrapper: Any) -> list[tuple[list[Any], Tensor]] | None:
    """The parameters of each group (at stage 3: sub-group) and the flat tensor with this rank's part of their
    masters; None for a wrapper that is not known here.
    """
    for groups, masters in _GROUPS_AND_MASTERS:
        if hasattr(wrapper, groups) and hasattr(wrapper, masters):
            return list(zip(getattr(wrapper, groups), getattr(wrapper, masters), strict=True))
    return None


def groups_of(wrapper: Any) -> list[list[Any]]:
    """The parameters of each group (at stage 3: sub-group), or of the plain optimizer's."""
    for groups, _ in _GROUPS_AND_MASTERS:
        if hasattr(wrapper, groups):
            return getattr(wrapper, groups)
    return [group["params"] for group in wrapper.param_groups]


def flat_bit16(wrapper: Any) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Of ZeRO-1 and 2: the flat low-precision parameters of each group, and the ranks' parts of them."""
    if hasattr(wrapper, "bf16_groups_flat"):
        return wrapper.bf16_groups_flat, wrapper.bf16_partitioned_groups
    return wrapper.bit16_groups_flat, wrapper.parallel_partitioned_bit16_groups


def fragment_of(parameter: Any) -> Any:
    """ZeRO-1 and 2: where this rank's part of a parameter's master lies; None if it has none."""
    return parameter._hp_mapping


def stage_3_position(wrapper: Any, parameter: Any) -> tuple[int, int]:
    """Offset and size of a parameter's part in the flat masters of its sub-group, padding included."""
    _, offset, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
    return int(offset), int(size)


def state_of_stage_3(wrapper: Any, group: dict[str, Any]) -> Iterator[Tensor]:
    """The flat masters of the sub-groups of a parameter group: they key the optimizer's state."""
    for sub_group, number in wrapper.sub_group_to_group_id.items():
        if wrapper.optimizer.param_groups[number] is group:
            yield wrapper.fp32_partitioned_groups_flat[sub_group]


def stage_3_masters_to_model(wrapper: Any) -> None:
    for group in range(len(wrapper.fp16_groups)):
        wrapper._reassign_or_swap_out_partitioned_parameters(group)


def is_sharded(parameter: Any) -> bool:
    """Whether ZeRO-3 has cut the parameter."""
    return hasattr(parameter, "ds_id")


def is_persistent(parameter: Any) -> bool:
    """Whether ZeRO-3 keeps the parameter gathered."""
    return bool(parameter.ds_persist)


def own_shard(parameter: Any) -> tuple[Tensor, int]:
    """This rank's shard of a ZeRO-3 parameter without its padding, and the position of its first element."""
    shard = parameter.ds_tensor
    start = shard.numel() * comm.get_rank(group=parameter.ds_process_group)
    return shard.narrow(0, 0, max(0, min(shard.numel(), parameter.ds_numel - start))), start


def gather_again(parameters: Sequence[Tensor]) -> None:
    """After shards were written behind DeepSpeed's back: renew the copies that ZeRO-3 keeps gathered.

    These are parameters below ``stage3_param_persistence_threshold``. Collective; does nothing at other stages.
    """
    live: list[Any] = [p for p in parameters if getattr(p, "ds_status", None) is ZeroParamStatus.AVAILABLE]
    if live:
        live[0].partition(param_list=live)
        live[0].all_gather(param_list=live)


def wrap_update(engine: DeepSpeedEngine, wrap: Callable[[Update], Update]) -> None:
    """Put another function around the engine's update of the weights."""
    own: Any = engine
    vars(engine)["_take_model_step"] = wrap(own._take_model_step)


def set_grad_norm(engine: DeepSpeedEngine, norm: float) -> None:
    """What ``engine.get_global_grad_norm`` returns."""
    own: Any = engine
    own._global_grad_norm = norm


def forget_autocast() -> None:
    """Before an engine is made: DeepSpeed notes for the whole process that some engine has used ``torch_autocast``, and
    every later one under ZeRO took its scaler of gradients and their dtypes between ranks.
    """
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False


def keep_autocast(engine: DeepSpeedEngine) -> None:
    """After it is made: it reduces gradients as it was made to, whatever engines follow."""
    wrapper: Any = engine.optimizer
    if not hasattr(wrapper, "get_param_comm_dtype"):
        return
    dtype = torch_autocast.get_comm_dtype if torch_autocast.is_autocast_initialized() else None
    vars(wrapper)["get_param_comm_dtype"] = dtype or (lambda parameter: wrapper.communication_data_type)


def loss_scale(engine: DeepSpeedEngine) -> Tensor:
    """What gradients are larger by than those of the loss without ZeRO, on the engine's device: fp16 autocast's."""
    own: Any = engine
    one = torch.ones((), device=own.device)
    scaler = own.torch_autocast_z0_gradscaler
    return one if scaler is None else scaler.scale(one)


def zero_scaler(wrapper: Any) -> torch.amp.GradScaler | None:
    """What scales the loss for fp16 autocast under ZeRO; None where nothing does."""
    scaler: torch.amp.GradScaler | None = getattr(wrapper, "torch_autocast_gradscaler", None)
    return None if scaler is None or wrapper.custom_loss_scaler else scaler


def autocast_scaler(engine: DeepSpeedEngine) -> torch.amp.GradScaler | None:
    """What scales the loss for fp16 autocast, at any stage."""
    own: Any = engine
    return own.torch_autocast_z0_gradscaler or zero_scaler(own.optimizer)


@contextmanager
def unscaled_by(wrapper: Any, scale: float) -> Iterator[None]:
    """Let ZeRO's update take gradients for ``scale`` times as large as they are, and unscale them itself."""
    own = vars(wrapper)
    former = {key: own[key] for key in ("torch_autocast_gradscaler", "custom_loss_scaler", "external_loss_scale")}
    own.update(torch_autocast_gradscaler=None, custom_loss_scaler=True, external_loss_scale=scale)
    try:
        yield
    finally:
        own.update(former)


def start_sums_at_zero(wrapper: Any) -> None:
    """A sum over micro-batches in a buffer of ZeRO's goes on from the step before, where the parameter has no gradient
    in the first micro-batch: let it begin at zero.
    """
    if type(wrapper) is DeepSpeedZeroOptimizer_Stage3:
        partition_grads = wrapper.partition_grads

        @wraps(partition_grads)
        def partition_from_zero(parameters: list[Any], partitions: list[Tensor]) -> Any:
            if wrapper.micro_step_id > 0:
                for parameter in parameters:
                    if parameter.ds_id not in wrapper._offload_boundary_param_ids:
                        _stage_3_buffer(wrapper, parameter).zero_()
            return partition_grads(parameters, partitions)

        vars(wrapper)["partition_grads"] = partition_from_zero
    elif type(wrapper) is DeepSpeedZeroOptimizer and wrapper.cpu_offload:
        copy_grads = wrapper.copy_grads_in_partition

        @wraps(copy_grads)
        def copy_from_zero(parameter: Any, *args: Any, **kwargs: Any) -> Any:
            key = wrapper.get_param_id(parameter)
            kept = wrapper.accumulated_grads_in_cpu.get(key)
            if kept is not None and wrapper.micro_step_id > 0 and key not in wrapper._offload_accumulated_param_ids:
                kept.zero_()
            return copy_grads(parameter, *args, **kwargs)

        vars(wrapper)["copy_grads_in_partition"] = copy_from_zero


def settle_gradients(wrapper: Any) -> None:
    """Before a step: what ZeRO keeps in buffers of its own is made the gradients of this step. Those of parameters that
    had none in it become zero, and those on the CPU or on NVMe also hold what came before the last micro-batch.
    """
    if type(wrapper) is DeepSpeedZeroOptimizer_Stage3:
        _settle_stage_3(wrapper)
    elif type(wrapper) is DeepSpeedZeroOptimizer and wrapper.cpu_offload:
        # The last backward of a step copies gradients to the CPU: those of its own micro-batch.
        copied = wrapper.norm_for_param_grads
        wrapper._offload_accumulated_param_ids -= copied.keys()
        wrapper._finalize_cpu_offload_gradient_accumulation()
        for parameters, masters in zip(
            wrapper.params_in_partition, wrapper.single_partition_of_fp32_groups, strict=True
        ):
            for key in map(wrapper.get_param_id, parameters):
                if key not in copied:
                    _, _, start, length = wrapper.grad_position[key]
                    masters.grad.view(-1).narrow(0, start, length).zero_()


def _settle_stage_3(wrapper: Any) -> None:
    active = set(wrapper._offload_boundary_param_ids)
    if wrapper.offload_optimizer:
        copied = wrapper.norm_for_param_grads.keys()
        done = {p.ds_id for group in wrapper.fp16_groups for p in group if wrapper.get_param_id(p) in copied}
        wrapper._offload_boundary_param_ids -= done
        wrapper._finalize_offload_gradient_accumulation()
    for number, group in enumerate(wrapper.fp16_groups):
        # What there is of the others here is padding.
        idle = [(p, length) for p in group if p.ds_id not in active and (length := own_shard(p)[0].numel())]
        starts = [stage_3_position(wrapper, parameter)[0] for parameter, _ in idle]
        if not wrapper.offload_optimizer:
            for parameter, _ in idle:
                _stage_3_buffer(wrapper, parameter).zero_()
        elif wrapper._swappable_optimizer_subgroup(number):
            dtype = wrapper.fp32_partitioned_groups_flat[number].dtype
            zeros = [torch.zeros(length, dtype=dtype, device=wrapper.device) for _, length in idle]
            if zeros:
                wrapper._swap_out_offload_fp32_gradients({number: zeros}, {number: starts})
        else:
            gradient = wrapper.fp32_partitioned_groups_flat[number].grad
            for start, (_, length) in zip(starts, idle, strict=True):
                gradient.narrow(0, start, length).zero_()


def _stage_3_buffer(wrapper: Any, parameter: Any) -> Tensor:
    """In which a parameter's gradients are summed up."""
    return wrapper._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[parameter.ds_id]


def release_destroyed_groups() -> None:
    """Where a process group was destroyed by torch's function, as of a run before: DeepSpeed keeps it."""
    if comm.comm.cdb is not None and not torch.distributed.is_initialized():
        comm.comm.cdb = None
        process_groups._release_process_group_references(group=None)


def forget_model_parallel() -> None:
    """After an engine with an ``mpu``: DeepSpeed keeps it for every later one of the process."""
    process_groups.mpu = None


def forget_model(module: torch.nn.Module) -> None:
    """After an engine of ZeRO-3 was destroyed: its model stays the outermost one that forwards go through, and in a
    cache of what its modules let go, for as long as the process, with the engine and its process groups.
    """
    FWD_MODULE_STACK[:] = [other for other in FWD_MODULE_STACK if other is not module]
    wrapped: Any = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(wrapped).nonlocals["func"].cache_clear()


def configure_python_gc(engine: DeepSpeedEngine) -> None:
    """What ``deepspeed.initialize`` does last."""
    engine._configure_python_gc()


class ConsolidationHook(DeepSpeedEngine):
    """DeepSpeed consolidates ZeRO-3 weights (``save_16bit_model``) without asking the layers."""

    def _zero3_consolidated_16bit_state_dict(self, exclude_frozen_parameters: bool = False) -> Any:
        self.before_consolidation()
        model: Any = self.module
        # Frozen for DeepSpeed, which would leave them out: they hold what was trained.
        compact = {id(unit.weight) for unit in compact_units(model)}
        state: dict[str, torch.Tensor] | None = super()._zero3_consolidated_16bit_state_dict(
            exclude_frozen_parameters and not compact
        )
        if state is None:
            return None
        if exclude_frozen_parameters:
            frozen = {name for name, p in model.named_parameters() if not p.requires_grad and id(p) not in compact}
            state = {name: tensor for name, tensor in state.items() if name not in frozen}
        return self.after_consolidation(state)

    def before_consolidation(self) -> None: ...

    def after_consolidation(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state
