"""Two runs in one process."""

from pathlib import Path

import pytest

from tests.support.command import losses, tiny_config
from tests.support.forked import python

_TWICE = """
import sys
from narrowgauge.engine.run.train import train
for number in (0, 1):
    train(sys.argv[1], overrides=[f"logging.run_dir={sys.argv[2]}/{number}", "training.steps=2"])
"""


@pytest.mark.parametrize("engine", ["deepspeed", "ddp"])
def test_a_second_run_in_a_process_is_the_first_again(corpus: Path, tmp_path: Path, engine: str) -> None:
    """DeepSpeed kept the process group of the first run, which was destroyed: ``Group ... is not registered``."""
    config = tiny_config(corpus, tmp_path, engine=engine, zero_optimization={"stage": 0}, bf16={"enabled": False})
    done = python("-c", _TWICE, str(config), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "0") == losses(tmp_path / "1")
    assert len(losses(tmp_path / "0")) == 2
