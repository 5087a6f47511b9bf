"""What the ``megatron`` engine refuses before there is a process group: settings, models, layouts."""

from pathlib import Path
from typing import Any

import pytest

from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.backends.megatron import installed
from narrowgauge.engine.errors import ConfigError
from tests.support.megatron_models import hf_config
from tests.support.megatron_runs import run_config

MEGATRON = backend_of("megatron")


def refused(
    layout: dict[str, Any] | None = None, *, ranks: int = 1, family: str = "llama", sizes: Any = None, **more: Any
) -> list[str]:
    """All that is said against a run, in the order in which it is checked."""
    try:
        config = run_config("megatron", family, layout, **more)
        MEGATRON.check(config)
        MEGATRON.check_model(config, hf_config(family, **(sizes or {})), ranks)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ({"fp8": True}, "linear layers of Transformer Engine's"),
        ({"grouped_experts": True}, "Transformer Engine, which is not installed"),
        ({"overlap_param_gather": True}, "overlap_grad_reduce"),
        ({"virtual_pipeline": 2}, "no stages"),
        ({"sequence_parallel": True}, "nothing shares"),
        ({"tensor_paralel": 2}, "did you mean 'tensor_parallel'?"),
        ({"tensor_parallel": 0}, "greater than 0"),
        ({"balance_loss": "batch"}, "'none', 'micro_batch' or 'global'"),
        ({"expert_dispatcher": "flex"}, "'alltoall' or 'allgather'"),
        ({"expert_capacity_factor": 0}, "greater than 0"),
        ({"recompute_layers": 2}, "expected recompute 'full' with it, got 'none'"),
        ({"recompute_modules": ["mlp"], "recompute": "full"}, "expected recompute 'selective' with it, got 'full'"),
        ({"recompute_modules": [], "recompute": "selective"}, "expected one at least"),
        ({"recompute_modules": ["moe"], "recompute": "selective"}, "expected no 'moe' for a model without experts"),
        ({"recompute_layers": 3, "recompute": "full"}, "a divisor of the 4 layers that each stage has, got 3"),
        (
            {"recompute_layers": 2, "recompute": "full", "pipeline_parallel": 2, "virtual_pipeline": 2},
            "a divisor of the 1 layers that each piece of a stage has, got 2",
        ),
        ({"balance_loss": "global"}, "expected 'none' for a model without experts, got 'global'"),
        ({"expert_capacity_factor": 1.5}, "expected None for a model without experts, got 1.5"),
    ],
)
def test_settings(layout: dict[str, Any], reason: str) -> None:
    (problem,) = refused(layout, ranks=4)
    assert problem.startswith(f"megatron.{next(iter(layout))}: ")
    assert reason in problem


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer",
        ),
        ({"zero_optimization": {"stage": 3}, "activation_offload": {"path": "."}}, "activation_offload"),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler"),
        ({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, "optimizer.type"),
        (
            {"zero_optimization": {"stage": 1}, "optimizer": {"type": "Lamb", "params": {"lr": 0.1}}},
            "optimizer.type",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1, "fused": True}}}, "optimizer.params.fused"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": -0.1}}}, "optimizer.params.lr"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1, "betas": [0.9, 1.5]}}}, "optimizer.params.betas"),
        ({"activation_offload": {"path": ".", "granularity": "layer_inputs"}}, "activation_offload.granularity"),
        ({"activation_offload": {"path": ".", "backend": "aio"}}, "activation_offload.backend"),
    ],
)
def test_keys_of_other_engines(more: dict[str, Any], key: str) -> None:
    (problem,) = refused(**more)
    assert problem.startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("layout", "key", "reason"),
    [
        (
            {"pipeline_parallel": 2},
            "pipeline_parallel",
            "expected 1 with zero_optimization.stage 2, got 2: DeepSpeed runs",
        ),
        ({"distributed_optimizer": True}, "distributed_optimizer", "expected none or false"),
        ({"context_parallel": 2}, "context_parallel", "DeepSpeed would average"),
        ({"overlap_grad_reduce": True}, "overlap_grad_reduce", "use zero_optimization.overlap_comm"),
    ],
)
def test_layouts_that_zero_does_not_take(layout: dict[str, Any], key: str, reason: str) -> None:
    (problem,) = refused(layout, ranks=2, zero_optimization={"stage": 2})
    assert problem.startswith(f"megatron.{key}: ")
    assert reason in problem


def test_zero_takes_no_experts() -> None:
    (problem,) = refused(family="mixtral", zero_optimization={"stage": 1})
    assert problem.startswith("zero_optimization.stage: expected 0 for a model with experts, got 1: ")


@pytest.mark.parametrize(
    ("layout", "ranks", "expected"),
    [
        ({"tensor_parallel": 4}, 4, "tensor_parallel: expected a divisor of the model's 2 key and value heads, got 4"),
        (
            {"pipeline_parallel": 3},
            3,
            "pipeline_parallel: expected pipeline_parallel (3) x virtual_pipeline (1) to divide the model's 4 layers",
        ),
        ({"tensor_parallel": 2}, 3, "tensor_parallel: expected tensor_parallel (2) x pipeline_parallel (1) to divide"),
        (
            {"tensor_parallel": 2, "context_parallel": 3},
            8,
            "tensor_parallel: expected tensor_parallel (2) x context_parallel (3) x pipeline_parallel (1) to divide the"
            " number of process ranks, got 8; nearest that fit: 2 x 4 x 1, 2 x 2 x 1, 2 x 1 x 1",
        ),
        ({"expert_parallel": 2}, 2, "expert_parallel: expected 1 for a model without experts, got 2"),
    ],
)
def test_layouts_that_do_not_fit(layout: dict[str, Any], ranks: int, expected: str) -> None:
    problems = refused(layout, ranks=ranks, train_batch_size=None, gradient_accumulation_steps=2)
    assert problems[0].startswith(f"megatron.{expected}")
    assert "nearest that fit" in problems[-1]


