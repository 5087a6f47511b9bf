"""What Megatron takes for granted of a GPU: each answer of the CPU is still needed, and gone afterwards."""

import threading
from typing import Any

import pytest
import torch
from torch.overrides import _pop_mode

from narrowgauge.engine.backends.megatron import cpu
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import run_steps

# Something that does not work without the patch: the family, its process ranks and layout.
NEEDED_BY: dict[str, tuple[str, int, dict[str, Any]]] = {
    "current_device": ("llama", 1, {}),
    "devices": ("llama", 1, {}),
    "types": ("llama", 1, {}),
    "pinned": ("llama", 2, {"context_parallel": 2}),
    "waiting": ("llama", 2, {"pipeline_parallel": 2}),
    "streams": ("mixtral", 1, {}),
    "random_states": ("llama", 1, {"recompute": "full"}),
    "router_product": ("mixtral", 1, {}),
    "counts": ("mixtral", 2, {"expert_parallel": 2}),
    "fp8_questions": ("llama", 1, {"recompute": "selective", "recompute_modules": ["layernorm"]}),
    "uneven_collectives": ("mixtral", 4, {"expert_parallel": 2, "expert_tensor_parallel": 2}),
}


def failure_without(patch: str, family: str, layout: dict[str, Any]) -> str | None:
    """What a step says without a patch; None where it works."""
    cpu.uninstall()
    try:
        with cpu.cpu_support(without=patch):
            run_steps("megatron", family, layout, last=1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        cpu.install()
    return None


def test_every_patch_has_something_that_needs_it() -> None:
    assert NEEDED_BY.keys() == cpu.PATCHES.keys()


@pytest.mark.parametrize("patch", NEEDED_BY)
def test_a_patch_is_needed(megatron_ranks: MegatronPool, patch: str) -> None:
    """Where one is not, this says so: it can go."""
    family, ranks, layout = NEEDED_BY[patch]
    for failure in megatron_ranks.run(failure_without, patch, family, layout, ranks=ranks):
        assert failure is not None


def what_is_left() -> tuple[str, str, str, bool]:
    cpu.uninstall()
    try:
        before = (torch.cuda.current_device, torch.cuda.Stream, torch.distributed.all_gather, torch.cuda.synchronize)
        with cpu.cpu_support():
            made, told = torch.zeros(1, device="cuda").device.type, torch.zeros(1).type()
        after = (torch.cuda.current_device, torch.cuda.Stream, torch.distributed.all_gather, torch.cuda.synchronize)
        return made, told, torch.zeros(1).type(), before == after
    finally:
        cpu.install()


def found_after_losing_modes() -> list[str]:
    """Devices of tensors for a GPU: in another thread, and where something has taken the modes away."""
    found: list[str] = []

    def make() -> None:
        cpu.install()
        found.append(torch.zeros(1, device="cuda").device.type)
        found.append(torch.zeros(1).type())

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    while torch._C._len_torch_function_stack():
        _pop_mode()
    make()
    cpu.uninstall()
    found.append(torch.zeros(1).type())
    cpu.install()
    return found


def test_modes_that_are_lost_are_entered_again(megatron_ranks: MegatronPool) -> None:
    """Modes are of one thread, and whoever compiles takes them away: "Torch not compiled with CUDA enabled", now and
    then.
    """
    as_on_gpu = ["cpu", "torch.cuda.FloatTensor"]
    assert megatron_ranks.run(found_after_losing_modes, ranks=1) == [[*as_on_gpu, *as_on_gpu, "torch.FloatTensor"]]


def test_nothing_is_left_of_them(megatron_ranks: MegatronPool) -> None:
    found = megatron_ranks.run(what_is_left, ranks=1)
    assert found == [("cpu", "torch.cuda.FloatTensor", "torch.FloatTensor", True)]
