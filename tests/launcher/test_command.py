"""``narrowgauge`` before it does anything: its version, and which configuration is meant."""

import logging
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from narrowgauge.engine.errors import UserError
from narrowgauge.launcher.configurations import find_configuration, packaged_configurations
from narrowgauge.launcher.output import make_console
from tests.support.command import ROOT, environment

PROBE = """
import sys
from narrowgauge.launcher.main import app
app(sys.argv[1:], standalone_mode=False)
slow = {"torch", "deepspeed", "transformers", "numpy", "pydantic"} & set(sys.modules)
assert not slow, slow
"""


@pytest.mark.parametrize(
    ("word", "expected"), [("--version", f"narrowgauge {version('narrowgauge')}\n"), ("--help", "train")]
)
def test_what_needs_no_library_imports_none(word: str, expected: str) -> None:
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", PROBE, word], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected or (word == "--help" and expected in done.stdout)


def test_every_configuration_has_a_name() -> None:
    found = packaged_configurations()
    in_folders = {
        f"{name}/{path.stem}" for name in ("8gpu", "megatron") for path in (ROOT / "configs" / name).glob("*")
    }
    assert found.keys() == {"quickstart", "megatron-quickstart", *in_folders}
    for name, path in found.items():
        assert path.samefile(ROOT / "configs" / f"{name}.json")


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_configuration(Path("quickstart")) == packaged_configurations()["quickstart"]
    (tmp_path / "quickstart").mkdir()
    assert find_configuration(Path("quickstart")) == packaged_configurations()["quickstart"]
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").write_text("{}")
    assert find_configuration(Path("quickstart")) == Path("quickstart")


def test_a_name_that_is_none() -> None:
    with pytest.raises(UserError) as caught:
        find_configuration(Path("8gpu/llama-7b-pretrian"))
    assert str(caught.value) == (
        "8gpu/llama-7b-pretrian: expected a JSON file or the name of a packaged configuration, got neither; did you"
        f" mean '8gpu/llama-7b-pretrain'?; the names are {', '.join(packaged_configurations())}"
    )


def test_the_log_is_shown_as_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    make_console()
    log = logging.getLogger("narrowgauge.engine.run.train")
    log.info("resumed after step 3 from [folder]")
    log.warning("step-3: damaged")
    log.debug("not shown")
    assert capsys.readouterr().out == "resumed after step 3 from [folder]\nwarning: step-3: damaged\n"