def test_layouts_of_experts() -> None:
    problems = refused(
        {"tensor_parallel": 2, "expert_parallel": 8, "expert_tensor_parallel": 1}, ranks=8, family="mixtral"
    )
    assert [problem.split(":")[0] for problem in problems] == [
        "megatron.expert_parallel",
        "megatron.sequence_parallel",
    ]
    assert problems[-1].endswith("nearest that fit 8 process ranks: TP2 EP4 ETP1 DP4 SP, EP4 DP8, TP2 EP4 DP4 SP")


def test_experts_that_do_not_divide_the_ranks() -> None:
    """The sizes nearest to those given, in the same order."""
    (problem,) = refused({"expert_parallel": 3, "pipeline_parallel": 2}, ranks=8, family="mixtral")
    assert "(1) x expert_parallel (3) x pipeline_parallel (2) to divide the number of process ranks, got 8" in problem
    assert problem.endswith("nearest that fit: 1 x 4 x 2, 1 x 2 x 2, 1 x 1 x 2")


def test_the_nearest_layouts_are_accepted() -> None:
    (problem,) = refused({"tensor_parallel": 4, "sequence_parallel": True}, ranks=4)
    assert problem.endswith("nearest that fit 4 process ranks: TP2 DP2 SP, TP2 PP2 DP1 SP, DP4")
    assert refused({"tensor_parallel": 2, "sequence_parallel": True}, ranks=4) == []
    assert refused({"tensor_parallel": 2, "pipeline_parallel": 2}, ranks=4) == []


def test_interleaving_takes_whole_rounds_of_micro_batches() -> None:
    problems = refused({"pipeline_parallel": 2, "virtual_pipeline": 2}, ranks=2, train_batch_size=6)
    assert (
        "expected gradient_accumulation_steps to be a multiple of pipeline_parallel (2) with it, got 3" in problems[0]
    )


def test_a_sequence_is_cut_evenly() -> None:
    problems = refused({"tensor_parallel": 2, "sequence_parallel": True}, ranks=2, data={"sequence_length": 15})
    assert "sequence_parallel: expected tensor_parallel (2) to divide data.sequence_length, got 15" in problems[0]


def test_a_sequence_is_shared_in_pieces() -> None:
    layout = {"tensor_parallel": 2, "sequence_parallel": True, "context_parallel": 2}
    assert refused(layout, ranks=4) == []
    (problem,) = refused(layout, ranks=4, data={"sequence_length": 18})
    assert problem == (
        "megatron.context_parallel: expected data.sequence_length to be a multiple of 4, as each of 2 ranks has two"
        " pieces of it, which tensor_parallel (2) shares too, got 18; nearest that fit 4 process ranks: TP2 DP2 SP, TP2"
        " PP2 DP1 SP, DP4"
    )


@pytest.mark.parametrize(
    ("family", "sizes", "expected"),
    [
        ("llama", {"attention_bias": True}, "model: attention_bias: expected False"),
        ("llama", {"hidden_act": "gelu"}, "model: hidden_act: expected 'silu'"),
        (
            "mistral",
            {"sliding_window": 8},
            "model: sliding_window: expected none, or at least the sequence length (16)",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "model: rope_parameters.rope_type: expected 'default'",
        ),
        ("mixtral", {"output_router_logits": True}, "model: output_router_logits: expected False"),
    ],
)
def test_variants_of_models(family: str, sizes: dict[str, Any], expected: str) -> None:
    (problem,) = refused(family=family, sizes=sizes)
    assert problem.startswith(expected)


def test_a_balance_loss_without_a_coefficient() -> None:
    (problem,) = refused({"balance_loss": "global"}, family="mixtral", sizes={"router_aux_loss_coef": 0.0})
    assert problem.startswith("megatron.balance_loss: expected a model whose router_aux_loss_coef is above 0")


def test_a_family_that_is_not_built() -> None:
    from transformers import GPT2Config

    config = run_config("megatron", "llama")
    with pytest.raises(ConfigError, match=r"model: model_type: expected one of llama, .*, got 'gpt2'"):
        MEGATRON.check_model(config, GPT2Config(), 1)


def test_a_version_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, fits in (("0.16.0", False), ("0.16.1", True), ("0.16.5", True), ("0.17.0", False)):
        monkeypatch.setattr(installed, "version", lambda name, found=version: found)
        reason = installed.not_usable_because()
        assert (reason is None) == fits
        assert fits or f"expected megatron-core >=0.16.1,<0.17, got {version}: pip install" in str(reason)


def test_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise installed.PackageNotFoundError(name)

    monkeypatch.setattr(installed, "version", missing)
    with pytest.raises(ConfigError, match=r"engine: megatron: .*got none: pip install 'narrowgauge\[megatron\]'"):
        MEGATRON.check(run_config("megatron", "llama"))


def test_another_package_named_apex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's, which Megatron's bare ``import apex`` would take for NVIDIA's; nothing of it is run."""
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (problem,) = refused()
    assert problem == (
        f"engine: megatron: expected NVIDIA's apex or none, got another package of that name in {package}, which"
        " Megatron takes for it: uninstall it (narrowgauge doctor says how)"
    )
    assert installed.fused_by() is None
    # As its source is laid out, without the compiled extensions: it is NVIDIA's, and not used.
    for name in ("optimizers", "multi_tensor_apply"):
        (package / name).mkdir()
    assert refused() == []
    assert installed.fused_by() is None
