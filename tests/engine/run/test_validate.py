"""``narrowgauge train --validate``: a run on many process ranks, checked in one process."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support import forked
from tests.support.command import ROOT

FOLDER = ROOT / "configs" / "megatron"


def validate(name: str, ranks: int, *more: str) -> tuple[int, str]:
    words = [part for change in more for part in ("--set", change)]
    result = forked.run("train", name, "--validate", "--world-size", str(ranks), *words, COLUMNS="200")
    return result.returncode, result.stdout + result.stderr


def rows(text: str) -> list[list[str]]:
    """The cells of the table's rows."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_a_model_of_7_billion_on_8_ranks() -> None:
    """Llama 7B has 6,738.4 million parameters: half on each of two ranks that share its matrices, but for the norms."""
    code, text = validate("megatron/llama-7b-8gpu", 8)
    assert code == 0, text
    ((ranks, what, millions, *sizes),) = rows(text)
    assert (ranks, what, millions) == ("0-7", "embedding, layers 0-31, head", "3,369.3")
    # 2 bytes each; 4; and of the four data-parallel ranks a quarter of 4 and of 8.
    assert sizes == ["6.28", "12.55", "3.14", "6.28", "28.24"]
    assert "1024 sequences per step, in 64 micro-batches of 4" in " ".join(text.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "millions"),
    [
        ("llama-13b-16gpu", 16, [3254.3]),
        ("llama-70b-64gpu", 64, [2172.2, 2139.4, 2139.4, 2172.2]),
        ("mixtral-8x7b-32gpu", 32, [3220.3, 3220.3]),
    ],
)
def test_packaged_configurations(name: str, ranks: int, millions: list[float]) -> None:
    code, text = validate(f"megatron/{name}", ranks)
    assert code == 0, text
    assert [float(row[2].replace(",", "")) for row in rows(text) if row[2]] == millions


def test_a_layout_that_does_not_fit() -> None:
    code, text = validate("megatron/llama-7b-8gpu", 8, "megatron.tensor_parallel=3")
    assert code == 2
    assert "tensor_parallel: expected tensor_parallel (3) x pipeline_parallel (1) to divide" in " ".join(text.split())


def test_other_engines_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    shutil.copyfile(ROOT / "configs" / "quickstart.json", path)
    code, text = validate(str(path), 4)
    assert code == 2
    assert "train_batch_size: expected at least 16, " in " ".join(text.split())
    code, text = validate(str(path), 2)
    assert code == 0, text
    assert "fits 2 process ranks: 8 sequences per step, in 1 micro-batches of 4" in " ".join(text.split())
    assert not rows(text)


def test_no_configuration_is_left_out() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {
        "llama-7b-8gpu",
        "llama-13b-16gpu",
        "llama-70b-64gpu",
        "mixtral-8x7b-32gpu",
    }
    for path in FOLDER.glob("*.json"):
        assert json.loads(path.read_text())["engine"] == "megatron"


def test_what_the_run_would_say_of_its_optimizer_and_schedule(tmp_path: Path) -> None:
    """A rank above every layer was found by the run alone, and so was a warm-up that never ends."""
    path = tmp_path / "config.json"
    shutil.copyfile(ROOT / "configs" / "quickstart.json", path)
    code, text = validate(str(path), 2, "training.lr_schedule.warmup_steps=1000000")
    assert code == 0, text
    assert "warmup_steps: 1000000 of " in text
    code, text = validate(str(path), 2, 'optimizer={"type": "GaLore", "params": {"rank": 100000}}')
    assert code == 2
    assert "optimizer.params.rank: 100000 is above the smaller dimension, " in " ".join(text.split())
