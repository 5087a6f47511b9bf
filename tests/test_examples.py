"""The scripts of ``examples/`` run, and say what they promise."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support import forked
from tests.support.command import BIN, ROOT, environment, free_port

EXAMPLES = ROOT / "examples"


def output_of(words: list[str], folder: Path) -> str:
    env = environment(PATH=f"{BIN}:{environment()['PATH']}")
    done = subprocess.run(  # noqa: S603
        words, cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(pattern: str, printed: str) -> tuple[str, ...]:
    """The groups of a pattern that the output must hold."""
    match = re.search(pattern, printed)
    assert match is not None, printed
    return match.groups()


@pytest.mark.alone
def test_plain_pytorch_resumes_to_the_bit_and_offloads(tmp_path: Path) -> None:
    printed = output_of([sys.executable, str(EXAMPLES / "plain_pytorch.py"), str(tmp_path)], tmp_path)
    first, last, resumed = figures(r"loss (\S+) -> (\S+), resumed (\S+)", printed)
    assert float(last) < float(first)
    assert resumed == last
    written, share = figures(r"([\d,]+) bytes written, (\d+)% of", printed)
    assert int(written.replace(",", "")) > 1_000_000
    assert int(share) < 60


@pytest.mark.slow
def test_zero(tmp_path: Path) -> None:
    printed = output_of([sys.executable, str(EXAMPLES / "zero.py"), str(tmp_path / "saved")], tmp_path)
    first, last = figures(r"loss (\S+) -> (\S+) after 10 steps", printed)
    assert float(last) < float(first)


def losses_of_script(script: Path, config: Path, ranks: int) -> tuple[str, ...]:
    # What a launcher sets, which forks for several ranks do themselves.
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    words = (str(script), "--deepspeed", "--deepspeed_config", str(config))
    done = forked.python(*words, ranks=ranks, cwd=ROOT, **(single if ranks == 1 else {}))
    assert done.returncode == 0, done.stdout + done.stderr
    return figures(r"(?s)epoch 1: loss (\S+).*epoch 2: loss (\S+)", done.stdout)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_script_for_deepspeed_changes_its_import_and_nothing_else(tmp_path: Path, ranks: int) -> None:
    ours = EXAMPLES / "deepspeed_script.py"
    own = tmp_path / "script.py"
    own.write_text(ours.read_text().replace("from narrowgauge.integrations import deepspeed", "import deepspeed"))
    with_grass = EXAMPLES / "deepspeed_script.json"
    settings = json.loads(with_grass.read_text())
    with_adamw = tmp_path / "adamw.json"
    with_adamw.write_text(
        json.dumps({**settings, "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}}})
    )
    assert losses_of_script(ours, with_adamw, ranks) == losses_of_script(own, with_adamw, ranks)
    first, last = losses_of_script(ours, with_grass, ranks)
    assert float(last) < 0.8 * float(first)


# By script: the option that takes the place where it saves, and whether it takes a DeepSpeed file.
LIBRARIES = {
    "with_trainer": ("--output_dir", True),
    "with_sft_trainer": ("--output_dir", True),
    "with_accelerate": ("--save", False),
    "with_lightning": ("--save", False),
}


@pytest.mark.parametrize(
    ("name", "ranks", "stage"),
    [
        ("with_sft_trainer", 1, None),
        *(
            pytest.param(name, ranks, stage, marks=pytest.mark.slow)
            for name in LIBRARIES
            for ranks in (1, 2)
            for stage in (None, 0, 1, 2, 3)
            if (name, ranks, stage) != ("with_sft_trainer", 1, None) and (name, stage) != ("with_lightning", None)
        ),
    ],
)
def test_a_script_of_each_library(name: str, ranks: int, stage: int | None, tmp_path: Path) -> None:
    place, takes_file = LIBRARIES[name]
    words = [str(EXAMPLES / f"{name}.py"), place, str(tmp_path / "saved")]
    if stage is not None and takes_file:
        settings = json.loads((EXAMPLES / "trainer.json").read_text())
        settings["zero_optimization"]["stage"] = stage
        file = tmp_path / "deepspeed.json"
        file.write_text(json.dumps(settings))
        words += ["--deepspeed", str(file)]
    elif stage is not None:
        words += ["--stage", str(stage)]
    # By which Lightning knows torchrun.
    torchrun = {"TORCHELASTIC_RUN_ID": "examples"} if ranks > 1 else {}
    done = forked.python(*words, ranks=ranks, cwd=tmp_path, **torchrun)
    assert done.returncode == 0, done.stdout + done.stderr
    first, last = figures(r"loss (\S+) -> ([\d.]+)", done.stdout)
    assert float(last) < 0.5 * float(first)
    if takes_file:
        saved = load_file(tmp_path / "saved" / "model.safetensors")
        assert saved["model.layers.0.mlp.up_proj.weight"].shape == (128, 64)
        assert not any("compact" in key for key in saved)


@pytest.mark.slow
def test_train_export_generate(tmp_path: Path) -> None:
    words = [
        "/bin/bash",
        str(EXAMPLES / "train_export_generate.sh"),
        "--set",
        f'data.train=["{ROOT}/optimizers/**/*.py"]',
        "--set",
        f'data.validation=["{ROOT}/README.md"]',
    ]
    printed = output_of(words, tmp_path)
    assert (tmp_path / "runs" / "tiny" / "summary.json").is_file()
    (more,) = figures(r"(?s)def main\((.+)\Z", printed)
    assert more.strip()
