"""Runs that train LoRA adapters beside a frozen model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.support.command import losses, records, tiny_config
from tests.support.forked import run

RANK, ALPHA = 4, 8.0
RATE = {"lr": 0.01, "target_modules": ["*.lora_A.default"]}
GRASS = {"type": "Grass", "params": {"lr": 0.01, "density": 0.25, "refresh_interval": 4}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to adapt."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=640, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def config_of(corpus: Path, folder: Path, base: Path, **changes: Any) -> Path:
    given: dict[str, Any] = {
        "engine": "ddp",
        "model": {"path": str(base)},
        "lora": {"rank": RANK, "alpha": ALPHA},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "eps": 1e-4, "weight_decay": 0.01, "torch_adam": True}},
        **changes,
    }
    path = tiny_config(corpus, folder, **given)
    settings = json.loads(path.read_text())
    if settings["engine"] == "ddp":
        del settings["zero_optimization"]
    settings["training"] |= {"steps": 8, "lr_schedule": {"type": "constant"}}
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def trained(corpus: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    result = run("train", str(config_of(corpus, folder, base)))
    assert result.returncode == 0, result.stderr
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.double()(input_ids=torch.arange(32)[None]).logits


def test_an_adapter_is_saved_exported_and_merged(trained: Path, base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    steps = losses(trained / "run")
    assert steps[8] < steps[1] - 0.02
    saved = load_file(trained / "run" / "checkpoints" / "step-8" / "model.safetensors")
    layers = {name.removesuffix(".lora_A.default.weight") for name in saved if "lora_A" in name}
    assert len(layers) == 2 * 7
    assert len(saved) == 2 * len(layers), "the checkpoint holds factors and nothing else"
    # W + alpha / rank * B A, stated once more.
    expected: Any = AutoModelForCausalLM.from_pretrained(base)
    for layer in layers:
        a, b = (saved[f"{layer}.lora_{factor}.default.weight"].double() for factor in "AB")
        assert a.shape[0] == b.shape[1] == RANK
        weight = expected.get_parameter(f"{layer}.weight")
        weight.data = weight.data.double() + ALPHA / RANK * b @ a
    for words in (["adapter"], ["merged", "--merge"]):
        result = run("export", str(trained / "run"), str(tmp_path / words[0]), *words[1:])
        assert result.returncode == 0, result.stderr
        # Weights were readable to their owner alone.
        assert len({path.stat().st_mode for path in (tmp_path / words[0]).iterdir()}) == 1
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    wanted = logits(expected)
    assert float((logits(adapted) - wanted).abs().max()) < 1e-12
    assert float((logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - wanted).abs().max()) < 1e-5
    assert float((logits(AutoModelForCausalLM.from_pretrained(base)) - wanted).abs().max()) > 1e-2


def test_a_run_goes_on_from_its_adapter_and_its_own_base_only(
    trained: Path, corpus: Path, base: Path, tmp_path: Path
) -> None:
    own_base = tmp_path / "base"
    shutil.copytree(base, own_base)
    config = config_of(corpus, tmp_path, own_base)
    for steps in ("4", "8"):
        result = run("train", str(config), "--set", f"training.steps={steps}")
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == losses(trained / "run")
    other = run("train", str(config), "--set", "training.steps=9", "--set", "lora.alpha=16.0")
    assert other.returncode == 2
    assert "lora.alpha" in other.stderr
    changed: Any = AutoModelForCausalLM.from_pretrained(own_base)
    changed.model.norm.weight.data += 0.5
    changed.save_pretrained(own_base)
    result = run("train", str(config), "--set", "training.steps=9")
    assert result.returncode == 2
    assert "its adapters belong to other weights than model.path holds now" in result.stderr
    result = run("export", str(tmp_path / "run"), str(tmp_path / "merged"), "--merge")
    assert result.returncode == 2
    assert "where there is now other contents" in result.stderr


def test_a_factor_of_a_tied_head_is_not_merged(corpus: Path, tmp_path: Path) -> None:
    """The embedding would have changed with it: other logits, without a word."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "vocab_size": 640, "max_position_embeddings": 32}
    tied = LlamaConfig(tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(tied).save_pretrained(tmp_path / "tied")
    config = config_of(corpus, tmp_path, tmp_path / "tied", lora={"target_modules": ["q_proj", "lm_head"]})
    assert run("train", str(config), "--set", "training.steps=2").returncode == 0
    result = run("export", str(tmp_path / "run"), str(tmp_path / "merged"), "--merge")
    assert result.returncode == 2
    assert "the adapter is for lm_head alone" in result.stderr
    assert not (tmp_path / "merged").exists()
    assert run("export", str(tmp_path / "run"), str(tmp_path / "adapter")).returncode == 0


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)] + [3])
def test_losses_are_those_of_one_process_at_every_stage(
    trained: Path, corpus: Path, base: Path, tmp_path: Path, stage: int
) -> None:
    config = config_of(corpus, tmp_path, base, engine="deepspeed", zero_optimization={"stage": stage})
    result = run("train", str(config), ranks=2)
    assert result.returncode == 0, result.stderr
    expected = losses(trained / "run")
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"type": "Lamb", "params": {**RATE}}},
        {"optimizer": {"type": "Frugal", "params": {**RATE, "density": 0.25}}},
        {"optimizer": {"type": "Grass", "params": {**RATE, "density": 0.5, "refresh_interval": 3}}},
        {"optimizer": {"type": "GaLore", "params": {**RATE, "density": 0.5, "refresh_interval": 3}}},
        {"optimizer": {"type": "Apollo", "params": {**RATE, "rank": 2, "refresh_interval": 3}}},
        {"optimizer": {"type": "Lars", "params": {**RATE, "lr": 1.0}}},
        {"model": {"gradient_checkpointing": "reentrant"}},
        {"model": {"gradient_checkpointing": "non-reentrant"}},
        {"lora": {"base": "nf4", "rank": RANK}},
        {"activation_offload": {"path": "{folder}", "keep_resident": 0, "min_tensor_bytes": 0}},
        {"activation_offload": {"path": None, "codec": "mesa8", "min_tensor_bytes": 0}},
        {"sampled_backward": {"method": "wta_crs", "keep": 0.3}},
        {"lora": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"], "rslora": True}},
        {"lora": {"target_modules": ["embed_tokens", "v_proj"]}},
    ],
    ids=[
        "lamb",
        "frugal",
        "grass",
        "galore",
        "apollo",
        "lars",
        "reentrant",
        "non-reentrant",
        "nf4",
        "offload",
        "mesa",
        "sampled",
        "whole",
        "embedding",
    ],
)
def test_adapters_go_with(corpus: Path, base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    changes = json.loads(json.dumps(changes).replace("{folder}", str(tmp_path)))
    if "model" in changes:
        changes["model"]["path"] = str(base)
    result = run("train", str(config_of(corpus, tmp_path, base, **changes)))
    assert result.returncode == 0, result.stderr
    first, *_, last = [record["eval_loss"] for record in records(tmp_path / "run") if "eval_loss" in record]
    assert last < first
    assert run("export", str(tmp_path / "run"), str(tmp_path / "out")).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (['lora.target_modules=["q_porj"]'], "lora: "),
        (['lora.modules_to_save=["haed"]'], "lora: 'haed' names no layer of the model"),
        (['model={"preset": "llama-60m"}'], "lora: expected model.path, a trained model to adapt"),
        ([f"optimizer={json.dumps(GRASS)}"], "optimizer.params.target_modules: no trainable nn.Linear"),
        (["lora.rank=0"], "lora.rank: "),
        (["lora.r=8"], "lora.r: unknown key"),
    ],
)
def test_what_cannot_be_adapted_is_said(
    corpus: Path, base: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    settings = [word for setting in words for word in ("--set", setting)]
    result = run("train", str(config_of(corpus, tmp_path, base)), *settings)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
