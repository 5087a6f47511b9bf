"""Which models are taken, and what is said of the others before anything is tokenized or built."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from narrowgauge.engine.config.run_blocks import ModelBlock
from narrowgauge.engine.data.tokenizer import load_tokenizer
from narrowgauge.engine.errors import DataError, UserError
from narrowgauge.engine.run.model import abstract_model, check_model, model_config
from tests.support.command import tiny_config
from tests.support.forked import run

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "num_key_value_heads": 2, "vocab_size": 600, "max_position_embeddings": 128}
LLAMA = {
    **TEXT,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "use_cache": True,
}
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
RELEASED: dict[str, tuple[dict[str, Any], Callable[[Any], Any], Any]] = {
    "llama 3": ({**LLAMA, "rope_scaling": None}, lambda c: c.rope_parameters["rope_theta"], 500000.0),
    "llama 3.1": ({**LLAMA, "rope_scaling": ROPE}, lambda c: c.rope_parameters["factor"], 8.0),
    "linear": (
        {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}},
        lambda c: c.rope_parameters["rope_type"],
        "linear",
    ),
    "qwen3_moe": (
        {**TEXT, "model_type": "qwen3_moe", "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8},
        lambda c: abstract_model(c).get_parameter("model.layers.0.self_attn.q_proj.weight").shape[0],
        64,
    ),
    "phi 2": (
        {**TEXT, "model_type": "phi", "partial_rotary_factor": 0.4, "rope_theta": 10000.0, "qk_layernorm": False},
        lambda c: c.rope_parameters["partial_rotary_factor"],
        0.4,
    ),
    "gpt2": (
        {
            "model_type": "gpt2",
            "n_ctx": 64,
            "n_positions": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "task_specific_params": {"text-generation": {"do_sample": True}},
            "summary_type": "cls_index",
        },
        lambda c: c.max_position_embeddings,
        64,
    ),
    "mixtral": (
        {**TEXT, "model_type": "mixtral", "rope_theta": 1e6, "sliding_window": None},
        lambda c: c.vocab_size,
        600,
    ),
}


def described(config: dict[str, Any], **options: Any) -> Any:
    return model_config(ModelBlock(config=config, **options), vocab_size=600, sequence_length=32)


@pytest.mark.parametrize("name", list(RELEASED))
def test_released_configurations_are_taken(name: str) -> None:
    """Only what ``to_dict`` writes today was known: keys of released files were refused as typos."""
    settings, look, expected = RELEASED[name]
    before = json.dumps(settings)
    config = described(settings)
    assert look(config) == expected
    abstract_model(config)
    assert json.dumps(settings) == before


# Keys that stand in released files beside those that transformers reads.
NOTES: dict[str, dict[str, Any]] = {
    "bloom": {"masked_softmax_fusion": True, "skip_bias_add": True, "unk_token_id": 0, "seq_length": 2048},
    "deepseek_v3": {"ep_size": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "quantization_config": {}},
    "falcon": {"apply_residual_connection_post_layernorm": False, "auto_map": {"AutoConfig": "a.B"}},
    "gemma": {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "sliding_window_size": 4096},
    "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True},
    "gpt_oss": {"experts_per_token": 4, "num_experts_per_tok": 4, "initial_context_length": 4096},
    "gptj": {"rotary": True, "gradient_checkpointing": False, "tokenizer_class": "GPT2Tokenizer"},
    "mamba": {"d_model": 64, "hidden_size": 64, "n_layer": 2, "num_hidden_layers": 2, "ssm_cfg": {}, "rms_norm": True},
    "mpt": {"init_config": {"name": "kaiming_normal_"}, "tokenizer_name": "EleutherAI/gpt-neox-20b", "verbose": 0},
    "opt": {"activation_dropout": 0.0, "prefix": "</s>", "word_embed_proj_dim": 64},
    "phi3": {"attention_bias": False, "pad_token_id": 0},
    "qwen2": {"use_mrope": False, "max_window_layers": 28},
    "stablelm": {"norm_eps": 1e-5, "rope_pct": 0.25, "partial_rotary_factor": 0.25},
    "starcoder2": {"activation_function": "gelu", "mlp_type": "default", "norm_type": "layer_norm"},
}


@pytest.mark.parametrize("family", NOTES)
def test_what_nothing_reads_in_released_configurations_is_left_out(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They were refused as typos; transformers drops them without a word."""
    model_keys = type(AutoConfig.for_model(family))().to_dict()
    with caplog.at_level("WARNING", logger="narrowgauge"):
        config = described({"model_type": family, **NOTES[family]})
    assert config.model_type == family
    for key in NOTES[family].keys() - model_keys.keys() - config.attribute_map.keys():
        assert key in caplog.text or not hasattr(config, key) or key in ("auto_map", "cache_implementation")


