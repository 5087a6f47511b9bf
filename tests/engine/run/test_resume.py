"""What a run makes of a folder in which something is missing, and what an export makes of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowgauge.engine.backends.deepspeed.training import DeepSpeedTraining
from narrowgauge.engine.errors import CheckpointError, UserError
from narrowgauge.engine.run.export import export_run
from narrowgauge.engine.run.sample import try_sample
from tests.support.command import records, tiny_config
from tests.support.forked import python, run
from tests.support.ranks import RankPool
from tests.support.zero import ds_config, finish, make_engine


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps with checkpoints after 4 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    result = run("train", str(tiny_config(corpus, folder)), "--set", "training.steps=8")
    assert result.returncode == 0, result.stderr
    return folder


def copy(finished: Path, folder: Path) -> tuple[Path, list[str]]:
    """A copy of the run folder, and the words that train it two steps longer."""
    shutil.copytree(finished / "run", folder / "run")
    words = ["--set", f"logging.run_dir={folder}/run", "--set", "training.steps=10"]
    return folder / "run", ["train", str(finished / "config.json"), *words]


def test_a_run_none_of_whose_checkpoints_holds_does_not_start_over(finished: Path, tmp_path: Path) -> None:
    """With all manifests gone it started over without a word, and cut the records of what was trained."""
    run_dir, words = copy(finished, tmp_path)
    before = records(run_dir)
    for manifest in run_dir.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    result = run(*words)
    assert result.returncode == 2
    assert "step-4: not a whole checkpoint: manifest.json" in result.stderr
    assert records(run_dir) == before
    shutil.rmtree(run_dir / "checkpoints")
    again = run(*words, "--set", "training.steps=2")
    assert again.returncode == 0, again.stderr
    said = " ".join(again.stdout.split())
    assert "no checkpoint; the run starts over, and the records of 8 steps in metrics.jsonl are dropped" in said


def test_a_checkpoint_under_another_steps_name_is_not_gone_on_from(finished: Path, tmp_path: Path) -> None:
    """The weights of step 4 were trained on from step 8, and exported as those of step 8."""
    run_dir, words = copy(finished, tmp_path)
    shutil.rmtree(run_dir / "checkpoints" / "step-8")
    shutil.copytree(run_dir / "checkpoints" / "step-4", run_dir / "checkpoints" / "step-8")
    with pytest.raises(CheckpointError, match="step-8: expected the checkpoint of step 8, got that of step 4"):
        export_run(run_dir, tmp_path / "out")
    result = run(*words, "--set", "training.steps=9")
    assert result.returncode == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert f"got that of step 4; trying {run_dir}/checkpoints/step-4" in said.replace("- ", "-").replace(" -", "-")
    assert "resumed after step 4" in said


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=torch.arange(32)[None]).logits


def test_an_export_does_not_trust_the_run_folders_model(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A changed rope_theta or number of heads in ``config.json`` gave a model with other logits, without a word."""
    run_dir, _ = copy(finished, tmp_path)
    export_run(run_dir, tmp_path / "before")
    resolved = json.loads((run_dir / "config.json").read_text())
    resolved["model"]["num_attention_heads"] = resolved["model"]["num_key_value_heads"] = 2
    resolved["model"]["head_dim"] = 16
    (run_dir / "config.json").write_text(json.dumps(resolved))
    with caplog.at_level("WARNING", logger="narrowgauge"):
        export_run(run_dir, tmp_path / "after")
    assert "not the model that was trained (head_dim, num_attention_heads, num_key_value_heads)" in caplog.text
    assert torch.equal(logits(tmp_path / "after"), logits(tmp_path / "before"))
    (run_dir / "config.json").write_text("[" * 100_000)
    export_run(run_dir, tmp_path / "without")
    assert torch.equal(logits(tmp_path / "without"), logits(tmp_path / "before"))


