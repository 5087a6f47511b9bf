"""What the page and the images of ``narrowgauge report`` show, and which folders are refused."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from narrowgauge.launcher.report.curves import Chart, Curve, charts_over
from narrowgauge.launcher.report.page import page
from narrowgauge.launcher.report.runs import read_runs
from narrowgauge.launcher.report.svg import draw, thinned, ticks
from tests.launcher.conftest import Call
from tests.launcher.conftest import call as call
from tests.launcher.report.folders import loss_at, write_run

VOID = {"meta", "link", "input", "line", "polyline", "circle"}


class Outline(HTMLParser):
    """Checks that tags are closed in order, and collects rows of tables and what refers elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.elsewhere: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elsewhere += [str(v) for k, v in attrs if k in ("src", "href") and v != "data:,"]
        self.elsewhere += [tag] if tag == "script" else []
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def outline(text: str) -> Outline:
    found = Outline()
    found.feed(text)
    assert found.open == []
    return found


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / "a"), write_run(tmp_path / "b<i>", lr=0.25, restarted_after=8)]


def test_the_page_is_whole_and_refers_to_nothing_else(two: list[Path], tmp_path: Path, call: Call) -> None:
    done = call("report", *map(str, two), "--output", str(tmp_path / "page.html"))
    assert (done.returncode, done.stdout.split(": ")[1][:6]) == (0, "2 runs"), done.stderr
    text = (tmp_path / "page.html").read_text()
    found = outline(text)
    assert found.elsewhere == []
    assert "url(" not in text
    assert "prefers-color-scheme:dark" in text
    for row in (
        ["", "a", "b<i>"],
        ["steps", "20 of 20, finished", "20 of 20, finished"],
        ["training loss", f"{loss_at(20, 0.5):.4f}", f"{loss_at(20, 0.25):.4f}"],
        ["validation loss", "2.5000", "2.5000"],
        ["time", "50s", "1h 00m"],
        ["started again", "0", "1"],
        ["MFU", "25.0%", "25.0%"],
        ["optimizer state per rank", *["1.00 MiB (0.25 of dense AdamW's)"] * 2],
        ["a", "memory in tensors, peak", "110.00", "100.00", "+10.0%"],
        ["peak memory of the process, per rank", *["600.00 MiB (400.00 MiB before the model)"] * 2],
        ["a", "reduced per step", "0.00", "not measured", ""],
        ["b<i>", "2027-01-15 08:50:00", "8", "1", "node<1>", "72", "asked to end, saved"],
        ["optimizer.params.lr", "0.5", "0.25"],
    ):
        assert row in found.rows, row
    differing = found.rows[
        next(i for i, row in enumerate(found.rows) if row == ["optimizer.params.lr", "0.5", "0.25"]) :
    ]
    # Of the differences; then all keys.
    assert [row[0] for row in differing[:2]] == ["optimizer.params.lr", ""]


def test_every_curve_is_there_over_each_axis(two: list[Path]) -> None:
    runs = read_runs(two)
    for axis, last in (("steps", 20.0), ("tokens", 0.02), ("time", 50 / 3600)):
        charts = {chart.title: chart for chart in charts_over(axis, runs)}
        assert next(iter(charts)) == "training loss"
        # Nothing was reduced or gathered, or waited for.
        assert charts.keys() == {
            "training loss",
            "validation loss",
            "gradient norm",
            "learning rate",
            "tokens per second",
            "model FLOPs utilization",
            "time of a step",
            "memory",
            "saved activations",
            "offload of a step",
        }
        first = charts["training loss"].curves[0]
        assert [y for _, y in first.points] == [loss_at(step, 0.5) for step in range(1, 21)]
        assert first.points[-1][0] == pytest.approx(last)
        names = [curve.name for curve in charts["saved activations"].curves]
        assert names == ["a, saved", "a, of them in memory", "b<i>, saved", "b<i>, of them in memory"]
        assert {y for _, y in charts["saved activations"].curves[1].points} == {12.0}
        ((mark, run),) = charts["training loss"].marks
        assert run == 1
        assert mark == pytest.approx({"steps": 8.0, "tokens": 0.008, "time": 26 / 3600}[axis])


