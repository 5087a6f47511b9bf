"""The configurations for a server of 8 GPUs: each is checked, and trained at a small size on CPU ranks."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from narrowgauge.engine.config.config import Config, load_config
from narrowgauge.engine.config.json_file import flatten
from narrowgauge.engine.data.tokenizer import load_tokenizer, train_tokenizer
from narrowgauge.engine.data.tokens import write_tokens
from narrowgauge.engine.run.model import abstract_model, model_config
from narrowgauge.offload import ActivationOffload
from narrowgauge.optimizers import Grass
from tests.launcher.conftest import Call
from tests.support.command import ROOT, losses
from tests.support.forked import run
from tests.support.memory import GIB, converted_model, layer_and_head, memory_of

FOLDER, PAGE = ROOT / "configs" / "8gpu", ROOT / "docs" / "8gpu.md"
VOCAB_SIZE, LENGTH, STEPS = 600, 32, 3
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": LENGTH,
}
# What Hugging Face's folders of these names hold.
FOLDERS = {
    "models/Llama-2-7b-hf": LlamaConfig(max_position_embeddings=4096),
    "models/Llama-2-13b-hf": LlamaConfig(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        max_position_embeddings=4096,
    ),
}


@dataclass(frozen=True)
class Expected:
    stage: int
    ranks: int = 2
    offloads: bool = False
    starts_from_folder: bool = False


EXPECTED = {
    "llama-1b-pretrain": Expected(1),
    "llama-7b-pretrain": Expected(2),
    "llama-7b-pretrain-offload": Expected(1, offloads=True),
    "llama-7b-finetune": Expected(1, starts_from_folder=True),
    "llama-13b-pretrain": Expected(3, ranks=4, offloads=True),
    "llama-13b-finetune": Expected(3, starts_from_folder=True),
}
QUICK = ("llama-7b-pretrain-offload", "llama-13b-finetune")


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.json"


def folder_config(config: Config) -> LlamaConfig | None:
    model = config.parsed.model
    assert model is not None
    return FOLDERS[model.path] if model.path is not None else None


@pytest.fixture(scope="module")
def inputs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Hugging Face model and its tokenizer in ``model``, and the text as ``train/*.bin``."""
    folder = tmp_path_factory.mktemp("inputs")
    texts = [path.read_text() for path in sorted(corpus.glob("*.txt"))]
    train_tokenizer(lambda: texts, VOCAB_SIZE, folder / "model")
    tokenizer = load_tokenizer(folder / "model")
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**TINY))
    model.to(torch.bfloat16)
    with torch.no_grad():
        # Far from how a model is initialised, so that a first loss tells which weights it was taken with.
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder / "model")
    (folder / "train").mkdir()
    for number, text in enumerate(texts):
        documents = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
        write_tokens(folder / "train" / f"part-{number}", documents, len(tokenizer))
    return folder


def shrunk(config: Config, inputs: Path, corpus: Path, folder: Path) -> dict[str, Any]:
    """The keys that are changed for a run of seconds."""
    changes: dict[str, Any] = {
        "data.train": [f"{inputs}/train/*.bin"],
        "data.tokenizer": f"{inputs}/model",
        "data.cache_dir": f"{folder}/cache",
        "data.sequence_length": LENGTH,
        "training.steps": STEPS,
        "training.lr_schedule.warmup_steps": 1,
        "training.eval_sequences": 4,
        "logging.run_dir": f"{folder}/run",
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 2,
        # So that a run this short has a change of subspace.
        "optimizer.params.refresh_interval": 2,
    }
    if folder_config(config) is not None:
        changes |= {"model.path": f"{inputs}/model", "data.train": [f"{corpus}/*.txt"]}
    else:
        changes |= {f"model.config.{key}": value for key, value in TINY.items()}
    if config.offload() is not None:
        changes |= {
            "activation_offload.path": str(folder),
            "activation_offload.capacity_bytes": 64 << 20,
            "activation_offload.min_tensor_bytes": 1024,
            # The limit of writes per day counts on a drive of this size.
            "activation_offload.drive_bytes": 1 << 60,
        }
    return changes