def test_an_export_of_a_damaged_checkpoint_is_refused(finished: Path, tmp_path: Path) -> None:
    run_dir, _ = copy(finished, tmp_path)
    (run_dir / "checkpoints" / "step-8" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="step-8: not a whole checkpoint"):
        export_run(run_dir, tmp_path / "out")
    with pytest.raises(UserError, match=r"no checkpoint of step 5; there are \[4, 8\]"):
        export_run(run_dir, tmp_path / "out", step=5)
    export_run(run_dir, tmp_path / "out", step=4)


def test_an_export_of_another_tokenizer_is_refused(finished: Path, tmp_path: Path) -> None:
    """A flipped bit in the run folder's tokenizer was exported beside the checked weights."""
    run_dir, _ = copy(finished, tmp_path)
    path = run_dir / "tokenizer" / "tokenizer.json"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(UserError, match=r"tokenizer\.json: expected the file that the run has written, "):
            export_run(run_dir, tmp_path / "out")
        path.unlink(missing_ok=True)


def sample_of_a_model_that_cannot_generate() -> tuple[str | None, bool]:
    engine = make_engine(ds_config(1))
    found = try_sample(DeepSpeedTraining(engine), Path("/nowhere"), "def ", 4, 0)
    is_training = engine.module.training
    finish(engine)
    return found, is_training


def test_a_sample_that_fails_does_not_end_a_run(one_rank: RankPool) -> None:
    """The run ended without its summary after all its steps, and so did every start after that."""
    assert one_rank.run(sample_of_a_model_that_cannot_generate) == [(None, True)]


FAILING = """
import os, sys
from narrowgauge.engine.backends.deepspeed.training import DeepSpeedTraining
from narrowgauge.launcher.main import main

where, ranks, generate = sys.argv.pop(), sys.argv.pop().split(","), DeepSpeedTraining.generate

def fail_later(*args):
    calls.append(1)
    if len(calls) == 3:
        raise IndexError("no such token")
    return args[-1]

calls = []

def fails(self, *args, **kwargs):
    if os.environ["RANK"] in ranks:
        if where == "before":
            raise IndexError("no such token")
        if where == "between":
            kwargs["logits_processor"] = [fail_later]
        else:
            self.module.model.layers[0].mlp.register_forward_pre_hook(fail_later)
    return generate(self, *args, **kwargs)

DeepSpeedTraining.generate = fails
main()
"""


@pytest.mark.parametrize(
    ("stage", "ranks", "where"),
    [
        (1, "0", "before"),
        (3, "0,1", "before"),
        (3, "1", "before"),
        (3, "0", "between"),
        (3, "1", "between"),
        (3, "0,1", "within"),
        (3, "1", "within"),
    ],
)
@pytest.mark.quick("3-1-between")
def test_a_sample_that_fails_on_some_ranks_leaves_a_complete_run(
    corpus: Path, tmp_path: Path, stage: int, ranks: str, where: str
) -> None:
    """At ZeRO-3 one rank that failed went on to another collective than the others, which waited for it."""
    (tmp_path / "failing.py").write_text(FAILING)
    # By default parameters as small as these are gathered once, or ahead.
    each = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    zero = {"stage": stage, **(each if stage == 3 else {})}
    config = str(tiny_config(corpus, tmp_path, zero_optimization=zero))
    words = ["train", config, "--set", "training.steps=2", "--set", "training.sample_prompt=def "]
    result = python(str(tmp_path / "failing.py"), *words, ranks, where, ranks=2)
    # Within a forward the others are in its collectives, which nothing ends but the processes' end.
    assert (result.returncode != 0) == (where == "within" and ranks == "1"), result.stderr
    told = (result.stdout + result.stderr).replace("\n", " ")
    of_rank = "process rank 1: " if ranks == "1" and where != "within" else ""
    assert f"training.sample_prompt: no sample: {of_rank}IndexError: no such token" in told
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["sample"]) == (2, None)
    again = run(*words, ranks=2)
    assert again.returncode == 0, again.stderr
    # A warning is a line, without the place in the code.
    text = "training.lr_schedule.warmup_steps: 2 of 2 steps, the full learning rate is never reached"
    assert f"warning: {text}" in result.stderr.splitlines()
    assert not [line for line in result.stderr.splitlines() if "Warning" in line]
