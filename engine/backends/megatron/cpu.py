"""Megatron-core without CUDA: what it takes for granted of a GPU, answered by the CPU. Off where there is a GPU.

Megatron-core 0.16 speaks of ``"cuda"`` in many places, but only of a handful of things that a CPU has not. Each is a
:class:`Patch` of its own, so that a test can leave one out and see that it is still needed.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack


@dataclass(frozen=True)
class Patch:
    """Something that Megatron expects of a GPU.

    Attributes:
        applied: within it the CPU answers.
        needed_for: what fails without it.
    """

    applied: Callable[[], contextlib.AbstractContextManager[Any]]
    needed_for: str


class _CudaIsCpu(TorchFunctionMode):
    """Tensors for ``"cuda"`` are made on the CPU, and say of their type that they are CUDA's."""

    def __init__(self, *, devices: bool = False, types: bool = False, pinned: bool = False) -> None:
        super().__init__()
        self._devices, self._types, self._pinned = devices, types, pinned

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._pinned and kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if self._types and func is Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if self._devices and func is Tensor.cuda:
            return args[0]
        if self._devices:
            if "device" in kwargs:
                kwargs["device"] = _cpu(kwargs["device"])
            if func is Tensor.to:
                args = (args[0], *map(_cpu, args[1:]))
        return func(*args, **kwargs)


def _cpu(device: Any) -> Any:
    return "cpu" if isinstance(device, str | torch.device) and str(device).startswith("cuda") else device


class _Stream:
    """Everything on the CPU happens in order: there is one stream."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: Any = None) -> "_Stream":
        return self


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of a module or object, set within it."""
    missing = object()
    before = {name: getattr(owner, name, missing) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _current_device() -> Any:
    return replaced(torch.cuda, current_device=lambda: torch.device("cpu"))


def _waiting() -> Any:
    return replaced(torch.cuda, synchronize=lambda *args, **kwargs: None)


def _streams() -> Any:
    return replaced(
        torch.cuda,
        Stream=_Stream,
        current_stream=lambda *args, **kwargs: _Stream(),
        stream=lambda stream: contextlib.nullcontext(),
    )


@contextmanager
def _random_states() -> Iterator[None]:
    from megatron.core.tensor_parallel import random

    def get(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Tensor:
        return torch.get_rng_state()

    def put(state: Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    with (
        replaced(torch.cuda, get_rng_state=lambda *args, **kwargs: torch.get_rng_state()),
        replaced(random, _get_cuda_rng_state=get, _set_cuda_rng_state=put),
    ):
        yield


@contextmanager
def _router_product() -> Iterator[None]:
    from megatron.core.transformer.moe import moe_utils

    with replaced(moe_utils, te_general_gemm=None):
        yield


@contextmanager
def _counts_for_all_to_all() -> Iterator[None]:
    """Megatron turns the numbers of tokens that each expert gets into NumPy only where they were on a GPU."""
    from megatron.core.transformer.moe import token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu

    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        found = move(tensor, as_numpy, record_stream)
        return found.numpy() if as_numpy and torch.is_tensor(found) else found

    with replaced(token_dispatcher, maybe_move_tensor_to_cpu=moved):
        yield


@contextmanager
def _fp8_questions() -> Iterator[None]:
    """A checkpoint without its output asks for the state of fp8 without asking whether there is any."""
    from megatron.core.tensor_parallel import random

    manager = type("FP8GlobalStateManager", (), {"is_fp8_enabled": staticmethod(lambda: False)})

    def nothing(*args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext()

    with replaced(random, FP8GlobalStateManager=manager, activation_recompute_forward=nothing, fp8_autocast=nothing):
        yield


@contextmanager
def _uneven_collectives() -> Iterator[None]:
    """gloo gathers and scatters equal sizes only; experts get as many tokens as were routed to them."""
    all_gather, reduce_scatter = dist.all_gather, dist.reduce_scatter

    # DeepSpeed names the arguments.
    def gather(tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({output.shape for output in tensor_list}) == 1:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        rows = _longest(tensor_list, async_op)
        padded = [tensor.new_empty(rows, *tensor.shape[1:]) for _ in tensor_list]
        all_gather(padded, _padded(tensor, rows), group=group)
        for output, part in zip(tensor_list, padded, strict=True):
            output.copy_(part[: output.shape[0]])
        return None

    def scatter(
        output: Tensor,
        input_list: list[Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({tensor.shape for tensor in input_list}) == 1:
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        rows = _longest(input_list, async_op)
        part = output.new_empty(rows, *output.shape[1:])
        reduce_scatter(part, [_padded(tensor, rows) for tensor in input_list], op=op, group=group)
        output.copy_(part[: output.shape[0]])
        return None

    with replaced(dist, all_gather=gather, reduce_scatter=scatter):
        yield


def _longest(tensors: list[Tensor], async_op: bool) -> int:
    assert not async_op
    return max(tensor.shape[0] for tensor in tensors)


def _padded(tensor: Tensor, rows: int) -> Tensor:
    if tensor.shape[0] == rows:
        return tensor.contiguous()
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])


PATCHES: dict[str, Patch] = {
    "current_device": Patch(_current_device, "importing and building anything"),
    "devices": Patch(lambda: _CudaIsCpu(devices=True), "tensors made on the device 'cuda'"),
    "types": Patch(lambda: _CudaIsCpu(types=True), "the optimizers, which compare names of tensor types"),
    "pinned": Patch(lambda: _CudaIsCpu(pinned=True), "rotary positions of sequences that ranks share"),
    "waiting": Patch(_waiting, "pipelines, which wait for what was sent"),
    "streams": Patch(_streams, "mixtures of experts"),
    "random_states": Patch(_random_states, "dropout and whatever backward computes again"),
    "router_product": Patch(_router_product, "routers in fp32"),
    "counts": Patch(_counts_for_all_to_all, "experts on different ranks"),
    "fp8_questions": Patch(_fp8_questions, "norms that backward computes again"),
    "uneven_collectives": Patch(_uneven_collectives, "experts that several ranks share"),
}

_MODES = ("devices", "types", "pinned")

_installed: ExitStack | None = None
# The patch that is left out: then nothing is installed beside.
_left_out: str | None = None


@contextmanager
def cpu_support(*, without: str | None = None) -> Iterator[None]:
    """Within it Megatron works without a GPU.

    Args:
        without: a patch to leave out.
    """
    global _left_out
    before, _left_out = _left_out, without
    try:
        with ExitStack() as stack:
            for name, patch in PATCHES.items():
                if name != without:
                    stack.enter_context(patch.applied())
            yield
    finally:
        _left_out = before


def install() -> None:
    """Let Megatron work without a GPU from now on, in this thread; nothing where there is one.

    Called before each use: modes of functions are of one thread, and what compiles or traces takes all of them away for
    a while, so that they may be gone where the rest is in place.
    """
    global _installed
    if torch.cuda.is_available() or _left_out is not None:
        return
    if _installed is None:
        _installed = ExitStack()
        _installed.enter_context(cpu_support())
    elif not any(isinstance(mode, _CudaIsCpu) for mode in _get_current_function_mode_stack()):
        for name in _MODES:
            PATCHES[name].applied().__enter__()


def uninstall() -> None:
    """Undo :func:`install`, in the thread that it was called in first."""
    global _installed
    if _installed is not None:
        install()
        _installed.close()
        _installed = None
