"""AdamW by the fused kernels of Transformer Engine or apex: where it is chosen, and how its steps are counted."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# A machine for the tests marked gpu need not have it.
pytest.importorskip("pydantic")

from narrowgauge.engine.backends.megatron.fused_adam import count_by_parameter, fused_adamw, stepped_by
from narrowgauge.engine.backends.megatron.installed import fused_by
from narrowgauge.engine.backends.megatron.keys import ADAMW
from narrowgauge.engine.config.without_deepspeed import adam_arguments

ARGUMENTS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def test_where_it_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the packages that lie there; on a GPU only, and not where torch's own is asked for."""
    assert stepped_by({}, on_gpu=True) == fused_by()
    monkeypatch.syspath_prepend(tmp_path)
    for path in ("apex/optimizers", "apex/multi_tensor_apply"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("")
    assert stepped_by({}, on_gpu=True) is None
    (tmp_path / "amp_C.py").write_text("")
    assert stepped_by({"lr": 1e-3}, on_gpu=True) == "apex"
    assert stepped_by({"torch_adam": True}, on_gpu=True) is None
    assert stepped_by({}, on_gpu=False) is None
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("")
    assert stepped_by({}, on_gpu=True) == "Transformer Engine"


def test_what_may_be_given_is_named_alike() -> None:
    """The documented arguments of both that this engine's AdamW takes, ``adam_w_mode`` apart; the decay is DeepSpeed's
    default, and theirs, unless torch's own is asked for.
    """
    theirs = {"lr", "betas", "eps", "weight_decay"}
    assert theirs == ADAMW - {"torch_adam"}
    assert theirs <= inspect.signature(torch.optim.AdamW).parameters.keys()
    given = {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "torch_adam": False}
    assert adam_arguments(given) == {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0}


class CountingByGroup(torch.optim.Optimizer):
    """AdamW as a statement, whose bias correction counts as Transformer Engine's and apex's: in the groups."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, dict(ARGUMENTS))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (first, second), count = group["betas"], group["step"]
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - second)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                m, v = state["exp_avg"] / (1 - first**count), state["exp_avg_sq"] / (1 - second**count)
                p.sub_(group["lr"] * m / (v.sqrt() + group["eps"]))


def take(optimizer: torch.optim.Optimizer, parameters: list[Tensor], first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        optimizer.step()


def moved(source: torch.optim.Optimizer, to: torch.optim.Optimizer, pairs: Any) -> None:
    """What a checkpoint restores: the state of each parameter, ``step`` as what the other takes it for."""
    for own, other in pairs:
        other.data.copy_(own.data)
        state = {key: value.clone() if torch.is_tensor(value) else value for key, value in source.state[own].items()}
        if isinstance(to, torch.optim.AdamW):
            state["step"] = torch.tensor(float(state["step"]))
        to.state[other] = {**state}


def test_steps_go_on_in_another_optimizer_and_back() -> None:
    """Three steps of torch's AdamW, three that count by group, and three of the former: as nine of it."""

    def fresh() -> list[Tensor]:
        generator = torch.Generator().manual_seed(99)
        return [torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True) for size in (3, 5)]

    expected, before, fused, after = (fresh() for _ in range(4))
    take(torch.optim.AdamW(expected, **ARGUMENTS), expected, 0, 9)
    optimizers = torch.optim.AdamW(before, **ARGUMENTS), CountingByGroup(fused), torch.optim.AdamW(after, **ARGUMENTS)
    count_by_parameter(optimizers[1])
    take(optimizers[0], before, 0, 3)
    take(optimizers[1], fused, 50, 51)  # on something else
    moved(optimizers[0], optimizers[1], zip(before, fused, strict=True))
    take(optimizers[1], fused, 3, 6)
    assert [optimizers[1].state[p]["step"] for p in fused] == [6, 6]
    moved(optimizers[1], optimizers[2], zip(fused, after, strict=True))
    take(optimizers[2], after, 6, 9)
    for own, other in zip(after, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-14)


@pytest.mark.gpu
def test_it_steps_as_torch_does() -> None:
    if not torch.cuda.is_available() or (by := fused_by()) is None:
        pytest.skip("no GPU with Transformer Engine or apex")
    own, other = ([torch.linspace(-1, 1, n, device="cuda", requires_grad=True) for n in (7, 4099)] for _ in range(2))
    take(fused_adamw(own, ARGUMENTS, by=by), own, 0, 5)
    take(torch.optim.AdamW(other, **ARGUMENTS), other, 0, 5)
    for p, expected in zip(own, other, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