def test_points_are_drawn_where_they_belong() -> None:
    points = [(0.0, 4.0), (5.0, 1.0), (10.0, 2.0)]
    text = draw(Chart("loss", "", [Curve("a", 0, 0, points)]), "steps")
    (line,) = re.findall(r'<polyline[^>]* points="([^"]*)"', text)
    drawn = [tuple(map(float, each.split(","))) for each in line.split()]
    labels = dict(re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', text))
    place = {float(name): float(y) - 4 for y, name in labels.items()}
    assert [x for x, _ in drawn] == pytest.approx([58, (58 + 470) / 2, 470], abs=0.1)
    assert [y for _, y in drawn] == pytest.approx([place[4], place[1], place[2]], abs=0.1)


def test_ticks_are_round_and_around() -> None:
    assert ticks(0.0, 10.0) == [0.0, 2.5, 5.0, 7.5, 10.0]
    assert ticks(5.02, 8.4) == [5.0, 6.0, 7.0, 8.0, 9.0]
    assert ticks(3.0, 3.0)[0] < 3.0 < ticks(3.0, 3.0)[-1]


def test_thinned_lines_keep_their_peaks() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[77_777] = (77_777.0, 50.0)
    found = thinned(points)
    assert len(found) <= 600
    assert (77_777.0, 50.0) in found
    assert found == sorted(found)


def test_a_run_of_an_earlier_version_has_the_time_of_its_steps(tmp_path: Path) -> None:
    """Its records have neither times, nor memory and MFU; its folder has no ``ends.jsonl``."""
    folder = write_run(tmp_path / "old", restarted_after=8)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in ("time", "mfu", "memory")} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (folder / "ends.jsonl").unlink()
    runs = read_runs([folder])
    charts = {chart.title: chart for chart in charts_over("time", runs)}
    assert charts.keys().isdisjoint({"memory", "model FLOPs utilization"})
    assert charts["training loss"].curves[0].points[-1][0] == pytest.approx(20 * 2.0 / 3600)
    found = outline(page(runs))
    assert ["time", "40s in steps"] in found.rows
    assert any(row[-1] == "failed or was killed" for row in found.rows)


@pytest.mark.slow
def test_images_are_the_charts(two: list[Path], tmp_path: Path, call: Call) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    words = ["--output", str(tmp_path / "page.html"), "--png", str(tmp_path / "png")]
    assert call("report", *map(str, two), *words).returncode == 0
    files = sorted((tmp_path / "png").iterdir())
    assert len(files) == 30
    assert "training-loss-over-tokens.png" in [path.name for path in files]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000 for path in files)


def _replace(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read: No such file or directory"),
        (_replace("config.json", '{"steps'), "config.json: expected JSON, got "),
        (_replace("config.json", "[]"), "config.json: expected an object, got list"),
        (_replace("config.json", "{}"), "config.json: expected the configuration of a run, got none"),
        (_replace("summary.json", '{"schema_version": 7}'), "summary.json: expected schema_version 1, got 7"),
        (_replace("summary.json", '{"schema_version": 1, "bytes": null}'), "summary.json: bytes: expected an object"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "metrics.jsonl: expected records of training steps, got"),
        (_replace("metrics.jsonl", "x\n"), "metrics.jsonl: expected records of training steps, got none"),
    ],
)  # fmt: skip
def test_folders_that_are_broken_or_of_another_version_are_named(
    tmp_path: Path, call: Call, harm: Callable[[Path], Any], message: str
) -> None:
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad")
    harm(bad)
    done = call("report", str(good), str(bad), "--output", str(tmp_path / "page.html"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {bad}/{message}")
    assert not (tmp_path / "page.html").exists()


def test_what_is_no_run_or_cannot_be_written_is_named(tmp_path: Path, call: Call) -> None:
    run = str(write_run(tmp_path / "run"))
    for words, message in (
        ([f"{tmp_path}/none"], f"{tmp_path}/none: expected a run folder, got nothing there"),
        ([f"{run}/config.json"], f"{run}/config.json: expected a run folder, got a file there"),
        ([run, run + "/."], "expected each run once"),
        (
            [run, "--output", f"{tmp_path}/no/page.html"],
            f"--output {tmp_path}/no/page.html: cannot be written: No such",
        ),
        ([run, "--output", ""], "--output: expected a file, got the folder ."),
        ([run, "--output", run], f"--output: expected a file, got the folder {run}"),
    ):
        done = call("report", *words)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_lines_that_are_no_records_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A page was not made at all where a step was below 0, a time beyond the calendar's end, or a value NaN."""
    folder = write_run(tmp_path / "run", restarted_after=8)
    whole = read_runs([folder])
    blocks = {"bytes": {}, "seconds": {}}
    odd = [{"step": -1, "eval_loss": 2.0}, {"step": 3, "eval_loss": "x"}, {"step": 21, "loss": float("nan"), **blocks}]
    odd.append({"step": 21, "loss": 1.0, "tokens": None, **blocks})
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in odd)
    with (folder / "starts.jsonl").open("a") as file:
        file.writelines(['{"after_step": "x"}\n', '{"after_step": 9, "time": 1e300}\n', '{"after_step": null}\n'])
    caplog.clear()
    assert read_runs([folder]) == whole
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        "no record in line 23, 24, 25, 26; dropped",
        "no record in line 3, 4, 5; dropped",
    ]
    lines = (folder / "metrics.jsonl").read_text().replace('"grad_norm": 0.5', '"grad_norm": NaN')
    (folder / "metrics.jsonl").write_text(lines)
    (norms,) = [chart for chart in charts_over("steps", read_runs([folder])) if chart.title == "gradient norm"]
    assert [x for x, _ in norms.curves[0].points] == [1.0, *map(float, range(3, 21))]
