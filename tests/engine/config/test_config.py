"""The whole file is checked at once: every key at every depth, ours and DeepSpeed's."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT
from torch.optim.lr_scheduler import LambdaLR

from narrowgauge.engine.backends import backend_of, engine_names
from narrowgauge.engine.backends.deepspeed.supported import check_supported
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.config.rate_blocks import ScheduleBlock
from narrowgauge.engine.config.run_blocks import ModelBlock
from narrowgauge.engine.errors import ConfigError
from narrowgauge.engine.run.model import abstract_model, model_config, preset_names
from narrowgauge.engine.run.schedule import rule_of
from tests.support.command import ROOT

BASE: dict[str, Any] = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "Grass", "params": {"density": 0.125}},
    "model": {"preset": "llama-60m"},
    "data": {"train": "stdlib"},
    "training": {"steps": 10},
    "logging": {"run_dir": "runs/x"},
}


def problems_with(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(BASE, overrides)
    return caught.value.problems


@pytest.mark.parametrize(
    ("misspelt", "right"),
    [
        ("gradient_cliping", "gradient_clipping"),
        ("zero_optimisation", "zero_optimization"),
        ("zero_optimization.stge", "stage"),
        ("zero_optimization.stage3_max_live_paramters", "stage3_max_live_parameters"),
        ("zero_optimization.offload_optimizer.pin_memry", "pin_memory"),
        ("fp16.loss_scalee", "loss_scale"),
        ("aio.blok_size", "block_size"),
        ("flops_profiler.enabld", "enabled"),
        ("checkpoint.load_univesal", "load_universal"),
        ("checkpoint.writer.decopled", "decoupled"),
        ("timers.throughput.enabeld", "enabled"),
        ("data.sequence_lenght", "sequence_length"),
        ("training.lr_schedule.warmup_step", "warmup_steps"),
        ("logging.run_dirr", "run_dir"),
        ("model.presett", "preset"),
        ("optimizer.parms", "params"),
        ("optimizer.params.refresh_intervall", "refresh_interval"),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest_right_one(misspelt: str, right: str) -> None:
    assert problems_with(f"{misspelt}=1") == [f"{misspelt}: unknown key; did you mean {right!r}?"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            'data_efficiency={"data_sampling": {"num_epoch": 1}}',
            "data_efficiency: unknown key 'data_sampling.num_epoch'; did you mean 'num_epochs'?",
        ),
        ('autotuning={"fas": 1}', "autotuning: unknown key 'fas'; did you mean 'fast'?"),
        (
            'optimizer={"type": "AdamW", "params": {"weight_deacy": 0}}',
            "optimizer.params.weight_deacy: unknown key for AdamW; did you mean 'weight_decay'?",
        ),
        (
            'optimizer={"type": "SGD", "params": {"momentm": 1}}',
            "optimizer.params.momentm: unknown key for SGD; did you mean 'momentum'?",
        ),
        (
            'optimizer={"type": "AdamW", "params": {"lr": -1}}',
            "optimizer.params.lr: expected a number of at least 0, got -1",
        ),
        (
            'optimizer={"type": "Adam", "params": {"betas": [0.9, 1.5]}}',
            "optimizer.params.betas: expected two numbers in [0, 1), got [0.9, 1.5]",
        ),
        (
            'optimizer={"type": "AdamW", "params": {"betas": [0.9]}}',
            "optimizer.params.betas: expected two numbers in [0, 1), got [0.9]",
        ),
        (
            'scheduler={"type": "WarmupLR", "params": {"warmup_min": 1}}',
            "scheduler.params.warmup_min: unknown key for WarmupLR; did you mean 'warmup_min_lr'?",
        ),
        ('train_batch_size="8"', 'train_batch_size: expected a valid integer, got "8"'),
        ("train_batch_size=true", "train_batch_size: expected a valid integer, got true"),
        ("train_batch_size=0", "train_batch_size: expected greater than 0, got 0"),
        ("gradient_clipping=a", 'gradient_clipping: expected a valid number, got "a"'),
        ("zero_optimization.stage=two", 'zero_optimization.stage: expected 0, 1, 2 or 3, got "two"'),
        ("zero_optimization.stage=4", "zero_optimization.stage: expected 0, 1, 2 or 3, got 4"),
        ("optimizer.params.density=2", "optimizer.params.density: expected a number in (0, 1] or None, got 2"),
        ("optimizer.params.density=0", "optimizer.params.density: expected a number in (0, 1] or None, got 0"),
        ("optimizer.params.rank=4", "optimizer.params: give exactly one of rank, density and budget, got rank="),
        ("optimizer.params={}", "optimizer.params: give exactly one of rank, density and budget, got rank="),
        ("bf16.enabled=auto", "bf16.enabled: expected a value, got 'auto', which only Hugging Face's Trainer fills in"),
        ('optimizer.type=["AdamW"]', 'optimizer.type: expected a valid string, got ["AdamW"]'),
        ("optimizer.type=grass", "optimizer.type: 'grass' is not a known optimizer; did you mean 'Grass'?"),
        (
            "optimizer.type=Nothing",
            "optimizer.type: 'Nothing' is not a known optimizer; known are ['AdamW', 'Apollo', 'Frugal', 'GaLore',",
        ),
        ('scheduler={"type": "WarmLR"}', "scheduler.type: 'WarmLR' is not a known schedule; did you mean 'WarmupLR'?"),
        ("data.train=3", "data.train: expected 'stdlib', got 3"),
        ("training={}", "training: expected one of 'steps' and 'epochs', got none"),
        (
            'training={"steps": 3, "lr_schedule": {"type": "cos"}}',
            "training.lr_schedule.type: expected 'constant', 'cosine', 'wsd' or 'power', got \"cos\"",
        ),
        ("bf16.enabled=False", 'bf16.enabled: expected false, got the string "False"'),
        ('zero_optimization.stage="3"', 'zero_optimization.stage: expected 3, got the string "3"'),
        ("optimizer.params.lr=Infinity", "optimizer.params.lr: expected a number of at least 0, got inf"),
        (
            'optimizer.params.param_groups=[{"params": "*norm*"}]',
            "optimizer.params.param_groups[0].params: expected a list of globs, got '*norm*'",
        ),
        (
            'optimizer.params.param_groups=[{"params": ["*"], "lr": -1}]',
            "optimizer.params.param_groups[0].lr: expected a number of at least 0, got -1",
        ),
        (
            'scheduler={"type": "WarmupDecayLR", "params": {"warmup_max_lr": 1.0}}',
            "scheduler.params.total_num_steps: expected this key for WarmupDecayLR, got none",
        ),
        ('logging.run_dir=""', 'logging.run_dir: string should have at least 1 character, got ""'),
        ("model={}", "model: expected one of 'path', 'preset' and 'config', got none"),
        ("model.path=x", "model: 'path' stands alone: 'preset' and 'config' start from random weights"),
        (
            'model={"path": "x", "initial_weights": "by_name"}',
            "model: 'initial_weights' is of random weights: 'path' has its own",
        ),
        ("model.initial_weights=torch", "model.initial_weights: expected 'by_name' or 'transformers', got \"torch\""),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(override: str, expected: str) -> None:
    found = problems_with(override)
    assert any(problem.startswith(expected) for problem in found), found


def test_dense_adamw_is_one_word_away() -> None:
    """What only Grass takes stays in the file, is left out, and is told; a misspelt name is still an error."""
    given = {"lr": 0.1, "betas": [0.9, 0.95], "density": 0.125, "matrix_lr_scale": 0.2, "param_groups": []}
    config = load_config(BASE, [f"optimizer.params={json.dumps(given)}", "optimizer.type=AdamW"])
    assert config.engine_settings()["optimizer"] == {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.9, 0.95]}}
    assert config.unused_params() == ["density", "matrix_lr_scale", "param_groups"]
    assert config.raw["optimizer"]["params"] == given
    (problem,) = problems_with("optimizer.type=AdamW", "optimizer.params.densty=1")
    assert problem.startswith("optimizer.params.densty: unknown key for AdamW")


def test_an_engine_that_does_not_exist_is_the_only_problem() -> None:
    """What other keys may be there, only the engine knows."""
    for given, hint in (("deepsped", "; did you mean 'deepspeed'?"), ("3", ""), ("__init__", "")):
        (problem,) = problems_with(f"engine={given}", "gradient_cliping=1")
        shown = repr(json.loads(given) if given == "3" else given)
        assert problem == f"engine: expected one of {engine_names()}, got {shown}{hint}"


def test_two_schedules_are_one_too_many() -> None:
    found = problems_with('training.lr_schedule={"type": "cosine"}', 'scheduler={"type": "WarmupLR"}')
    assert found == ["training.lr_schedule and scheduler are two learning-rate schedules; one is allowed"]


def test_all_problems_are_told_at_once() -> None:
    assert len(problems_with("gradient_cliping=1", 'train_batch_size="8"', "zero_optimization.stge=1")) == 3


def test_file_errors_name_the_file(tmp_path: Path) -> None:
    for text, message in (
        ('{"a": 1, "a": 2}', "stands twice"),
        ("[1]", "expected a JSON object, got list"),
        ('{"a": ', "line 1"),
    ):
        path = tmp_path / "config.json"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(path)
        assert str(caught.value).startswith(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "missing.json")


def test_comments_are_allowed_as_in_deepspeed(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{\n  // two GPUs\n  "train_batch_size": 4,\n}')
    assert load_config(path).raw == {"train_batch_size": 4}


def test_overrides_are_json_or_bare_strings() -> None:
    config = load_config(BASE, ["training.steps=5", "logging.run_dir=a b", "zero_optimization.stage=3"])
    assert config.parsed.training is not None
    assert config.parsed.training.steps == 5
    assert config.raw["logging"]["run_dir"] == "a b"
    assert config.zero_stage == 3
    for override, message in (
        ("training.steps", "expected key.path=value, got 'training.steps'"),
        ("train_batch_size.x=1", "has no keys"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(BASE, [override])
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        load_config(BASE, ["training.step=5"])
    assert BASE["training"] == {"steps": 10}


@pytest.mark.parametrize(
    ("given", "world_size", "expected"),
    [
        ({"train_batch_size": 8}, 2, (8, 4, 1)),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1}, 2, (8, 1, 4)),
        ({"train_batch_size": 8, "gradient_accumulation_steps": 2}, 2, (8, 2, 2)),
        ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}, 4, (24, 3, 2)),
        ({"train_batch_size": 8}, 3, "expected train_micro_batch_size_per_gpu (2) x"),
        (
            {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3},
            2,
            "expected train_micro_batch_size_per_gpu (3)",
        ),
        ({"train_batch_size": 8}, 16, "expected at least 16, "),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3}, 4, "expected at least 12, "),
        ({"train_batch_size": 8, "gradient_accumulation_steps": 3}, 4, "expected at least 12, "),
        ({}, 2, "expected it or"),
    ],
)
def test_batch_sizes_are_derived_as_deepspeed_derives_them(
    given: dict[str, int], world_size: int, expected: Any
) -> None:
    config = load_config({**{k: v for k, v in BASE.items() if k != "train_batch_size"}, **given})
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=re.escape(f"train_batch_size: {expected}")):
            config.batches(world_size)
    else:
        batches = config.batches(world_size)
        assert (batches.total, batches.micro, batches.accumulation_steps) == expected


@pytest.mark.parametrize(
    ("changes", "key", "advice"),
    [
        ({"fp16": {"enabled": True}}, "fp16.enabled", "use bf16"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "bf16.enabled", "stage to 1"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled", "use bf16"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile", ""),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal", "drops frozen weights"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel", ""),
        *[
            ({"zero_optimization": {"stage": 3, **zero}}, f"zero_optimization.{key}", advice)
            for zero, key, advice in (
                ({"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "offload_optimizer.device", "use cpu"),
                ({"offload_param": {"device": "nvme", "nvme_path": "/x"}}, "offload_param.device", "use cpu"),
                ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio", ""),
                ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size", "expected 1,"),
                ({"zero_quantized_weights": True}, "zero_quantized_weights", ""),
                ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights", ""),
                ({"round_robin_gradients": True}, "round_robin_gradients", ""),
            )
        ],
    ],
)  # fmt: skip
def test_what_grass_does_not_work_with_is_refused_with_advice(changes: dict[str, Any], key: str, advice: str) -> None:
    config = load_config({**copy.deepcopy(BASE), **changes})
    with pytest.raises(ConfigError) as caught:
        check_supported(config)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{key}: does not work with Grass: ")
    assert advice in problem


def test_mixture_of_experts_is_refused() -> None:
    """DeepSpeed marks an expert's parameters; the compact one would be averaged with other experts'."""
    model = torch.nn.Linear(4, 4)
    check_supported(load_config(BASE), model)
    model.weight.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="mixture of experts"):
        check_supported(load_config(BASE), model)


def test_presets_have_the_sizes_of_galores_table() -> None:
    found = {}
    for name in preset_names():
        config = model_config(ModelBlock(preset=name), vocab_size=None, sequence_length=256)
        found[name] = round(sum(p.numel() for p in abstract_model(config).parameters()) / 1e6)
    sizes = {"60m": 58, "130m": 134, "350m": 368, "1b": 1339, "7b": 6738, "13b": 13016}
    assert found == {f"llama-{name}": size for name, size in sizes.items()}


def test_schedules_fall_as_they_say() -> None:
    for kind, expected in (
        ("cosine", {2: 1.0, 11: 0.55, 20: 0.1}),
        ("wsd", {1: 0.55, 2: 1.0, 15: 1.0, 16: 1.0, 20: 0.1}),
        ("constant", {1: 0.5, 2: 1.0, 20: 1.0}),
    ):
        block = ScheduleBlock.model_validate({"type": kind, "warmup_steps": 2, "min_lr_ratio": 0.1})
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = LambdaLR(optimizer, rule_of(block, 20))
        rates = {}
        for step in range(21):
            rates[step] = optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()
        assert {step: rates[step] for step in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_schedules_are_those_of_transformers(kind: str, warmup: int) -> None:
    from transformers import optimization

    theirs = {
        "cosine": lambda o: optimization.get_cosine_with_min_lr_schedule_with_warmup(o, warmup, 20, min_lr_rate=0.1),
        "wsd": lambda o: optimization.get_wsd_schedule(o, warmup, 4, num_training_steps=20, min_lr_ratio=0.1),
        "constant": lambda o: optimization.get_constant_schedule_with_warmup(o, warmup),
    }
    block = ScheduleBlock.model_validate({"type": kind, "warmup_steps": warmup, "min_lr_ratio": 0.1})
    rates = []
    for build in (lambda o: LambdaLR(o, rule_of(block, 20)), theirs[kind]):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        schedule = build(optimizer)
        rates.append([])
        for _ in range(21):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    assert rates[0] == rates[1]


def test_ready_configurations_hold() -> None:
    root = ROOT / "configs"
    for path in sorted(root.glob("*.json")):
        config = load_config(path)
        backend_of(config.parsed.engine).check(config)
    sizes = {path.stem for path in (root / "models").glob("*.json")}
    assert sizes == {f"llama-{size}" for size in ("60m", "130m", "350m", "1b", "7b", "13b")}
    assert all("model_type" in json.loads(path.read_text()) for path in (root / "models").glob("*.json"))


@pytest.mark.parametrize(("engine", "stage"), [("deepspeed", 1), ("ddp", 0)])
def test_gradients_are_clipped_as_deepspeed_does_where_the_file_says_nothing(engine: str, stage: int) -> None:
    config = load_config({**BASE, "engine": engine, "zero_optimization": {"stage": stage}})
    assert config.parsed.gradient_clipping == GRADIENT_CLIPPING_DEFAULT == 1.0


@pytest.mark.parametrize("engine", ["ddp", "megatron"])
def test_a_scheduler_of_deepspeeds_is_refused_where_it_would_not_act(engine: str) -> None:
    """The ddp engine took it for an offloading block without a device, and trained at a constant rate."""
    with pytest.raises(ConfigError, match=r"scheduler: .*use training\.lr_schedule"):
        load_config({**BASE, "engine": engine, "scheduler": {"type": "WarmupLR", "params": {}}})
