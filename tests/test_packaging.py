"""The wheel: what it holds, and that Python finds it where a clone lies beside."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.command import ROOT, environment

FOLDERS = ("configs", "engine", "integrations", "launcher", "offload", "optimizers", "slurm")


def run(*words: str, cwd: Path, **extra: str) -> str:
    done = subprocess.run(  # noqa: S603
        words, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources(root: Path) -> set[str]:
    """The files of the package, by their path in it."""
    return {
        str(path.relative_to(root))
        for folder in FOLDERS
        for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".json", ".sbatch")
    }


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree in a folder of the package's own name, as git makes it."""
    folder = tmp_path_factory.mktemp("above") / "narrowgauge"
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        source, target = ROOT / name, folder / name
        if not source.is_symlink() and (name.startswith("tests/") or not source.is_file()):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            target.write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="module")
def installed(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "wheel", str(clone), *options, "--wheel-dir", str(folder), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def test_it_holds_every_module_and_every_file_of_data(installed: Path) -> None:
    expected = sources(ROOT) | {"__init__.py", "kernels.py", "py.typed"}
    package = installed / "narrowgauge"
    assert {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()} == expected
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {"narrowgauge"}


def test_in_the_folder_above_a_clone_the_installed_one_is_found(clone: Path, installed: Path) -> None:
    """A clone's root has no ``__init__.py``: as a namespace package it once hid the wheel's modules."""
    ask = "import narrowgauge as n; from narrowgauge import engine; print(n.__file__, engine.__file__, n.__version__)"
    found = run(sys.executable, "-c", ask, cwd=clone.parent, PYTHONPATH=str(installed)).split()
    assert found[:2] == [str(installed / "narrowgauge" / part) for part in ("__init__.py", "engine/__init__.py")]
    words = [sys.executable, "-m", "narrowgauge.launcher"]
    version = run(*words, "--version", cwd=clone.parent, PYTHONPATH=str(installed))
    assert version == f"narrowgauge {found[2]}\n"
    script = run(*words, "slurm", "render", "quickstart", cwd=clone.parent, PYTHONPATH=str(installed))
    assert script == (ROOT / "slurm" / "pretrain.sbatch").read_text()
