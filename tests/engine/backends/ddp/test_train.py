"""``narrowgauge train`` with the ``ddp`` engine: DeepSpeed's run without ZeRO, and DeepSpeed never imported."""

import inspect
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from deepspeed.ops.adam import FusedAdam

from narrowgauge.engine import initialize
from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.backends.ddp.build import build
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.errors import ConfigError
from tests.support import forked
from tests.support.command import BIN, ROOT, environment, losses, tiny_config
from tests.support.models import tiny
from tests.support.ranks import RankPool
from tests.support.zero import finish

# The command, where executing any of DeepSpeed's modules fails (others may look whether it is installed).
WITHOUT_DEEPSPEED = """
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec


class Refuse(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name.partition(".")[0] == "deepspeed" else None

    def exec_module(self, module):
        raise ImportError("deepspeed was imported")


sys.meta_path.insert(0, Refuse())
from narrowgauge.launcher.main import main

sys.exit(main())
"""


def test_a_run_without_deepspeed_has_the_losses_of_one_with_it(corpus: Path, tmp_path: Path) -> None:
    for name in ("ddp", "deepspeed"):
        (tmp_path / name).mkdir()
    config = tiny_config(corpus, tmp_path / "ddp", engine="ddp", zero_optimization={"stage": 0})
    script = tmp_path / "command.py"
    script.write_text(WITHOUT_DEEPSPEED)
    done = subprocess.run(  # noqa: S603
        [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", str(script), "train", str(config)],
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Grass at DDP on 2 ranks" in done.stdout.replace("\n", " ")
    config = tiny_config(corpus, tmp_path / "deepspeed", zero_optimization={"stage": 0})
    assert forked.run("train", str(config), ranks=2).returncode == 0
    found, expected = losses(tmp_path / "ddp" / "run"), losses(tmp_path / "deepspeed" / "run")
    assert len(found) == 12
    assert found == pytest.approx(expected, abs=1e-6)
    one, other = (json.loads((tmp_path / name / "run" / "summary.json").read_text()) for name in ("ddp", "deepspeed"))
    assert one["eval_loss"] == pytest.approx(other["eval_loss"], abs=1e-6)
    assert one["bytes"]["reduced_per_step"] == pytest.approx(other["bytes"]["reduced_per_step"], rel=0.01)
    assert one["bytes"]["optimizer_state"] == other["bytes"]["optimizer_state"]


def decays(params: dict[str, Any]) -> list[float]:
    """The weight decay of AdamW in the engines, DeepSpeed's first."""
    config = {"train_batch_size": 2, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, **params}}}
    engine, *_ = initialize(model=tiny(), config=config)
    found = [engine.optimizer.param_groups[0]["weight_decay"]]
    finish(engine)
    training = build(load_config({**config, "engine": "ddp"}), tiny(), schedule=None)
    return [*found, training.optimizer.param_groups[0]["weight_decay"]]


def own_decay() -> float:
    config = {"engine": "ddp", "train_batch_size": 1, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    return build(load_config(config), tiny(), schedule=None).optimizer.param_groups[0]["weight_decay"]


def test_adamw_has_the_weight_decay_of_deepspeeds(one_rank: RankPool) -> None:
    default = inspect.signature(FusedAdam).parameters["weight_decay"].default
    assert one_rank.run(own_decay) == [default] == [0]


# DeepSpeed compiles its own AdamW for a minute.
@pytest.mark.quick("params1-0.01")
@pytest.mark.parametrize(
    ("params", "expected"), [({}, 0.0), ({"torch_adam": True}, 0.01), ({"weight_decay": 0.2}, 0.2)]
)
def test_adamw_decays_as_under_deepspeed(one_rank: RankPool, params: dict[str, Any], expected: float) -> None:
    """Without ``weight_decay`` it was torch's 0.01, DeepSpeed's is 0."""
    assert one_rank.run(decays, params)[0] == [expected, expected]


def test_arguments_that_torch_refuses_are_named_before_there_is_a_process_group() -> None:
    """They were found when the process group was there; other engines name those of AdamW with the other keys."""
    config = load_config({"engine": "ddp", "train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": -1.0}}})
    with pytest.raises(ConfigError, match=r"optimizer\.params: Invalid learning rate: -1\.0"):
        backend_of("ddp").check(config)
