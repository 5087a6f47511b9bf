"""The quality benchmark at its small size: resumable, two rates, bytes as stated, reports written."""

import difflib
import inspect
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import quality_sweep
from benchmarks.quality import main
from benchmarks.quality_anchors import SketchedResidual
from benchmarks.quality_data import LONG, SMALL, Text, build_model
from benchmarks.quality_methods import METHODS, Method, Shapes
from benchmarks.quality_prose import docstrings
from benchmarks.quality_report import best_results, share_of_gap
from benchmarks.quality_run import Rates, Run, read_result, train
from benchmarks.quality_search import BETA2, Progress, search_baseline, search_rates
from benchmarks.quality_sweep import Search
from benchmarks.quality_time import MAIN, read_times
from benchmarks.results_file import read_rows

NAMES = ["adamw", "grass-columns-1/4", "grass-rows-1/4"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The results of a whole sweep of three methods."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        folder = tmp_path_factory.mktemp("quality")
        assert sweep(folder) >= 4 + 3 + 3
        yield folder
    torch.set_num_threads(threads)


def sweep(folder: Path, *words: str, methods: list[str] = NAMES) -> int:
    return main(["--small", "--out", str(folder), "--methods", *methods, *words])


def written(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def small_search(folder: Path) -> Search:
    return Search(SMALL, Text(SMALL).fingerprint, folder)


def test_finished_runs_are_not_repeated(out: Path) -> None:
    before = written(out)
    assert sweep(out) == 0
    assert written(out) == before


def test_a_lost_run_is_made_again_alone_with_the_same_loss(out: Path) -> None:
    search = small_search(out)
    best = search.progress("grass-columns-1/4").best
    assert best is not None
    run = search.run("grass-columns-1/4", best)
    first, before = read_result(run, out), written(out)
    run.path(out).unlink()
    assert sweep(out) == 1
    second = read_result(run, out)
    assert first is not None
    assert second is not None
    assert second["losses"] == first["losses"]
    assert {name for name, time in written(out).items() if before[name] != time} == {run.path(out).name}


@pytest.mark.slow
def test_runs_side_by_side_find_the_same(out: Path) -> None:
    search = small_search(out)
    runs = [search.run("adamw", Rates(lr, SMALL.grid_matrix_lr[0], BETA2[0])) for lr in SMALL.grid_lr]
    expected = [read_result(run, out) for run in runs]
    for run in runs:
        run.path(out).unlink()
    assert sweep(out, "--jobs", "2") == len(runs)
    for run, before in zip(runs, expected, strict=True):
        again = read_result(run, out)
        assert before is not None
        assert again is not None
        assert again["loss"] == pytest.approx(before["loss"], abs=1e-6)


def test_a_run_that_fails_leaves_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("broken")

    broken = Method(make=lambda model, **options: Broken(model.parameters(), lr=0.1), state=lambda shapes: 1.0)
    monkeypatch.setitem(METHODS, "broken", broken)
    before = set(out.iterdir())
    with pytest.raises(SystemExit, match="failed, see above: broken"):
        sweep(out, methods=["broken"])
    assert set(out.iterdir()) == before


def test_two_sweeps_cannot_share_a_folder(out: Path) -> None:
    with quality_sweep.locked(out), pytest.raises(SystemExit, match="another sweep is running"):
        sweep(out)


def test_a_run_that_diverges_counts_as_infinite(out: Path) -> None:
    search = small_search(out)
    run = search.run("adamw", Rates(1e30, 1e30, 0.999))
    result = train(run, Text(SMALL), out)
    run.path(out).unlink()
    assert result["loss"] is None
    assert list(result["losses"].values()) == [None]


def test_settings_decide_the_file(out: Path) -> None:
    """Whatever the loss depends on gives another file; the grid, which only the sweep looks at, does not."""
    run = Run("adamw", Rates(1e-2, 1e-3, 0.999), SMALL, "text")
    others = [
        replace(run, method="grass-rows-1/4"),
        replace(run, rates=replace(run.rates, matrix_lr=2e-3)),
        replace(run, rates=replace(run.rates, beta2=0.95)),
        replace(run, task=replace(SMALL, seed=1)),
        replace(run, task=replace(SMALL, interval=5)),
        replace(run, text="other"),
    ]
    assert len({other.path(out) for other in [run, *others]}) == len(others) + 1
    assert replace(run, task=replace(SMALL, grid_lr=(1.0,))).path(out) == run.path(out)


@pytest.mark.parametrize("name", NAMES)
def test_matrices_and_others_have_rates_of_their_own(name: str) -> None:
    model, method = build_model(SMALL), METHODS[name]
    names = {id(p): key for key, p in model.named_parameters()}
    optimizer = method.make(model, lr=1e-2, matrix_lr_scale=0.25, betas=(0.9, 0.99), interval=4, **method.options)
    names |= {id(p): key for key, p in model.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    matrices = {key for key in found if "_proj" in key}
    assert len(matrices) == 7 * SMALL.layers
    assert {found[key] for key in matrices} == {2.5e-3}
    assert {found[key] for key in found if key not in matrices} == {1e-2}
    assert {key for key in found if key not in matrices} >= {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(group["betas"] == (0.9, 0.99) and group["weight_decay"] == 0.0 for group in optimizer.param_groups)


def test_bytes_are_those_of_the_formula(out: Path) -> None:
    """Counted bytes against what the shapes say, worked out here by hand."""
    h, i, v, density = SMALL.hidden, SMALL.intermediate, SMALL.vocab, 0.25
    matrices = SMALL.layers * (4 * h * h + 3 * h * i)
    dense = 2 * v * h + (2 * SMALL.layers + 1) * h
    found = best_results(small_search(out), NAMES)
    for name, share in zip(NAMES, (1.0, density, density), strict=True):
        size = found[name]["bytes"]
        trained = share * matrices + dense
        assert size["optimizer"] == pytest.approx(8 * trained, rel=0.02)
        assert size["optimizer"] == pytest.approx(size["optimizer_formula"], rel=0.02)
        assert size["gradients"] == pytest.approx(4 * trained, rel=1e-6)
        # Ring all-reduce on 2 ranks: 2 (2 - 1) / 2 of the gradients.
        assert size["wire"] == size["gradients"]
        assert size["added_weights"] == (0 if name == "adamw" else pytest.approx(4 * share * matrices))
        assert found[name]["parameters"] == {"trained": trained, "model": matrices + dense}


def _records(out: Path, method: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in out.glob(f"{method.replace('/', '_')}-*.json")]


def test_reports_are_written(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, picture = tmp_path / "table.md", tmp_path / "loss.png"
    before = written(out)
    sweep(out, "--report", "--markdown", str(table), "--plot", str(picture))
    printed = capsys.readouterr().out
    assert written(out) == before
    rows = [line for line in table.read_text().splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == ["method", *NAMES]
    found = best_results(small_search(out), NAMES)
    for name, row in zip(NAMES, rows[1:], strict=True):
        assert f"{found[name]['loss']:.4f}" in row
        assert "unfinished" not in row
        assert name in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    sweep(out, "--csv", str(tmp_path / "rows.csv"), "--curves", str(tmp_path / "curves.csv"))
    curves = read_rows(tmp_path / "curves.csv")
    assert [(row["method"], row["step"]) for row in curves] == [(name, step) for name in NAMES for step in (6, 12)]
    assert {row["method"]: row["loss"] for row in curves} == {name: found[name]["loss"] for name in NAMES}
    for row in read_rows(tmp_path / "rows.csv"):
        rates = {record["settings"]["rates"]["matrix_lr"] for record in _records(out, row["method"])}
        assert row["rates_tried"] == len(rates)
        assert (row["at_edge"] == "yes") == (row["matrix_lr"] in (min(rates), max(rates)))


def test_the_best_run_is_the_one_of_lowest_loss(out: Path) -> None:
    search = small_search(out)
    for name, best in best_results(search, NAMES).items():
        rates = search.progress(name).best
        assert rates is not None
        result = read_result(search.run(name, rates), out)
        assert result is not None
        assert best["loss"] == result["loss"]


def test_repetitions_with_other_seeds_are_averaged_and_do_not_compete(out: Path, tmp_path: Path) -> None:
    table, name = tmp_path / "table.md", "adamw"
    before = best_results(small_search(out), [name])[name]
    assert sweep(out, "--repeats", "2", methods=[name]) == 2
    assert sweep(out, "--repeats", "2", methods=[name]) == 0
    search = Search(SMALL, Text(SMALL).fingerprint, out, repeats=2)
    found = best_results(search, [name])[name]
    assert found["settings"] == before["settings"]
    losses = [before["loss"], *found["repeated"]]
    assert len(set(losses)) == 3
    sweep(out, "--repeats", "2", "--markdown", str(table), methods=[name])
    assert found["by_seed"] == dict(enumerate(losses))
    assert f"| {sum(losses) / 3:.4f} ({min(losses):.4f}-{max(losses):.4f}) |" in table.read_text()
    assert small_search(out).progress(name).best == Rates(**before["settings"]["rates"])


class Landscape:
    """A loss with one minimum, in steps of factor 2, that notes what was asked for."""

    def __init__(self, lr: float, matrix_lr: float, *, diverges_above: float = math.inf) -> None:
        self._lr, self._matrix_lr, self._limit = lr, matrix_lr, diverges_above
        self.known: dict[Rates, float] = {}

    def __call__(self, rates: Rates) -> float | None:
        return self.known.get(rates)

    def loss(self, rates: Rates) -> float:
        if rates.matrix_lr > self._limit:
            return math.inf
        penalty = 0.1 if rates.beta2 != 0.95 else 0.0
        return 1 + math.log2(rates.lr / self._lr) ** 2 + math.log2(rates.matrix_lr / self._matrix_lr) ** 2 + penalty

    def follow(self, search: Any) -> Rates:
        """Make what the search asks for, one run at a time, until it is done."""
        while (progress := search(self)).best is None:
            assert isinstance(progress, Progress)
            assert progress.missing[0] not in self.known
            self.known[progress.missing[0]] = self.loss(progress.missing[0])
        return progress.best


def test_search_moves_until_the_best_is_inside() -> None:
    """The best is three steps above the start, so three matrix rates become five."""
    landscape = Landscape(1e-2, 8e-3)
    assert landscape.follow(lambda losses: search_rates(losses, Rates(1e-2, 1e-3, 0.999))) == Rates(1e-2, 8e-3, 0.999)
    assert sorted({rates.matrix_lr for rates in landscape.known}) == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    assert {rates.lr for rates in landscape.known if rates.matrix_lr == 8e-3} == {5e-3, 1e-2, 2e-2}
    assert len(landscape.known) == 8


def test_search_moves_away_from_divergence() -> None:
    landscape = Landscape(1e-2, 1e-3, diverges_above=3e-4)
    best = landscape.follow(lambda losses: search_rates(losses, Rates(1e-2, 2e-3, 0.999)))
    assert best.matrix_lr == 2.5e-4


def test_search_gives_up_on_a_loss_that_is_never_finite() -> None:
    landscape = Landscape(1e-2, 1e-3, diverges_above=0.0)
    landscape.follow(lambda losses: search_rates(losses, Rates(1e-2, 2e-3, 0.999)))
    assert len(landscape.known) < 20


def test_baseline_has_a_full_grid_and_its_better_beta2() -> None:
    landscape = Landscape(1e-2, 2e-3)
    grid = (5e-3, 1e-2, 2e-2), (5e-4, 1e-3, 2e-3)
    best = landscape.follow(lambda losses: search_baseline(losses, *grid))
    assert best == Rates(1e-2, 2e-3, 0.95)
    assert landscape.known.keys() >= {Rates(lr, matrix_lr, BETA2[0]) for lr in grid[0] for matrix_lr in grid[1]}


def test_others_wait_for_the_baseline_and_start_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = Search(SMALL, "text", tmp_path)
    assert search.progress("grass-rows-1/4") == Progress()
    best = Rates(1e-2, 2e-3, 0.95)
    monkeypatch.setattr(quality_sweep, "search_baseline", lambda losses, lr, matrix_lr: Progress(best=best))
    started = METHODS["grass-rows-1/4"].start * 2e-3
    expected = [Rates(1e-2, rate, 0.95) for rate in (started / 2, started, 2 * started)]
    assert search.progress("grass-rows-1/4").missing == expected


def test_one_rate_of_the_others_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the long task AdamW tries the matrices' rates alone; with rates given, another method tries just these."""
    (lr,), (first,) = LONG.grid_lr, LONG.grid_matrix_lr
    landscape = Landscape(1e-1, 4 * first)
    best = landscape.follow(lambda losses: search_baseline(losses, LONG.grid_lr, LONG.grid_matrix_lr))
    assert best == Rates(lr, 4 * first, 0.999)
    assert {(rates.lr, rates.beta2) for rates in landscape.known} == {(lr, 0.999)}
    monkeypatch.setattr(quality_sweep, "search_baseline", lambda losses, lr, matrix_lr: Progress(best=best))
    search = Search(LONG, "text", tmp_path, matrix_lr=[1e-2, 3e-2])
    assert search.progress("grass-rows-1/4").missing == [Rates(lr, 1e-2, 0.999), Rates(lr, 3e-2, 0.999)]
    assert search.progress("frozen").missing == [best]


def test_prose_is_what_the_library_says_in_words(tmp_path: Path) -> None:
    texts = list(docstrings(Path(difflib.__file__)))
    assert texts[0] == inspect.getdoc(difflib)
    assert inspect.getdoc(difflib.SequenceMatcher.ratio) in texts
    (broken := tmp_path / "broken.py").write_text('"""A module."""\nprint "of another language"\n')
    assert not list(docstrings(broken))


def test_every_method_trains_with_less_state_than_adamw() -> None:
    """By the formulas, for all that is registered: nothing is left out of the table by mistake."""
    model: nn.Module = build_model(SMALL)
    shapes = Shapes.of(model)
    dense = METHODS["adamw"].state(shapes)
    for name, method in METHODS.items():
        if name != "adamw":
            assert 0 < method.state(shapes, **method.options) < dense, name
            assert 0 <= method.traffic(shapes, **method.options) < dense, name


def test_times_have_ratios_to_both_baselines(tmp_path: Path) -> None:
    pytest.importorskip("galore_torch")
    figures, names = tmp_path / "larger.json", ["adamw", "apollo-mini"]
    sweep(tmp_path / "out", "--time", "--rounds", "2", "--json", str(figures), methods=names)
    found = json.loads(figures.read_text())["results"]
    change = {name: found[f"{name}, change of subspace"]["refresh"]["seconds_median"] for name in MAIN}
    assert change["adamw"] == 0.0
    assert change["galore-torch-1/8"] > 0.0
    for baseline in ("adamw", "galore-torch-1/8"):
        for name in MAIN:
            own = found[f"{name} against {baseline}"]
            for phase in ("step", "optimizer", "step and change"):
                assert own[phase]["ratio"] == 1.0 if name == baseline else own[phase]["ratio"] > 0.0
            added = own["step and change"]["seconds_median"] - own["step"]["seconds_median"]
            assert added == pytest.approx(change[name] / 200, abs=1e-9)
    times = read_times(tmp_path / "out")
    assert list(times) == names
    assert times["adamw"]["step"]["ratio"] == 1.0


def test_reported_times_are_those_of_the_timing(out: Path, tmp_path: Path) -> None:
    table, times = tmp_path / "table.md", out / "times.json"
    results = {"grass-rows-1/4": {"step": {"ratio": 0.751}, "optimizer": {"ratio": 0.499}}}
    times.write_text(json.dumps({"results": results}))
    try:
        sweep(out, "--markdown", str(table))
    finally:
        times.unlink()
    rows = {row.split(" | ")[0].removeprefix("| "): row for row in table.read_text().splitlines()}
    assert "| 0.75x | 0.50x |" in rows["grass-rows-1/4"]
    assert "| not timed | not timed |" in rows["adamw"]


def test_anchors_step_as_they_say() -> None:
    """Frozen matrices stay, a column moves by the rate times the root of its rows, Muon moves as far as AdamW."""
    sizes = {}
    for name in ("frozen", "normalised-columns", "muon"):
        model = build_model(SMALL)
        key, method = "model.layers.0.mlp.up_proj.weight", METHODS[name]
        optimizer = method.make(model, lr=1e-2, matrix_lr_scale=0.25, betas=(0.9, 0.99), interval=4)
        matrix, head = model.get_parameter(key), model.get_parameter("lm_head.weight")
        before, before_head = matrix.detach().clone(), head.detach().clone()
        tokens = torch.arange(64).reshape(2, 32)
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradient = matrix.grad
        optimizer.step()
        moved = matrix.detach() - before
        assert not torch.equal(head, before_head)
        sizes[name] = float(moved.square().mean().sqrt())
        if name == "normalised-columns":
            assert gradient is not None
            scale = gradient.shape[0] ** 0.5 / torch.linalg.vector_norm(gradient, dim=0)
            torch.testing.assert_close(moved, -2.5e-3 * gradient * scale, rtol=1e-4, atol=1e-8)
    assert sizes["frozen"] == 0
    assert sizes["normalised-columns"] == pytest.approx(2.5e-3, rel=1e-3)
    assert sizes["muon"] == pytest.approx(0.2 * 2.5e-3, rel=0.3)


def test_what_is_not_selected_follows_the_sketch() -> None:
    """Of a gradient of one direction the sketch is known up to the columns' signs: selected ones go as Adam's first
    step, the others by the scale.
    """
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(12, 32))
    u, v = torch.randn(12), torch.randn(32)
    weight.grad = torch.outer(u, v)
    options: dict[str, Any] = {"density": 1 / 4, "share": 1 / 8, "scale": 0.1, "interval": 4, "betas": (0.9, 0.99)}
    optimizer = SketchedResidual([weight], 0.5, **options)
    optimizer.step()
    index = optimizer.state[weight]["index"]
    others = torch.ones(32, dtype=torch.bool)
    others[index] = False
    assert len(index) == 8
    torch.testing.assert_close(weight[:, index], -0.5 * weight.grad[:, index].sign(), rtol=1e-4, atol=1e-6)
    expected = 0.5 * 0.1 * 12**0.5 * (u / u.norm()).abs()
    torch.testing.assert_close(weight[:, others].abs(), expected[:, None].expand(12, 24))


def test_the_share_of_the_gap() -> None:
    assert share_of_gap(3.0, 3.0, 4.0) == 100
    assert share_of_gap(3.25, 3.0, 4.0) == 75
    assert share_of_gap(4.1, 3.0, 4.0) == pytest.approx(-10)
    # Such a task does not tell.
    assert share_of_gap(3.0, 3.0, 3.1) is None
    assert share_of_gap(3.0, None, 4.0) is None


def test_frozen_matrices_have_no_rate_to_try() -> None:
    landscape = Landscape(2e-2, 1e-3)
    best = landscape.follow(lambda losses: search_rates(losses, Rates(1e-2, 4e-3, 0.999), of_matrices=False))
    assert best == Rates(2e-2, 4e-3, 0.999)
    assert {rates.matrix_lr for rates in landscape.known} == {4e-3}
