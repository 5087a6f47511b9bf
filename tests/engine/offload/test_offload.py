"""Activation offload in an engine: bit for bit the same training, under every ZeRO stage, on two ranks."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowgauge.engine import initialize
from narrowgauge.engine.backends.deepspeed.extensions import ensure_extensions
from narrowgauge.engine.backends.deepspeed.subspace import own_shard
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.errors import UserError
from narrowgauge.offload import ActivationOffload, OffloadStats
from tests.support.models import tiny
from tests.support.ranks import RankPool
from tests.support.zero import ds_config, finish, make_engine, train_step

STEPS = 20
EVERYTHING = {"keep_resident": 0.0, "min_tensor_bytes": 0, "backend": "threads", "capacity_bytes": 64 << 20}


def train(config: dict[str, Any], offload: dict[str, Any] | None, steps: int = STEPS) -> dict[str, Any]:
    """Losses of ``steps`` steps, this rank's final parameters, and what was moved."""
    settings = config if offload is None else {**config, "activation_offload": offload}
    if "optimizer" in config and config["optimizer"]["type"] == "Grass":
        engine = make_engine(settings)
    else:
        engine, *_ = initialize(model=tiny(), config=settings)
    losses = [train_step(engine, step) for step in range(steps)]
    # A shard's padding is never written.
    shards = [own_shard(p)[0] if hasattr(p, "ds_tensor") else p for p in engine.module.parameters()]
    shards = [shard.detach().clone() for shard in shards]
    stats = settled(engine.activation_offload) if offload is not None else None
    finish(engine)
    return {"losses": losses, "shards": shards, "stats": stats}


def settled(offload: ActivationOffload) -> OffloadStats:
    """The counts once the lanes have noticed that what they were about to read is needed no more."""
    deadline = time.monotonic() + 60
    while offload.stats().saved and time.monotonic() < deadline:
        time.sleep(0.01)
    return offload.stats()


def compare(config: dict[str, Any], folder: str, **offload: Any) -> dict[str, Any]:
    plain = train(config, None)
    found = train(config, {**EVERYTHING, "path": folder, **offload})
    stats = found["stats"]
    return {
        "losses": plain["losses"] == found["losses"],
        "shards": all(map(torch.equal, plain["shards"], found["shards"])),
        "written": stats.written,
        "read": stats.read,
        "left": (stats.saved, stats.resident),
        "failed": stats.failed_writes + stats.full,
    }


GRASS = {
    f"zero{stage}-{side}": ds_config(stage, params={"side": side})
    for stage in (1, 2, 3)
    for side in ("columns", "rows")
}
DENSE = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{name: (config, {}) for name, config in GRASS.items()},
    **{f"zero{stage}-adamw": ({**ds_config(stage), **DENSE}, {}) for stage in (1, 2, 3)},
    "zero1-bf16": ({**ds_config(1), "bf16": {"enabled": True}}, {}),
    "zero3-layer-inputs": (ds_config(3), {"granularity": "layer_inputs"}),
    "zero2-adaptive": (ds_config(2), {"keep_resident": "auto"}),
}


QUICK = ("zero2-rows", "zero3-columns", "zero1-adamw", "zero2-adaptive")


@pytest.mark.quick("zero3-columns")
@pytest.mark.parametrize(
    ("config", "offload"),
    [pytest.param(*case, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, case in CASES.items()],
)
def test_losses_and_weights_are_bit_equal(
    config: dict[str, Any], offload: dict[str, Any], two_ranks: RankPool, tmp_path: Path
) -> None:
    """20 steps of two micro-batches. Only what is not asked for at once is read back from disk."""
    for found in two_ranks.run(compare, config, str(tmp_path), **offload):
        assert found["losses"]
        assert found["shards"]
        assert found["left"] == (0, 0)
        assert found["failed"] == 0
        assert found["written"] > (0 if offload.get("keep_resident") == "auto" else STEPS * 2 * 2048)
    assert not list(tmp_path.iterdir())


def nvme_config(stage: int, folder: str) -> dict[str, Any]:
    config = ds_config(stage, zero={"offload_optimizer": {"device": "nvme", "nvme_path": folder}})
    return {**config, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}, "aio": {"block_size": 4096}}


@pytest.mark.slow
def test_with_the_optimizer_on_nvme_too(two_ranks: RankPool, tmp_path: Path) -> None:
    """ZeRO-Infinity's swapper and ours on one disk at the same time."""
    if shutil.which("g++") is None or not Path("/usr/include/libaio.h").exists():
        pytest.skip("DeepSpeed's NVMe swapper needs a compiler and libaio-dev")
    config = nvme_config(3, str(tmp_path))
    # Minutes of compiling, which the ranks' time limit is not for.
    ensure_extensions(load_config(config), aio=True)
    for found in two_ranks.run(compare, config, str(tmp_path)):
        assert found["losses"]
        assert found["shards"]
        assert found["written"] > 0


def evaluate_and_destroy(folder: str) -> tuple[int, int, list[str]]:
    engine = make_engine({**ds_config(1), "activation_offload": {**EVERYTHING, "path": folder}})
    offload = engine.activation_offload
    engine.eval()
    with torch.no_grad():
        train_loss = engine(torch.zeros(4, 11, dtype=torch.int64))
    written = offload.stats().written
    finish(engine)
    try:
        with offload:
            pass
    except RuntimeError as error:
        return written, int(train_loss.requires_grad), [str(error)]
    return written, int(train_loss.requires_grad), []


def test_evaluation_stores_nothing_and_destroy_closes(one_rank: RankPool, tmp_path: Path) -> None:
    ((written, requires_grad, errors),) = one_rank.run(evaluate_and_destroy, str(tmp_path))
    assert (written, requires_grad) == (0, 0)
    assert errors == ["this ActivationOffload was closed"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"path": "/nowhere"}, "activation_offload.path: /nowhere: no such folder"),
        ({"path": "/proc/self/status"}, "activation_offload.path: /proc/self/status: not a folder"),
        ({"path": "{tmp}", "capacity_bytes": 1 << 60}, "more bytes free, got"),
        ({"path": "{tmp}", "backend": "gds"}, "activation_offload: backend: gds cannot be used"),
        ({}, "activation_offload.path: expected this key, got none"),
        ({"path": "{tmp}", "keep_resident": 1.5}, "activation_offload.keep_resident"),
        ({"path": "{tmp}", "granularty": "layers"}, "did you mean 'granularity'"),
        ({"path": "{tmp}", "buffer_bytes": 0}, "activation_offload.buffer_bytes"),
        ({"path": []}, "activation_offload.path"),
    ],
)
def test_bad_blocks_are_named(block: dict[str, Any], message: str, tmp_path: Path) -> None:
    if torch.cuda.is_available() and block.get("backend") == "gds":
        pytest.skip("a GPU is there")
    given = {key: value.format(tmp=tmp_path) if isinstance(value, str) else value for key, value in block.items()}
    with pytest.raises(UserError) as caught:
        initialize(model=tiny(), config={**ds_config(1), "activation_offload": given})
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_pipelines_and_deepcompile_are_refused(tmp_path: Path) -> None:
    config = {**ds_config(1), **DENSE, "activation_offload": {"path": str(tmp_path)}}
    with pytest.raises(UserError, match=r"compile\.deepcompile: does not work with activation_offload"):
        initialize(model=tiny(), config={**config, "compile": {"deepcompile": True}})
