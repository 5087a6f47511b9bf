"""TensorBoard, wandb and trackio: what they get, and that they are there before a run starts."""

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from narrowgauge.engine.config.run_blocks import LoggingBlock
from narrowgauge.engine.report import sinks
from narrowgauge.engine.report.tags import tagged
from tests.launcher.conftest import Call
from tests.launcher.conftest import call as call
from tests.support.command import tiny_config

RECORD = {
    "loss": 2.0,
    "lr": 0.1,
    "grad_norm": None,
    "skipped": False,
    "tokens_per_second": 5.0,
    "mfu": 0.5,
    "memory": {"now": 3, "peak": 4},
    "time": 1e9,
    "bytes": {"reduced": 6, "gathered": 7, "saved_activations_peak_resident": 8, "offload_written": 9},
    "seconds": {"step": 1.0, "forward": 0.5, "io_stall": 0.25},
    "experts": {"max_load": {"0": 1.5}},
}
TAGS = {
    "train/loss": 2.0,
    "train/perplexity": pytest.approx(7.389056),
    "train/lr": 0.1,
    "train/skipped": 0.0,
    "perf/tokens_per_second": 5.0,
    "perf/mfu": 0.5,
    "memory/now": 3.0,
    "memory/peak": 4.0,
    "traffic/reduced": 6.0,
    "traffic/gathered": 7.0,
    "offload/resident_peak": 8.0,
    "offload/written": 9.0,
    "perf/seconds_step": 1.0,
    "perf/seconds_forward": 0.5,
    "offload/seconds_waited": 0.25,
    "train/experts/max_load/0": 1.5,
}


def test_numbers_have_tags_in_groups() -> None:
    assert tagged(RECORD) == TAGS
    assert tagged({"eval_loss": 0.0, "time": 1e9}) == {"eval/loss": 0.0, "eval/perplexity": 1.0}


def test_tensorboard_has_them_and_a_page_with_the_losses_first(tmp_path: Path) -> None:
    (sink,) = sinks.open_sinks(LoggingBlock(run_dir="run"), tmp_path, {}, first_step=0)
    sink.write(1, RECORD)
    sink.write(1, {"eval_loss": 0.0})
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert found == pytest.approx(
        {**{k: v for k, v in tagged(RECORD).items()}, "eval/loss": 0.0, "eval/perplexity": 1.0}
    )
    assert any("custom_scalars" in tag for tag in events.Tags()["tensors"])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_sink_that_is_not_installed_ends_the_run_before_it_starts(
    call: Call, corpus: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    logging = {"run_dir": str(tmp_path / "run"), name: {"project": "p"}}
    done = call(
        "train", str(tiny_config(corpus, tmp_path, engine="ddp", zero_optimization={"stage": 0}, logging=logging))
    )
    assert done.returncode == 2
    assert f"logging.{name}: expected the package {name}, got none: pip install 'narrowgauge[{name}]'" in done.stderr
    assert not (tmp_path / "run").exists()


_SCRIPT = """
import sys
from pathlib import Path
from narrowgauge.engine.config.run_blocks import LoggingBlock
from narrowgauge.engine.report.sinks import open_sinks
name, folder = sys.argv[1], Path(sys.argv[2])
own = {"project": "p", "name": "first", **({"mode": "offline"} if name == "wandb" else {})}
block = LoggingBlock.model_validate({"run_dir": str(folder), "tensorboard": False, name: own})
for last in (3, 5):
    # Interrupted, and gone on with from step 2.
    (sink,) = open_sinks(block, folder, {"optimizer": {"type": "Grass"}}, first_step=last - 3)
    for step in range(last - 2, last + 1):
        sink.write(step, {"loss": 1.0 / step, "seconds": {"step": 2.0}})
    sink.close()
"""


def _log_to(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TRACKIO_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(folder / "of-the-service"))
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", _SCRIPT, name, str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "gets nothing more" not in done.stdout + done.stderr


def _entries(content: bytes) -> Iterator[bytes]:
    """Of wandb's file: LevelDB's log format, after 7 bytes of its own: in blocks, each part with a checksum, its length
    and whether it is whole (1), a beginning (2), a middle (3) or an end (4).
    """
    assert content[:4] == b":W&B"
    place, entry = 7, b""
    while place + 7 < len(content):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)
        entry += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield entry
            entry = b""


@pytest.mark.slow
def test_wandb_offline_keeps_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    _log_to("wandb", tmp_path, monkeypatch)
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]

    found: dict[float, float] = {}
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for data in _entries(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            if "train/loss" in items:
                assert items["perf/seconds_step"] == 2.0
                found[items["step"]] = items["train/loss"]
    assert found == {step: 1.0 / step for step in range(1, 6)}


@pytest.mark.slow
def test_trackio_on_this_machine_keeps_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    _log_to("trackio", tmp_path, monkeypatch)
    import sqlite3

    (path,) = (tmp_path / "of-the-service").glob("p*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT step, metrics FROM metrics WHERE run_name = 'first'").fetchall()
    found = {step: json.loads(text)["train/loss"] for step, text in rows}
    assert found == pytest.approx({step: 1.0 / step for step in range(1, 6)})