@pytest.mark.quick("llama-7b-pretrain-offload")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in EXPECTED]
)
def test_it_trains_at_a_small_size(name: str, inputs: Path, corpus: Path, tmp_path: Path) -> None:
    expected, config = EXPECTED[name], load_config(path_of(name))
    changes = shrunk(config, inputs, corpus, tmp_path)
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    words = [word for override in overrides for word in ("--set", override)]
    result = run("train", str(path_of(name)), *words, ranks=expected.ranks)
    assert result.returncode == 0, result.stdout + result.stderr

    found = losses(tmp_path / "run")
    assert sorted(found) == list(range(1, STEPS + 1))
    assert all(math.isfinite(loss) for loss in found.values())
    # Untrained, all tokens are about equally likely; the folder's weights are anything but.
    if expected.starts_from_folder:
        assert found[1] > math.log(VOCAB_SIZE) + 1
    else:
        assert found[1] == pytest.approx(math.log(VOCAB_SIZE), abs=0.3)

    resolved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert flatten(resolved["config"]) == flatten(config.raw) | {k: json.dumps(value) for k, value in changes.items()}
    assert resolved["gradient_accumulation_steps"] == 16 // (2 * expected.ranks)
    assert resolved["model"]["dtype"] == "bfloat16"

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["world_size"] == expected.ranks
    assert summary["zero_stage"] == expected.stage
    assert summary["steps"] == STEPS
    parameters, nbytes = summary["parameters"], summary["bytes"]
    assert parameters["frozen"] == 2 * (4 * 64 * 64 + 3 * 64 * 176)
    assert parameters["compact"] == config.raw["optimizer"]["params"]["density"] * parameters["frozen"]
    assert nbytes["reduced_per_step"] < nbytes["reduced_per_step_dense"]
    # The formula of docs/8gpu.md, and what says which columns are chosen: of 2 layers 6 inputs of 64 and one of 176.
    density = parameters["compact"] / parameters["frozen"]
    indices = 2 * 8 * density * (6 * 64 + 176)
    states = 12 * (parameters["dense"] + parameters["compact"]) / expected.ranks
    assert nbytes["optimizer_state"] == pytest.approx(states + indices, rel=0.01)
    assert nbytes.get("offload_written", 0) > 0 if expected.offloads else "offload_written" not in nbytes
    if expected.offloads:
        # The inputs of two layers per micro-batch, in bf16, and the angles of the positions: two tensors of a page.
        inputs_of_layers = 2 * (2 * 2 * LENGTH * 64) + 2 * 4096
        assert nbytes["offload_written"] <= resolved["gradient_accumulation_steps"] * inputs_of_layers
        assert nbytes["offload_read"] <= nbytes["offload_written"]


@pytest.mark.parametrize("name", EXPECTED)
def test_it_holds_for_eight_gpus(name: str) -> None:
    expected, config = EXPECTED[name], load_config(path_of(name))
    batches = config.batches(8)
    assert batches.total == 8 * batches.micro * batches.accumulation_steps
    assert config.zero_stage == expected.stage
    assert config.bf16
    assert config.raw["optimizer"]["type"] == "Grass"
    assert (config.offload() is not None) == expected.offloads
    assert (folder_config(config) is not None) == expected.starts_from_folder
    assert config.parsed.data is not None
    assert config.parsed.model is not None
    assert config.parsed.logging is not None
    assert config.parsed.logging.run_dir == f"runs/{name}"
    length = config.parsed.data.sequence_length
    if expected.starts_from_folder:
        assert config.parsed.data.tokenizer == config.parsed.model.path
    described = folder_config(config) or model_config(config.parsed.model, vocab_size=32000, sequence_length=length)
    assert described.max_position_embeddings >= length