def test_a_second_name_of_a_size_needs_the_first() -> None:
    with pytest.raises(UserError, match=r"d_model: unknown key for mamba.*and n_layer"):
        described({"model_type": "mamba", "d_model": 64, "n_layer": 2})


def test_models_that_are_always_causal_need_no_word_for_it() -> None:
    """GPT-NeoX has BERT's key, does not ask it, and was refused without it: every Pythia."""
    sizes = {"model_type": "gpt_neox", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
    check_model(ModelBlock(config=sizes))


@pytest.mark.parametrize(
    ("rope", "hint"), [({"rope_typ": "llama3"}, "'rope_type'"), ({"type": "linear", "factr": 2.0}, "'factor'")]
)
def test_typos_in_rope_are_found(rope: dict[str, Any], hint: str) -> None:
    with pytest.raises(UserError, match=rf"model\.config\.rope_scaling\..*did you mean {hint}"):
        described({**LLAMA, "rope_scaling": rope})


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("rope_thetta", "did you mean 'rope_theta'"),
        ("hiden_size", "did you mean 'hidden_size'"),
        ("torch_dtyp", "did you mean 'torch_dtype'"),
        ("n_ctx", "unknown key for llama"),
    ],
)
def test_typos_are_still_found(key: str, hint: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.config\.{key}: unknown key for llama.*") as raised:
        described({**LLAMA, key: 1})
    assert hint in str(raised.value)


@pytest.mark.parametrize(
    ("family", "expected"),
    [("gemma3", "Gemma3ForCausalLM"), ("qwen3_5", "Qwen3_5ForCausalLM"), ("llava", "LlamaForCausalLM")],
)
def test_the_text_model_of_a_composite_is_trained(family: str, expected: str) -> None:
    """They ended in "'Gemma3Config' object has no attribute 'vocab_size'"."""
    config = described({"model_type": family, "text_config": {**SMALL, "num_key_value_heads": 2, "head_dim": 8}})
    assert config.vocab_size >= 600
    assert config.hidden_size == 32
    assert type(abstract_model(config)).__name__ == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gemma3"}, r"model\.config: gemma3 is made of several models.* 'text_config', got none"),
        ({"model_type": "gemma3", "hidden_size": 8}, r"expected its keys in an object 'text_config'"),
        (
            {"model_type": "gemma3", "text_config": {"hiden_size": 8}},
            r"model\.config\.text_config\.hiden_size: .* mean 'h",
        ),
        ({"model_type": "qwen2_vl", "text_config": {}}, r"'qwen2_vl_text' is not a causal language model"),
        ({"model_type": "musicgen"}, r"musicgen is made of several models, none of which is a causal"),
        ({"model_type": "t5"}, r"'t5' is not a causal language model"),
        ({"model_type": "bert"}, r"model\.config\.is_decoder: expected true, got false: bert would see the tokens"),
        (
            {"model_type": "gemma", "use_bidirectional_attention": True},
            r"use_bidirectional_attention: expected null, got true",
        ),
        (
            {"model_type": "gemma4_text", "use_bidirectional_attention": "all"},
            r"use_bidirectional_attention: expected null, got \"all\"",
        ),
        (
            {**LLAMA, "num_key_value_heads": 3},
            r"num_key_value_heads: expected a divisor of num_attention_heads, 4, got 3",
        ),
        ({**TEXT, "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, r"at most .*, 2, got 3"),
        (
            {"model_type": "gemma4_assistant"},
            r"^model\.config: gemma4_assistant: hidden_size_per_layer_input must be 0",
        ),
        ({**LLAMA, "num_hidden_layers": 0}, r"model\.config\.num_hidden_layers: expected at least 1, got 0"),
        ({"model_type": "gpt2", "n_layer": 0}, r"model\.config\.num_hidden_layers: expected at least 1, got 0"),
        ({"model_type": "bart"}, r"trains a bart to repeat the token that it is given"),
        ({"model_type": "git"}, r"trains a git on images with their captions"),
        ({"model_type": "mllama"}, r"mllama is made of several models, none of which is a causal language model alone"),
        ({"model_type": "lama"}, r"'lama' is not a model type of transformers"),
        (
            {**SMALL, "model_type": "llama", "num_attention_heads": 5},
            r"\.num_attention_heads: .* hidden_size, 32, got 5",
        ),
        ({**LLAMA, "hidden_size": "x"}, r"^model\.config\.hidden_size: expected a whole number, got 'x'$"),
        ({**LLAMA, "head_dim": "x"}, r"^model\.config\.head_dim: expected a whole number or null, got 'x'$"),
        ({**LLAMA, "rms_norm_eps": "x"}, r"^model\.config\.rms_norm_eps: expected a number, got 'x'$"),
        ({**LLAMA, "model_type": "qwen3", "layer_types": ["a", "b"]}, r"\.layer_types: expected .*, got \['a', 'b'\]$"),
        ({**LLAMA, "hidden_size": 10**8}, r"^model\.config\.hidden_size: expected at most 1048576, got 100000000$"),
        ({**LLAMA, "num_hidden_layers": 10**5}, r"num_hidden_layers: expected at most 2000, got 100000$"),
    ],
)
def test_models_that_cannot_be_trained_are_named_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        check_model(ModelBlock(config=settings))
    assert "\n" not in str(raised.value)


def test_bert_as_a_decoder_is_taken() -> None:
    """It was taken as it is: trained on tokens that it sees, its loss went to zero."""
    check_model(ModelBlock(config={**SMALL, "model_type": "bert", "is_decoder": True}))


def test_a_preset_whose_heads_no_longer_fit_is_named_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^model") as raised:
        check_model(ModelBlock(preset="llama-60m", config={"num_attention_heads": 7}))
    assert "\n" not in str(raised.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TEXT))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Command:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def as_pickle(folder: Path) -> None:
    weights: dict[str, Any] = dict(load_file(folder / "model.safetensors"))
    weights["x"] = Command(folder / "ran")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_code(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\n")


def as_composite(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {}, "vision_config": {}}))


