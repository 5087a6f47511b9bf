"""GaLore on stacked experts: each expert's matrix has bases of its own."""

from typing import Any

import pytest
import torch

from narrowgauge.optimizers import GaLore
from tests.support.mixture import EXPERTS, TRANSPOSED, is_compact, mixture, mixture_batch
from tests.support.references.galore import ReferenceGaLore

STEPS, RANK = 10, 3
OPTIONS: dict[str, Any] = {"lr": 1e-2, "rank": RANK, "refresh_interval": 4, "scale": 0.25, "weight_decay": 0.1}


@pytest.mark.cover(1)
@pytest.mark.parametrize("side", ["std", "left", "right", "full"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4", "nemotron_h"])
def test_training_is_that_of_a_second_statement(kind: str, side: Any) -> None:
    """In some steps, of which one gives bases, an expert has no tokens; the others have more than the rank."""
    model, twin = mixture(kind, dtype=torch.float64), mixture(kind, dtype=torch.float64)
    optimizer = GaLore(model, **OPTIONS, side=side, projector="svd")
    reference = ReferenceGaLore(
        twin,
        is_matrix=is_compact,
        is_transposed=lambda name: kind in TRANSPOSED and name.endswith("_proj"),
        side=side,
        **OPTIONS,
    )
    for step in range(STEPS):
        losses = []
        for trained, own in ((model, optimizer), (twin, reference)):
            loss = trained(mixture_batch(step, 32))
            loss.backward()
            own.step()
            trained.zero_grad()
            losses.append(float(loss.detach()))
        assert abs(losses[0] - losses[1]) < 1e-12
    assert optimizer.num_refreshes == 3
    for name, value in twin.state_dict().items():
        assert float((model.state_dict()[name] - value).norm() / value.norm()) < 1e-11, name


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_a_whole_sketch_and_a_power_step_give_the_directions_of_each_expert(kind: str) -> None:
    """With as many directions as there are rows a sketch has the gradient's range, here that of few tokens."""
    for projector in ("sketch", "power"):
        model, twin = mixture(kind, dtype=torch.float64), mixture(kind, dtype=torch.float64)
        optimizer = GaLore(model, lr=1e-2, rank=10, refresh_interval=4, projector=projector, oversampling=50)
        # Expert 0 has the token of a position or none: its gradients are of rank 1 or zero.
        tokens = mixture_batch(0, size=2)[:1, :3]
        for trained in (model, twin):
            trained(tokens).backward()
        optimizer.step()
        for layer in optimizer.layers:
            if layer.module.num_matrices == 1:
                continue
            gradient = twin.get_parameter(layer.name).grad
            assert gradient is not None
            ((key, basis),) = layer.module.subspace().items()
            assert basis.shape[0] == EXPERTS
            own = gradient if key == "left" else gradient.mT
            lost = own - basis @ (basis.mT @ own)
            assert float(lost.norm()) < 1e-8 * float(own.norm())
            unit = torch.eye(10, dtype=torch.float64).expand(EXPERTS, 10, 10)
            torch.testing.assert_close(basis.mT @ basis, unit, rtol=1e-9, atol=1e-9)