def test_launch_starts_the_same(call: Call) -> None:
    result = call("launch", "configs/8gpu/llama-7b-pretrain.json", "--set", "launch.processes_per_node=8", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "--standalone --nproc-per-node 8 " in result.stdout
    assert result.stdout.endswith(" -m narrowgauge.launcher train configs/8gpu/llama-7b-pretrain.json\n")


def test_every_file_is_tested_and_documented() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(EXPECTED)
    text = PAGE.read_text()
    for name in EXPECTED:
        file = f"configs/8gpu/{name}.json"
        assert f"torchrun --standalone --nproc_per_node 8 -m narrowgauge.launcher train {file}\n" in text
        assert f"narrowgauge launch {file}\n" in text


def rows(first_column: str) -> dict[str, list[str]]:
    """The rows of the page's table whose first heading this is, by their first column."""
    table = re.search(rf"^\| {first_column} \|.*\n\|[-:| ]+\n((?:\|.*\n)+)", PAGE.read_text(), re.MULTILINE)
    assert table is not None
    cells = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in table[1].splitlines()]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_the_table_of_memory_is_what_the_modules_give() -> None:
    """Rounded up to a tenth of a GiB; all fit into 80 GB with room for what the arithmetic leaves out."""
    found, written = {}, {}
    for name, expected in EXPECTED.items():
        config = load_config(path_of(name))
        memory = memory_of(config, world_size=8, described=folder_config(config))
        assert memory.total < 65 * GIB
        found[name] = memory.row()
        if expected.offloads:
            written[name] = f"{8 * config.batches(8).accumulation_steps * memory.offloadable / (1 << 40):.1f}"
    assert rows("GiB per GPU") == found
    assert dict(re.findall(r"`([\w-]+)` writes up to ([\d.]+) TiB", PAGE.read_text())) == written


@pytest.mark.quick("llama-1b-pretrain", "llama-13b-finetune")
@pytest.mark.parametrize("name", EXPECTED)
def test_the_bytes_per_token_are_what_the_page_says(name: str) -> None:
    """37 or 38 times the hidden size in a layer, 13 times the vocabulary in head and loss."""
    config = load_config(path_of(name))
    model = converted_model(config, folder_config(config))
    layer, head = layer_and_head(model, 2, 1024)
    assert round(layer.saved / (2 * 1024 * model.config.hidden_size)) in (37, 38)
    assert layer.saved < layer.peak < head.peak
    assert round(head.peak / (2 * 1024 * model.config.vocab_size)) == 13


@pytest.mark.parametrize("granularity", ["saved_tensors", "layer_inputs"])
def test_the_arithmetic_gives_what_a_forward_saves(granularity: Any, tmp_path: Path) -> None:
    """To the byte, on tensors that exist."""
    description = LlamaConfig(**TINY, dtype=torch.bfloat16)
    abstract = abstract_model(description)
    Grass(abstract, density=0.125)
    layer, head = layer_and_head(abstract, 2, LENGTH)
    # What is there before the layers: tokens, and the cosines and sines of their places.
    tokens, angles = 2 * LENGTH * 8, 2 * LENGTH * (64 // 4) * 2
    expected = tokens + head.saved
    expected += 2 * (2 * 2 * LENGTH * 64) if granularity == "layer_inputs" else angles + 2 * layer.saved

    model: Any = LlamaForCausalLM(description)
    model.to(torch.bfloat16)
    model.config.use_cache = False
    Grass(model, density=0.125)
    offload = ActivationOffload(
        str(tmp_path), model=model, granularity=granularity, keep_resident=0.0, min_tensor_bytes=0
    )
    batch = torch.arange(2 * LENGTH).reshape(2, LENGTH)
    with offload:
        loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    assert offload.stats().saved_peak == expected
    offload.close()
