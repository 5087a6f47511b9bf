"""Which part of transformers' mixtures is compact, and that a step of them is that of plain PyTorch."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from narrowgauge.optimizers import Grass
from narrowgauge.optimizers.layers.experts import CompactExperts
from narrowgauge.optimizers.layers.find_experts import find_experts
from tests.support.families import small
from tests.support.references.grass import ReferenceGrass

# With such an eps a step is as long as its gradient.
OPTIONS: dict[str, Any] = {"lr": 1.0, "eps": 1.0, "density": 0.25, "refresh_interval": 5, "weight_decay": 0.0}
TRANSPOSED = ("gpt_oss", "llama4_text")
FAMILIES = [
    "mixtral",
    "gpt_oss",
    "llama4_text",
    "deepseek_v3",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "glm4_moe",
    "granitemoe",
    "minimax",
    "phimoe",
    "qwen3_next",
    "jetmoe",
]
QUICK = ("mixtral", "gpt_oss", "llama4_text", "deepseek_v3", "jetmoe")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_experts_are_compact_and_a_step_is_that_of_plain_pytorch(family: str) -> None:
    torch.manual_seed(0)
    config = small(family)
    config.use_cache = False
    if family.startswith("deepseek"):
        # Of the part of a head that is rotated; there are no groups of heads.
        config.head_dim, config.num_key_value_heads = config.qk_rope_head_dim, config.num_attention_heads
    twin: Any = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(twin.state_dict())
    # Without a router's jitter.
    model.eval()
    twin.eval()
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    optimizer = Grass(model, **OPTIONS)
    assert any(isinstance(module, CompactExperts) for module in model.modules())
    assert optimizer.coverage.share > 0.8
    stacked = {layer.name for layer in optimizer.layers if layer.module.num_matrices > 1}
    assert {n for n, p in twin.named_parameters() if p.dim() == 3 and ("_proj" in n or family == "jetmoe")} == stacked
    compact = {layer.weight_name for layer in optimizer.layers}
    reference = ReferenceGrass(
        twin,
        is_matrix=lambda name: name in compact,
        is_transposed=lambda name: name in stacked and family in TRANSPOSED,
        side="columns",
        **OPTIONS,
    )
    tokens = torch.randint(3, 300, (2, 32))
    losses = []
    for trained, own in ((model, optimizer), (twin, reference)):
        loss = trained(input_ids=tokens, labels=tokens).loss
        loss.backward()
        own.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    found = model.state_dict()
    for name, value in twin.state_dict().items():
        step = (value - before[name]).abs().max()
        assert float((found[name] - value).abs().max()) <= 1e-4 * float(step) + 1e-6, name


class AnyConfig:
    """Has a small value for whatever an experts class asks for."""

    def __getattr__(self, name: str) -> Any:
        if "act" in name:
            return "silu"
        if "limit" in name or "alpha" in name or name.endswith("eps"):
            return 1.5
        return 3 if "expert" in name and "size" not in name and "dim" not in name else 8


# Each expert's output is normalised.
OTHERS = {"MuseSparkExperts"}


@pytest.mark.slow
def test_every_experts_class_that_shares_the_form_is_known() -> None:
    """``use_experts_implementation`` marks them; a class that computes something else has to be named here."""
    folder = Path(transformers.__file__).parent / "models"
    left: dict[str, str] = {}
    num_known = 0
    for path in sorted(folder.glob("*/modeling_*.py")):
        names = re.findall(r"@use_experts_implementation[^\n]*\nclass (\w+)", path.read_text())
        if not names:
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for name in names:
            found = find_experts(getattr(module, name)(AnyConfig()))
            num_known += len(found) == 2
            if len(found) != 2:
                left[name] = path.name
    assert set(left) == OTHERS
    assert num_known >= 60
