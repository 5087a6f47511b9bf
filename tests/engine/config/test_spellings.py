"""What people write into a configuration works, or one line says what to write instead."""

from pathlib import Path
from typing import Any

import pytest

from narrowgauge.engine.backends.deepspeed.supported import check_installed, check_supported
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.errors import ConfigError

BASE: dict[str, Any] = {
    "train_batch_size": 2,
    "optimizer": {"type": "Grass", "params": {"lr": 0.01, "density": 0.5}},
}


def problem(config: Any, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data_types.grad_accum_dtype=bfp16", "data_types.grad_accum_dtype: expected one of torch.float16"),
        ("communication_data_type=bfp16", "expected one of fp32, fp16, bf16, got 'bfp16'; did you mean 'fp16'?"),
        ("torch_autocast.dtype=bfp16", "torch_autocast.dtype: expected one of"),
        ("gradient_allreduce_op=men", "expected one of mean, sum, got 'men'; did you mean 'mean'?"),
        ("checkpoint.tag_validation=never", "expected one of ignore, warn, fail, got 'never'"),
        ("log_level=loud", "expected one of debug, info, warning, error, critical, got 'loud'"),
        ("gradient_clipping=1e400", "gradient_clipping: expected a finite number, got inf"),
        (f"gradient_clipping={'[' * 5000}{']' * 5000}", "--set: gradient_clipping: it is nested too deeply"),
        (f"model.config.{'a.' * 3000}b=1", "--set: model.config.a.a.a"),
        (f"training.steps={'9' * 5001}", "--set: training.steps: expected a number of fewer digits, got 5,001"),
        (f"training.steps={'9' * 500}", "training.steps: expected less than 9223372036854775808, got 999"),
        ("optimizer.params.max_grad_norm=1.0", "gradients are clipped by the top-level key gradient_clipping"),
    ],
)
def test_a_word_or_number_that_deepspeed_would_stumble_over(override: str, expected: str) -> None:
    """They were found by DeepSpeed while it made its engine, in a traceback, or by Python in another."""
    assert expected in problem(BASE, override)


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("StepLR", {"step_size": "a"}, "StepLR cannot be made of them: TypeError"),
        ("StepLR", {"step_size": 0}, "StepLR cannot be made of them: ZeroDivisionError"),
        ("StepLR", {"step_size": 2, "last_epoch": 3}, "last_epoch: expected -1, got 3"),
        ("ExponentialLR", {"gamma": "x"}, "ExponentialLR cannot be made of them"),
        ("MultiStepLR", {"milestones": "2"}, "milestones: expected a list of whole numbers, got '2'"),
        ("OneCycleLR", {"max_lr": 0.1}, "You must define either total_steps OR"),
        ("LRRangeTest", {"lr_range_test_min_lr": -1}, "expected rates of at least 0, got -1.0"),
        ("WarmupLR", {"warmup_type": "cosine"}, "warmup_type: expected log or linear, got 'cosine'"),
        ("ReduceLROnPlateau", {"mode": "least"}, "mode least is unknown"),
        ("ChainedScheduler", {"schedulers": []}, "ChainedScheduler is made of functions or schedules"),
    ],
)
def test_parameters_that_make_no_schedule(name: str, params: dict[str, Any], expected: str) -> None:
    """They ended in torch's traceback once the engine was made, or were ignored."""
    assert expected in problem({**BASE, "scheduler": {"type": name, "params": params}})


def test_a_cycle_that_ends_before_the_run() -> None:
    scheduler = {"type": "OneCycleLR", "params": {"max_lr": 0.1, "total_steps": 3, "cycle_momentum": False}}
    found = problem({**BASE, "scheduler": scheduler, "training": {"steps": 5}})
    assert "OneCycleLR has 3 steps, expected at least training.steps, 5" in found
    load_config({**BASE, "scheduler": {"type": "MultiStepLR", "params": {"milestones": [2, 4]}}})


def test_numbers_and_depths_that_no_file_means(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"gradient_clipping": 1e400}')
    assert problem(path) == f"{path}: line 1: expected a finite number, got 1e400"
    path.write_text('{\n"training": {"steps": ' + "9" * 5000 + "}}")
    assert problem(path) == f"{path}: line 2: expected a finite number, got 9999999999... of 5,000 characters"
    path.write_text('{"note": "of 1e400", "a": 1, "a": 2}')
    assert problem(path) == f"{path}: the key 'a' stands twice in one object"
    path.write_text('{"a":' * 5000 + "1" + "}" * 5000)
    assert problem(path) == f"{path}: it is nested too deeply"
    assert problem({**BASE, "train_batch_size": {1, 2}}).startswith("config: expected JSON values")


def test_comments_as_keys_are_left_out() -> None:
    """``_comment`` was an unknown key; DeepSpeed's files are full of it."""
    config = {
        **BASE,
        "_comment": "a",
        "//": "b",
        "__comment__": 1,
        "_note": [],
        "$schema": "x",
        "#": 2,
        "zero_optimization": {"stage": 1, "_comment_stage": "c"},
    }
    assert load_config(config).raw == {**BASE, "zero_optimization": {"stage": 1}}


def test_parameters_of_deepspeeds_lamb_are_explained() -> None:
    lamb = {"type": "Lamb", "params": {"lr": 0.01, "max_coeff": 0.3, "min_coeff": 0.01, "bias_correction": True}}
    found = problem({**BASE, "optimizer": lamb})
    assert "optimizer.params.max_coeff: unknown key; it bounds the trust ratio of DeepSpeed's Lamb" in found
    assert "optimizer.params.bias_correction: unknown key; it is of DeepSpeed's optimizers" in found


def test_what_is_not_honoured_is_refused() -> None:
    config = load_config({**BASE, "data_types": {"keep_in_fp32_modules": ["norm"]}})
    with pytest.raises(ConfigError, match=r"data_types.keep_in_fp32_modules: does not work with Grass"):
        check_supported(config)


def test_a_monitor_without_its_package_is_named() -> None:
    """DeepSpeed's ``import wandb`` ended the run with a traceback."""
    with pytest.raises(ConfigError, match=r"wandb.enabled: expected the package wandb, got none: pip install wandb"):
        check_installed(load_config({**BASE, "wandb": {"enabled": True}}))
    check_installed(load_config({**BASE, "wandb": {"enabled": False}}))