def without_a_part(folder: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")


def with_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "other"}))


def as_quantized(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "someones", "bits": 3}
    (folder / "config.json").write_text(json.dumps(settings))


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle": (as_pickle, r"pytorch_model\.bin: expected tensors, got a pickle with other objects"),
    "code": (as_code, r"holds no Hugging Face model that can be used: it needs code of its own"),
    "composite": (as_composite, r"holds a gemma3, which is made of several models; save its text model"),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 5000), r"model\.safetensors: damaged"),
    "not weights": (lambda f: (f / "model.safetensors").write_text("x"), r"model\.safetensors: damaged"),
    "adapter": (with_an_adapter, r"holds an adapter \(adapter_config\.json\), which transformers would put into"),
    "quantized": (as_quantized, r"holds quantized weights \(quantization_config, someones\): expected plain ones"),
    "a part": (without_a_part, r"lacks 1 of its 2 files, such as model\.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds no weights"),
}


@pytest.mark.parametrize("name", list(FOLDERS))
def test_folders_that_cannot_be_trained_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A pickle hung a rank for minutes; a folder with code asked whether to run it, and a ``y`` on stdin ran it."""
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    spoil, message = FOLDERS[name]
    spoil(folder)
    with pytest.raises(UserError, match=rf"^model\.path: .*{message}") as raised:
        check_model(ModelBlock(path=str(folder)))
    assert "\n" not in str(raised.value)
    assert not (folder / "ran").exists()


def test_a_tokenizers_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    with pytest.raises(
        DataError, match=r"^data\.tokenizer: .* holds no Hugging Face tokenizer: it needs code of its own"
    ):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_names_of_the_hub_are_explained() -> None:
    with pytest.raises(
        UserError, match=r"^model\.path: expected a .*folder.* got 'meta-llama/Llama-3-8B'; nothing is downl"
    ):
        check_model(ModelBlock(path="meta-llama/Llama-3-8B"))


def test_weights_that_a_folder_lacks_are_not_drawn(folder: Path, corpus: Path, tmp_path: Path) -> None:
    """transformers draws them at random and says so in a log that is not shown; on two ranks, in seconds."""
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads(tiny_config(corpus, tmp_path).read_text())
    config["model"] = {"path": str(folder)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    begin = time.monotonic()
    result = run("train", str(tmp_path / "config.json"), ranks=2)
    assert time.monotonic() - begin < 100
    assert result.returncode != 0
    assert "holds no weights for 1 parameters of LlamaForCausalLM, such as model.layers.1.mlp.up_proj" in result.stderr
    assert result.stderr.count("error: ") == 1
