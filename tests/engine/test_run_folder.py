"""What a run folder may be continued with, and what is taken out of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import narrowgauge.engine.run_folder as run_folder
from narrowgauge.engine.errors import UserError
from narrowgauge.engine.report.metrics import MetricsLog, step_records

RAW: dict[str, Any] = {"optimizer": {"params": {"lr": 0.1}}, "gradient_accumulation_steps": 2}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"config": RAW, "train_batch_size": 8}))
    return tmp_path


def test_how_a_batch_is_made_up_may_change_but_not_its_size(run_dir: Path) -> None:
    """Places in the data are counted in whole batches: with another size, samples would be lost or repeated."""
    run_folder.check_same_run(run_dir, {**RAW, "gradient_accumulation_steps": 4, "train_batch_size": 8}, 8)
    with pytest.raises(UserError, match=r"train_batch_size \(was 8, now 16\)"):
        run_folder.check_same_run(run_dir, {**RAW, "gradient_accumulation_steps": 4}, 16)


def test_where_activations_lie_may_change(run_dir: Path) -> None:
    block = {"path": "/scratch", "keep_resident": 0.5, "granularity": "layer_inputs"}
    run_folder.check_same_run(run_dir, {**RAW, "activation_offload": block}, 8)


def test_another_learning_rate_is_refused(run_dir: Path) -> None:
    with pytest.raises(UserError, match=r"optimizer\.params\.lr \(was 0\.1, now 0\.2\)"):
        run_folder.check_same_run(run_dir, {**RAW, "optimizer": {"params": {"lr": 0.2}}}, 8)


def test_trying_a_folder_leaves_nothing(tmp_path: Path) -> None:
    run_folder.check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_folder.check_writable(tmp_path / "file" / "run")


@pytest.mark.parametrize("content", ["[]", "3", "{}", "x", "[" * 100_000])
def test_a_damaged_summary_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    assert run_folder.finished_summary(tmp_path, RAW) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": {}}', "[" * 100_000, '{"config":' + '{"a":' * 700])
def test_a_damaged_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        run_folder.check_same_run(tmp_path, RAW, 8)


def test_a_folder_that_is_not_shared_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_SHARED_PATIENCE", 0.0)
    with pytest.raises(UserError, match="all nodes need the same folder"):
        run_folder.check_shared(tmp_path)
    run_folder.RunLock(tmp_path).release()
    run_folder.check_shared(tmp_path)


def test_records_beyond_the_checkpoint_are_taken_out(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, first_step=0)
    log.write(0, {"eval_loss": 2.0})
    for step in range(1, 6):
        log.write(step, {"loss": 1.0 / step, "bytes": {}, "seconds": {}})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    MetricsLog(tmp_path, first_step=3).close()
    assert [record["step"] for record in step_records(tmp_path)] == [1, 2, 3]
    # Without a checkpoint the run starts again, evaluation before the first step included.
    MetricsLog(tmp_path, first_step=0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("trace", ["metrics.jsonl", "checkpoints"])
def test_a_run_without_its_configuration_is_not_gone_on_with(tmp_path: Path, trace: str) -> None:
    """Whatever options came next were taken for the run's own."""
    run_folder.check_same_run(tmp_path, RAW, 8)
    (tmp_path / trace).mkdir()
    with pytest.raises(UserError, match=rf"config\.json: expected the configuration of the run whose {trace}"):
        run_folder.check_same_run(tmp_path, RAW, 8)


def test_a_file_in_the_place_of_the_checkpoints_is_found_before_a_step(tmp_path: Path) -> None:
    """The run started over, cut its records, and failed at its first checkpoint."""
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"checkpoints: expected a folder, got a file"):
        run_folder.check_same_run(tmp_path, RAW, 8)


def test_secrets_that_an_older_version_saved_are_no_difference(tmp_path: Path) -> None:
    raw = {**RAW, "data": {"train": ["https://host/x?token=k1"]}}
    (tmp_path / "config.json").write_text(json.dumps({"config": raw, "train_batch_size": 8}))
    run_folder.check_same_run(tmp_path, raw, 8)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": null}',
        "[]",
        "3",
        '{"loss": 1.0}',
        '{"step": 2, "seconds": 3}',
        '{"step": 2, "loss": "low"}',
        "[" * 100_000,
        "x",
    ],
)
def test_odd_records_are_dropped_with_a_warning(tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture) -> None:
    """They ended a run that was started again with a traceback; deep nesting is no error of the JSON module's."""
    good = '{"step": 1, "loss": 0.5, "bytes": {}, "seconds": {}}'
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with caplog.at_level("WARNING", logger="narrowgauge"):
        assert [record["step"] for record in step_records(tmp_path)] == [1]
        MetricsLog(tmp_path, first_step=5).close()
    assert path.read_text() == good + "\n"
    assert f"{path}: no record in line 2; dropped" in caplog.text


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    """``NaN`` and ``Infinity`` are no JSON: jq and most languages' parsers refuse the whole file."""
    log = MetricsLog(tmp_path, first_step=0)
    log.write(1, {"eval_loss": float("nan"), "seconds": {"step": float("inf")}, "many": [float("-inf"), 1.5]})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "eval_loss": null, "seconds": {"step": null}, "many": [null, 1.5]}\n'


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    """The error was ``[Errno 27] File too large``, without a name; TensorBoard writes from a thread of its own."""
    script = f"""
import resource
from pathlib import Path
from narrowgauge.engine.report.metrics import MetricsLog
from narrowgauge.engine.report.sinks import TensorBoard
folder = Path({str(tmp_path)!r})
plain = MetricsLog(folder, first_step=0)
(folder / "more").mkdir()
log = MetricsLog(folder / "more", first_step=0, sinks=[TensorBoard(folder / "more" / "tensorboard", first_step=0)])
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
values = {{f"name-{{number}}": 1.0 for number in range(100)}}
for attempt in (
    lambda: [plain.write(step, {{"loss": 1.0}}) for step in range(500)],
    lambda: (log.write(1, values), log.write(2, values), log.close()),
):
    try:
        attempt()
    except (OSError, ValueError) as error:
        print(error)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)  # noqa: S603
    metrics, scalars = found.stdout.splitlines()
    assert metrics == f"[Errno 27] File too large: '{tmp_path / 'metrics.jsonl'}'"
    assert scalars == f"{tmp_path / 'more' / 'tensorboard'}: cannot be written: [Errno 27] File too large"


def test_a_lock_knows_that_its_folder_is_gone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    lock = run_folder.RunLock(run_dir)
    assert lock.is_there()
    shutil.rmtree(run_dir)
    assert not lock.is_there()
    run_dir.mkdir()
    run_folder.RunLock(run_dir).release()
    assert not lock.is_there()
    lock.release()
