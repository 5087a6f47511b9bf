"""``narrowgauge train`` from the outside: alone, under torchrun and under deepspeed; then in forks."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from narrowgauge.engine.run.export import export_run
from tests.support import command, forked
from tests.support.cases import cases
from tests.support.command import losses, records, tiny_config, under_megatron

SUMMARY_KEYS = {
    "schema_version": int,
    "world_size": int,
    "zero_stage": int,
    "steps": int,
    "tokens": int,
    "tokens_per_second": float,
    "loss_first": float,
    "loss_last": float,
    "eval_loss": float,
    "parameters": {"total": int, "dense": int, "compact": int, "frozen": int},
    "bytes": dict.fromkeys(
        (
            "reduced_per_step",
            "gathered_per_step",
            "reduced_per_step_dense",
            "gathered_per_step_dense",
            "optimizer_state",
            "optimizer_state_dense",
            "peak_memory",
        ),
        int,
    ),
    "seconds": dict.fromkeys(("step_median", "forward", "backward", "optimizer"), float),
}


def check_schema(found: dict[str, Any], schema: dict[str, Any]) -> None:
    for key, kind in schema.items():
        if isinstance(kind, dict):
            check_schema(found[key], kind)
        else:
            assert isinstance(found[key], kind), key


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks, trained to the end."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_config(corpus, folder)
    result = forked.run("train", str(config), "--set", "training.sample_prompt=def ", ranks=2)
    assert result.returncode == 0, result.stderr
    assert "validation loss" in result.stdout
    assert "run folder" in result.stdout
    return folder


def test_a_run_leaves_its_traces(finished: Path) -> None:
    run_dir = finished / "run"
    summary = json.loads((run_dir / "summary.json").read_text())
    check_schema(summary, SUMMARY_KEYS)
    assert summary["world_size"] == 2
    assert summary["zero_stage"] == 1
    assert summary["tokens"] == 12 * 8 * 32
    assert summary["eval_loss"] < summary["eval_loss_first"] - 0.2
    if not torch.cuda.is_available():
        # The peak is of the process, most of it PyTorch.
        assert 1e8 < summary["bytes"]["resident_before_model"] < summary["bytes"]["peak_memory"]
    assert isinstance(summary["sample"], str)
    assert summary["sample"].startswith("def ")
    parameters = summary["parameters"]
    # width 32, hidden 48, grouped keys: 4 x 32x32 + 3 x 32x48 per block, a quarter of the columns of each compact
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    assert parameters["frozen"] == matrices
    assert parameters["compact"] == matrices // 4
    assert parameters["dense"] == 2 * 600 * 32 + 5 * 32
    assert parameters["total"] == matrices + parameters["dense"]
    assert summary["matrices"] == {"total": matrices, "compact": matrices, "share": 1.0, "dense": {}}
    trainable = 4 * (parameters["dense"] + parameters["compact"])
    assert summary["bytes"]["reduced_per_step"] == pytest.approx(trainable, rel=0.01)
    assert summary["bytes"]["gathered_per_step"] == pytest.approx(trainable / 2, rel=0.01)
    assert summary["bytes"]["reduced_per_step_dense"] == 4 * parameters["total"]
    assert summary["bytes"]["optimizer_state_dense"] == 12 * parameters["total"] // 2
    assert summary["bytes"]["optimizer_state"] == pytest.approx(3 * trainable / 2, rel=0.01)
    written = records(run_dir)
    assert [r["step"] for r in written if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in written if "eval_loss" in r] == [0, 4, 8, 12]
    assert all(r["lr_matrix"] == pytest.approx(0.2 * r["lr"]) for r in written if "loss" in r)
    assert list((run_dir / "tensorboard").iterdir())
    resolved = json.loads((run_dir / "config.json").read_text())
    assert resolved["train_micro_batch_size_per_gpu"] == 2
    assert resolved["resolved"]["training"]["keep_checkpoints"] == 2
    assert resolved["resolved"]["zero_allow_untested_optimizer"] is True
    assert resolved["resolved"]["zero_force_ds_cpu_optimizer"] is False
    assert not any(r["skipped"] for r in written if "loss" in r)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step-12", "step-8"]


def test_tensorboard_holds_the_same_numbers(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "run" / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx(losses(finished / "run"), rel=1e-6)


def test_a_finished_run_shows_its_summary_at_once(finished: Path) -> None:
    begin = os.times()
    config = str(finished / "config.json")
    result = command.run("train", config, "--set", "training.sample_prompt=def ", ranks=2)
    spent = os.times()
    assert spent.children_user - begin.children_user < 20  # seconds of CPU, of a launcher and two ranks
    assert result.returncode == 0
    assert "holds this run, finished" in result.stdout
    assert "optimizer state, per rank" in result.stdout
    assert len(losses(finished / "run")) == 12


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "launcher"), [(1, "none"), (2, "deepspeed")])
def test_other_launchers_give_the_same_run(finished: Path, tmp_path: Path, ranks: int, launcher: str) -> None:
    config = str(finished / "config.json")
    result = command.run("train", config, "--set", f"logging.run_dir={tmp_path}/run", ranks=ranks, launcher=launcher)
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(finished / "run"), abs=5e-6)


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_every_zero_stage_gives_the_same_run(finished: Path, tmp_path: Path, stage: int) -> None:
    changes = [f"logging.run_dir={tmp_path}/run", f"zero_optimization.stage={stage}"]
    result = forked.run(
        "train", str(finished / "config.json"), *(word for c in changes for word in ("--set", c)), ranks=2
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(finished / "run"), abs=5e-6)


BF16 = {"bf16": {"enabled": True}}
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 0.005, "torch_adam": True}}}
KILLED: dict[str, tuple[dict[str, Any]]] = {
    "Grass-bf16": (BF16,),
    "Grass-fp32": ({},),
    "AdamW-bf16": ({**BF16, **ADAMW},),
    "megatron-TP2": (under_megatron(tensor_parallel=2, sequence_parallel=True),),
    "megatron-PP2-bf16": ({**under_megatron(pipeline_parallel=2), **BF16},),
}


@pytest.mark.parametrize("changes", cases(KILLED, slow=["Grass-fp32", "AdamW-bf16", "megatron-PP2-bf16"]))
def test_a_killed_run_resumes_bit_equal(corpus: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """SIGKILL to everything in the middle of a step; the next start goes on from the last checkpoint."""
    config = str(tiny_config(corpus, tmp_path, **changes))
    more = [
        "--set",
        "training.steps=20",
        "--set",
        "training.eval_interval=10",
        "--set",
        "training.keep_checkpoints=100",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = forked.start("train", config, *more, "--set", f"logging.run_dir={cut}", ranks=2)
    deadline = time.monotonic() + 400
    while not any(step >= 9 for step in losses(cut)):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    reached = max(losses(cut))
    assert 9 <= reached < 20
    result = forked.run("train", config, *more, "--set", f"logging.run_dir={cut}", ranks=2)
    assert result.returncode == 0, result.stderr
    assert "resumed after step" in result.stdout
    expected = forked.run("train", config, *more, "--set", f"logging.run_dir={whole}", ranks=2)
    assert expected.returncode == 0, expected.stderr
    assert losses(cut) == losses(whole)
    evaluations = [[(r["step"], r["eval_loss"]) for r in records(d) if "eval_loss" in r] for d in (cut, whole)]
    assert evaluations[0] == evaluations[1]


def test_a_run_goes_on_with_another_number_of_ranks_and_longer(finished: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished / "run", tmp_path / "run")
    words = ["--set", f"logging.run_dir={tmp_path}/run", "--set", "training.sample_prompt=def "]
    result = forked.run("train", str(finished / "config.json"), *words, "--set", "training.steps=16")
    assert result.returncode == 0, result.stderr
    assert "resumed after step 12" in result.stdout
    assert sorted(losses(tmp_path / "run")) == list(range(1, 17))
    # The schedule is that of sixteen steps from the thirteenth on: cosine after two of warm-up.
    rates = [r["lr"] for r in records(tmp_path / "run") if "loss" in r and r["step"] > 12]
    assert rates == pytest.approx([0.0025 * (1 + math.cos(math.pi * (step - 3) / 14)) for step in range(13, 17)])


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def test_missing_summary_and_damaged_checkpoint(finished: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    # Killed between the last checkpoint and the summary: nothing is left to train, the summary is written. What the
    # checkpoint has replaced is not deleted yet.
    newest = tmp_path / "run" / "checkpoints" / "step-12"
    shutil.copytree(newest, newest.with_name("step-12.old"))
    flip_last_byte(newest / "model.safetensors")
    assert export_run(tmp_path / "run", tmp_path / "exported") == newest.with_name("step-12.old")
    words = ["--set", f"logging.run_dir={tmp_path}/run", "--set", "training.keep_checkpoints=3"]
    again = forked.run("train", str(finished / "config.json"), *words)
    assert again.returncode == 0, again.stderr
    assert "resumed after step 12 from" in again.stdout
    shutil.rmtree(newest)
    newest.with_name("step-12.old").rename(newest)
    summaries = [json.loads((d / "run" / "summary.json").read_text()) for d in (finished, tmp_path)]
    assert summaries[0]["eval_loss"] == summaries[1]["eval_loss"]
    assert summaries[0]["seconds"] == summaries[1]["seconds"]
    assert summaries[0]["bytes"]["reduced_per_step"] == summaries[1]["bytes"]["reduced_per_step"]
    (tmp_path / "run" / "summary.json").unlink()
    flip_last_byte(newest / "model.safetensors")
    result = forked.run("train", str(finished / "config.json"), "--set", f"logging.run_dir={tmp_path}/run", ranks=2)
    assert result.returncode == 0, result.stderr
    assert "model.safetensors: damaged" in result.stdout.replace("\n", "")
    assert "resumed after step 8" in result.stdout
    assert losses(tmp_path / "run") == losses(finished / "run")


def test_fresh_starts_over_beside(finished: Path) -> None:
    config = str(finished / "config.json")
    result = forked.run("train", config, "--fresh", "--set", "training.steps=2", ranks=2)
    assert result.returncode == 0, result.stderr
    assert sorted(losses(finished / "run-2")) == [1, 2]
    assert len(losses(finished / "run")) == 12


def build_from_checkpoint(checkpoint: Path, config: Path) -> Any:
    """The model with a checkpoint's weights, without what export does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config))
    model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=True)
    return model.eval()


