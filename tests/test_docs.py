"""The examples of the README and of ``docs/`` are run as they stand."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from narrowgauge.engine.config.config import load_config
from tests.support import forked
from tests.support.command import BIN, ROOT, environment

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md"]
OTHERS += [ROOT / "benchmarks" / "results" / "README.md", *sorted((ROOT / "docs" / "decisions").glob("*.md"))]


# Runs of narrowgauge train, of which other tests have many.
SLOW = {"train.md-1", "megatron.md-1", "watch.md-1"}


def examples(heading: str) -> list[object]:
    """The fenced blocks that begin with ``heading``, each named by page and number."""
    found = []
    for page in PAGES:
        blocks = re.findall(rf"^```{heading}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        for number, block in enumerate(blocks, 1):
            name = f"{page.name}-{number}"
            found.append(pytest.param(block, id=name, marks=[pytest.mark.slow] * (name in SLOW)))
    return found


def check(words: list[str], folder: Path) -> str:
    """What it prints."""
    path = f"{BIN}:{environment()['PATH']}"
    result = subprocess.run(  # noqa: S603
        words, cwd=folder, env=environment(PATH=path), capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("block", examples("python"))
def test_python(block: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(block)
    result = forked.python("example.py", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("block", examples("bash run"))
def test_command(block: str, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    check(["/bin/bash", "-euc", block], tmp_path)


@pytest.mark.parametrize("block", examples("json"))
def test_configuration(block: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(block)
    assert load_config(path).parsed.model is not None


@pytest.mark.slow
def test_the_whole_fine_tuning(tmp_path: Path) -> None:
    """The page's blocks in turn, with fewer steps and after a quickstart of four."""
    (tmp_path / "start.json").write_text((ROOT / "configs" / "quickstart.json").read_text())
    changes = ["training.steps=4", "data.sequence_length=32", "training.eval_sequences=8", "training.sample_tokens=4"]
    words = [word for change in [*changes, "bf16.enabled=false"] for word in ("--set", change)]
    check([str(BIN / "narrowgauge"), "train", "start.json", *words], tmp_path)
    blocks = re.findall(r"^```(bash|python|json)\n(.*?)^```", (ROOT / "docs" / "finetune.md").read_text(), re.M | re.S)
    assert [kind for kind, _ in blocks] == ["bash", "python", "json", "bash", "bash", "bash"]
    printed = ""
    for kind, block in blocks:
        if kind == "json":
            assert '"steps": 150' in block
            (tmp_path / "tune.json").write_text(block.replace('"steps": 150', '"steps": 40'))
        elif kind == "python":
            check([sys.executable, "-c", block], tmp_path)
        else:
            printed = check(["/bin/bash", "-euc", block.replace("narrowgauge train quickstart\n", "")], tmp_path)
    summary = json.loads((tmp_path / "runs" / "parity" / "summary.json").read_text())
    assert summary["eval_loss"] < 0.5 * summary["eval_loss_first"]
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert base.keys() == merged.keys()
    changed = {name for name, value in merged.items() if not value.equal(base[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}
    assert [line.startswith("Is ") for line in printed.splitlines()] == [True] * 6


@pytest.mark.parametrize("page", PAGES + OTHERS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text().split()
    assert [page.stem for page in PAGES[1:] if page.stem not in index and page.stem != "index"] == []


def test_every_block_is_found() -> None:
    assert len(examples("python")) >= 3
    assert len(examples("bash run")) >= 1
    assert len(examples("json")) >= 1


@pytest.mark.slow
def test_the_reference_is_made_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    words = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", str(ROOT / "docs")]
    check([*words, str(tmp_path / "docs")], tmp_path)
    for page, name in (
        ("optimizers", "optimizers.Grass"),
        ("integrations", "integrations.transformers.prepare_trainer"),
    ):
        assert f'id="narrowgauge.{name}"' in (tmp_path / "docs" / "api" / f"{page}.html").read_text()
