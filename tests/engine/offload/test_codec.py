"""Rounded activations in an engine: the same draws in all of them, and in a run that goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from narrowgauge.engine import initialize
from narrowgauge.offload import ActivationOffload
from tests.support import forked
from tests.support.command import losses, tiny_config
from tests.support.models import tiny, token_batch
from tests.support.ranks import RankPool
from tests.support.zero import ACCUMULATION, ds_config, finish, train_step

STEPS, CODEC = 6, {"path": None, "codec": "mesa8", "min_tensor_bytes": 0}
ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True, "weight_decay": 0.0}}


def config_of(stage: int, *, codec: bool) -> dict[str, Any]:
    config = {**ds_config(stage), "optimizer": ADAMW, "gradient_clipping": 0.0}
    return {**config, "activation_offload": CODEC} if codec else config


def own_loop() -> list[float]:
    """Plain PyTorch on this rank's part of each batch; gradients are averaged by hand."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    offload = ActivationOffload(None, model=model, codec="mesa8", min_tensor_bytes=0)
    found = []
    for step in range(STEPS):
        total = 0.0
        for micro_batch in token_batch(step, 8).chunk(ACCUMULATION):
            with offload:
                loss = model(micro_batch.chunk(dist.get_world_size())[dist.get_rank()])
            (loss / ACCUMULATION).backward()
            mean = loss.detach().double()
            dist.all_reduce(mean)
            total += float(mean) / dist.get_world_size() / ACCUMULATION
        for parameter in model.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    offload.close()
    return found


def in_engine(stage: int, *, codec: bool = True) -> list[float]:
    engine, *_ = initialize(model=tiny(), config=config_of(stage, codec=codec))
    found = [train_step(engine, step) for step in range(STEPS)]
    finish(engine)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_engines_round_as_a_plain_loop_with_the_same_draws(two_ranks: RankPool, stage: int) -> None:
    """At ZeRO-3 each module has its own view of a shared input, encoded on its own: other draws."""
    expected, found = two_ranks.run(own_loop)[0], two_ranks.run(in_engine, stage)[0]
    assert found == pytest.approx(expected, abs=2e-5 if stage < 3 else 0.05)
    exact = two_ranks.run(in_engine, stage, codec=False)[0]
    assert found[0] == pytest.approx(exact[0], abs=1e-6)
    assert found != exact
    assert found == pytest.approx(exact, abs=0.05)


def whole_and_cut(corpus: Path, folder: Path, model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The summary of a run on two ranks of which one that was stopped and went on has the losses, bit for bit."""
    paths = []
    for name in ("whole", "cut"):
        (folder / name).mkdir()
        paths.append(tiny_config(corpus, folder / name, **changes))
        config = json.loads(paths[-1].read_text())
        config["training"]["lr_schedule"] = {"type": "constant"}
        config["model"] |= model
        paths[-1].write_text(json.dumps(config))
    for path, *words in ((paths[0],), (paths[1], "--set", "training.steps=8"), (paths[1],)):
        result = forked.run("train", str(path), *words, ranks=2)
        assert result.returncode == 0, result.stderr
    expected, found = losses(folder / "whole" / "run"), losses(folder / "cut" / "run")
    assert len(found) == 12
    assert found == expected
    return json.loads((folder / "whole" / "run" / "summary.json").read_text())


@pytest.mark.parametrize("engine", ["deepspeed", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_run_goes_on_bit_for_bit(corpus: Path, tmp_path: Path, engine: str) -> None:
    """Ranges and draws of each of two ranks are in its checkpoints."""
    changes = {"engine": engine, "activation_offload": {**CODEC, "min_tensor_bytes": 1024}}
    if engine == "ddp":
        changes["zero_optimization"] = {"stage": 0}
    summary = whole_and_cut(corpus, tmp_path, {}, **changes)
    assert summary["activation_offload"]["codec"] == "mesa8"
    assert summary["activation_offload"]["backend"] == "memory"
    assert summary["bytes"]["encoded_to"] < 0.3 * summary["bytes"]["encoded_from"]
    assert summary["bytes"]["offload_written"] == 0


LAYER_INPUTS = {"granularity": "layer_inputs"}
NAMED = {"codec_modules": ["model", "model.layers.*"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"), [("non-reentrant", NAMED), ("reentrant", NAMED), ("none", LAYER_INPUTS)], ids=str
)
def test_a_run_that_recomputes_from_rounded_inputs_goes_on_bit_for_bit(
    corpus: Path, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    """Of each layer its input is encoded, and nothing else; losses stay near those of exact inputs."""
    changes = {"activation_offload": {**CODEC, **options}}
    summary = whole_and_cut(corpus, tmp_path, {"gradient_checkpointing": kind}, **changes)
    layers, tokens, width = 2, 4 * 32, 32
    # A step of one process rank.
    assert summary["bytes"]["encoded_from"] == layers * tokens * width * 4
    (tmp_path / "exact").mkdir()
    path = tiny_config(corpus, tmp_path / "exact")
    constant = 'training.lr_schedule={"type": "constant"}'
    assert forked.run("train", str(path), "--set", constant, ranks=2).returncode == 0
    exact, found = losses(tmp_path / "exact" / "run"), losses(tmp_path / "whole" / "run")
    assert found[1] == exact[1]
    assert found[12] != exact[12]
    assert found[12] == pytest.approx(exact[12], abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_offload": {"path": None}}, "activation_offload: path: expected a folder without a codec"),
        (
            {"activation_offload": {**CODEC, "codec_modules": ["*.mpl"]}},
            "activation_offload.codec_modules: '*.mpl' matches no module",
        ),
        ({"activation_offload": {**CODEC, "keep_resident": 0.0}}, "keep_resident: is about the disk"),
        ({"activation_offload": {**CODEC, "codec": "mesa9"}}, "activation_offload.codec: expected one of"),
        (
            {"activation_offload": CODEC, "quantization": {"method": "bitnet"}},
            "activation_offload.codec: expected 'none' with quantization, got 'mesa8'",
        ),
    ],
)
def test_bad_blocks_are_named_before_anything_starts(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tiny_config(corpus, tmp_path, engine="ddp", zero_optimization={"stage": 0}, **changes)
    result = forked.run("train", str(path))
    assert result.returncode == 2
    assert message in result.stderr.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_recomputed_layers_need_to_be_named(corpus: Path, tmp_path: Path) -> None:
    path = tiny_config(corpus, tmp_path, activation_offload=CODEC)
    config = json.loads(path.read_text())
    config["model"]["gradient_checkpointing"] = "non-reentrant"
    path.write_text(json.dumps(config))
    result = forked.run("train", str(path))
    assert result.returncode == 2
    assert "expected granularity 'layer_inputs', or codec_modules" in result.stderr.replace("\n", " ")