def test_export_gives_identical_logits(finished: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "exported"
    result = forked.run("export", str(finished / "run"), str(folder))
    assert result.returncode == 0, result.stderr
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 600
    validation = json.loads((finished / "run" / "summary.json").read_text())["eval_loss"]
    from narrowgauge.engine.config.config import load_config
    from narrowgauge.engine.data.packed import PackedTokens
    from narrowgauge.engine.data.prepare import prepare_data

    block = load_config(finished / "config.json").parsed.data
    assert block is not None
    data = PackedTokens(prepare_data(block).validation, 32, 600)
    batch = torch.stack([data[i] for i in range(5)])
    saved = build_from_checkpoint(finished / "run" / "checkpoints" / "step-12", folder)
    with torch.no_grad():
        assert torch.equal(model(input_ids=batch).logits, saved(input_ids=batch).logits)
        assert float(model(input_ids=batch, labels=batch).loss) == pytest.approx(validation, abs=1e-6)
    again = forked.run("export", str(finished / "run"), str(folder))
    assert again.returncode == 2
    assert "already exists and is not an empty folder" in again.stderr
    missing = forked.run("export", str(finished / "run"), str(tmp_path / "x"), "--step", "5")
    assert missing.returncode == 2
    assert "no checkpoint of step 5; there are [8, 12]" in missing.stderr


def test_a_hugging_face_folder_is_trained_on_from_its_weights(finished: Path, corpus: Path, tmp_path: Path) -> None:
    """Export, then continue from the folder at ZeRO-3 with checkpointing: the first loss is the trained model's."""
    assert forked.run("export", str(finished / "run"), str(tmp_path / "hf")).returncode == 0
    config = json.loads(tiny_config(corpus, tmp_path, zero_optimization={"stage": 3}).read_text())
    config["model"] = {"path": str(tmp_path / "hf"), "gradient_checkpointing": "non-reentrant"}
    config["data"]["tokenizer"] = str(tmp_path / "hf")
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = forked.run("train", str(tmp_path / "config.json"), "--set", "training.steps=2", ranks=2)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    trained = json.loads((finished / "run" / "summary.json").read_text())
    assert summary["eval_loss_first"] == pytest.approx(trained["eval_loss"], abs=1e-5)
    # The tokenizer's folder is the old model's: exporting once took its weights for the new ones'.
    assert not list((tmp_path / "run" / "tokenizer").glob("*.safetensors"))
    assert forked.run("export", str(tmp_path / "run"), str(tmp_path / "hf2")).returncode == 0
    exported = load_file(tmp_path / "hf2" / "model.safetensors")
    checkpoint = load_file(tmp_path / "run" / "checkpoints" / "step-2" / "model.safetensors")
    first = load_file(tmp_path / "hf" / "model.safetensors")
    assert exported.keys() == checkpoint.keys()
    assert all(torch.equal(exported[name], checkpoint[name]) for name in checkpoint)
    assert not torch.equal(exported["lm_head.weight"], first["lm_head.weight"])


@pytest.mark.slow
def test_a_run_from_transformers_own_first_weights(corpus: Path, tmp_path: Path) -> None:
    """From the seed at ZeRO-3, or from a folder that transformers has drawn and saved: the same batches and losses."""
    found = []
    for name in ("seed", "folder"):
        (tmp_path / name).mkdir()
        config = json.loads(tiny_config(corpus, tmp_path / name, zero_optimization={"stage": 3}).read_text())
        config["model"]["config"]["vocab_size"] = 600
        config["training"] |= {"steps": 3, "seed": 11}
        if name == "folder":
            torch.manual_seed(11)
            settings = config.pop("model")["config"]
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
            model.save_pretrained(tmp_path / "hf")
            config["model"] = {"path": str(tmp_path / "hf")}
        else:
            config["model"]["initial_weights"] = "transformers"
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        result = forked.run("train", str(tmp_path / name / "config.json"), ranks=2)
        assert result.returncode == 0, result.stderr
        found.append(losses(tmp_path / name / "run"))
    assert found[0] == found[1]


def test_megatron_files_are_trained_on(corpus: Path, tmp_path: Path) -> None:
    from narrowgauge.engine.data.tokens import write_tokens

    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(500, (200,), generator=generator).tolist() for _ in range(40)]
    write_tokens(tmp_path / "tokens", documents, vocab_size=500)
    config = json.loads(tiny_config(corpus, tmp_path).read_text())
    config["data"] = {"train": [str(tmp_path / "tokens")], "sequence_length": 32, "cache_dir": str(tmp_path / "cache")}
    config["model"]["config"]["vocab_size"] = 500
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = forked.run("train", str(tmp_path / "config.json"), "--set", "training.steps=3")
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path / "run")) == 3


def test_a_run_folder_belongs_to_one_run_at_a_time(corpus: Path, tmp_path: Path) -> None:
    """Ranks that outlive a killed launcher would otherwise write into the folder of the run that replaced it."""
    config = str(tiny_config(corpus, tmp_path))
    process = forked.start("train", config, "--set", "training.steps=100000")
    deadline = time.monotonic() + 400
    while not losses(tmp_path / "run"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    result = forked.run("train", config, "--set", "training.steps=100000")
    process.kill()
    assert result.returncode == 2
    assert "run is in use by another run: process" in result.stderr
    shorter = forked.run("train", config)
    assert shorter.returncode == 2
    assert "training.steps: expected at least the" in shorter.stderr
    assert "--fresh" in shorter.stderr
