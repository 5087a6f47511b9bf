"""Estimates of weight gradients: right in the mean, as far off as their formulas say, exact in all else."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from narrowgauge.optimizers import GaLore, Grass
from narrowgauge.optimizers.layers.sampled_linear import SampledLinear, sample_linears
from narrowgauge.optimizers.layers.sampling import Rad, Sampler, WtaCrs, draw_rows, gradient_of
from tests.engine.backends.ddp.test_parity import CASES, Model, finish, make_engine, train, weights_of
from tests.support import forked
from tests.support.command import losses, tiny_config
from tests.support.ranks import RankPool
from tests.support.zero import worst

DRAWS = 4_000
B, M, N = 24, 5, 8


def inputs(*shape: int, seed: int = 0) -> Tensor:
    """Whose rows differ in size by up to a factor of some tens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x * torch.randn(shape[0], *(1,) * (len(shape) - 1), generator=generator, dtype=torch.float64).exp()


def assert_mean(found: Tensor, expected: Tensor) -> None:
    """The mean of draws ``(draws, ...)`` is within 4 standard errors in every entry."""
    error = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - expected).abs() <= 4 * error + 1e-12).all())


def draws(sampler: Sampler, x: Tensor, grad_y: Tensor) -> Tensor:
    kept = [sampler.keep(x, seed) for seed in range(DRAWS)]
    return torch.stack([gradient_of(grad_y, one.values, one.rows, one.projection) for one in kept])


def best_split(p: list[float], k: int) -> int:
    """Equation 7 of the paper, for probabilities in falling order."""
    return min(range(k), key=lambda m: (1 - sum(p[:m])) / (k - m))


def test_wta_crs_is_right_in_the_mean_and_as_far_off_as_its_formula() -> None:
    x, grad_y, k = inputs(B, N), inputs(B, M, seed=1), 10
    found, exact = draws(WtaCrs(k / B, min_rows=2), x, grad_y), grad_y.t() @ x
    assert_mean(found, exact)

    p, order = (x.norm(dim=1) / x.norm(dim=1).sum()).sort(descending=True)
    m = best_split(p.tolist(), k)
    assert 0 < m < k - 1
    rest = order[m:]
    outer = grad_y[rest, :, None] * x[rest, None, :]
    second = p[m:].sum() * (outer.square().sum((1, 2)) / p[m:]).sum()
    variance = (second - outer.sum(0).square().sum()) / (k - m)
    assert_mean((found - exact).square().sum((1, 2)), variance)
    # Of plain column-row sampling, which draws all of them.
    outer = grad_y[order, :, None] * x[order, None, :]
    assert variance < ((outer.square().sum((1, 2)) / p).sum() - exact.square().sum()) / k


def test_rad_is_right_in_the_mean_and_as_far_off_as_its_formula() -> None:
    x, grad_y, r = inputs(B, N), inputs(B, M, seed=1), 4
    found, exact = draws(Rad(r / N), x, grad_y), grad_y.t() @ x
    assert_mean(found, exact)
    assert_mean((found - exact).square().sum((1, 2)), (N - 1) / r * exact.square().sum())


def test_winners_are_kept_as_they_are_and_the_rest_is_drawn() -> None:
    norms = torch.tensor([0.1, 50.0, 0.2, 30.0, 0.3, 0.1, 0.2, 0.1])
    rows, scale = draw_rows(norms, 4, seed=3)
    assert best_split((norms / norms.sum()).sort(descending=True).values.tolist(), 4) == 2
    assert rows[:2].tolist() == [1, 3]
    assert scale[:2].tolist() == [1, 1]
    assert not {1, 3} & set(rows[2:].tolist())
    # Of the sum of the norms themselves the estimate is exact.
    assert (norms[rows] * scale).sum().item() == pytest.approx(norms.sum().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0, 0.0], 0.0),
        ([5.0, 0.0, 0.0, 0.0, 0.0], 5.0),
        ([1e-30, 1e-30, 1e-30, 1e-30, 1e-30], 5e-30),
        ([1e30, 1.0, 1e-30, 0.0, 0.0], 1e30),
    ],
)
def test_norms_at_the_ends(norms: list[float], expected: float) -> None:
    weights = torch.tensor(norms)
    for seed in range(5):
        rows, scale = draw_rows(weights, 3, seed)
        assert (weights[rows] * scale).sum().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_kept(bad: float) -> None:
    x = inputs(B, N)
    x[17, 3] = bad
    for seed in range(5):
        kept = WtaCrs(0.25, min_rows=2).keep(x, seed)
        assert not kept.values.isfinite().all()


class Block(nn.Module):
    """Three layers on one input, and one on another."""

    def __init__(self, dim: int = N) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        return self.out(self.dropout(self.q(x)) * self.k(x).sigmoid() + self.v(x))


def model(dim: int = N) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(dim), Block(dim)).double()


def gradients(of: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    of.zero_grad()
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    y = forward(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert x.grad is not None
    found = {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


SAMPLERS: dict[str, Callable[[], Sampler]] = {"wta_crs": lambda: WtaCrs(0.3, min_rows=2), "rad": lambda: Rad(0.5)}


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_all_but_the_weights_gradients_are_exact(make: Callable[[], Sampler]) -> None:
    # A draw moves the generator that dropout takes its numbers from, on the CPU.
    plain, sampled, x = model().eval(), model().eval(), inputs(4, 6, N)
    sample_linears(sampled, None, make)
    expected, found = gradients(plain, plain, x), gradients(sampled, sampled, x)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) == (not name.endswith("weight")), name


@pytest.mark.parametrize("make", [lambda: WtaCrs(1.0), lambda: Rad(1.0), lambda: WtaCrs(0.1, min_rows=24)])
def test_everything_kept_is_the_plain_layer(make: Callable[[], Sampler]) -> None:
    plain, sampled, x = model().eval(), model().eval(), inputs(4, 6, N)
    sample_linears(sampled, None, make)
    expected, found = gradients(plain, plain, x), gradients(sampled, sampled, x)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.quick("True-wta_crs", "False-rad")
@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_replays_the_draws(make: Callable[[], Sampler], reentrant: bool) -> None:
    sampled, x = model(), inputs(4, 6, N)
    sample_linears(sampled, None, make)

    def by_parts(x: Tensor) -> Any:
        for block in sampled:
            x = checkpoint(block, x, use_reentrant=reentrant)  # pyright: ignore[reportAssignmentType]
        return x

    expected, found = gradients(sampled, sampled, x), gradients(sampled, by_parts, x)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_each_call_draws_anew() -> None:
    sampled, x = model(), inputs(4, 6, N)
    sample_linears(sampled, None, SAMPLERS["wta_crs"])
    layer = sampled.get_submodule("0.q")
    assert isinstance(layer, SampledLinear)
    with torch.no_grad():
        kept = [layer.sampled.keep(x, None, lambda: x.view(-1, N)) for _ in range(2)]
    assert kept[0].rows is not None
    assert kept[1].rows is not None
    assert not torch.equal(kept[0].rows, kept[1].rows)


COMPACT: dict[str, Callable[[nn.Module], Any]] = {
    "columns": lambda m: Grass(m, density=0.5, side="columns", lr=0.0),
    "rows": lambda m: Grass(m, density=0.5, side="rows", lr=0.0),
    "projected": lambda m: GaLore(m, density=0.5, lr=0.0),
}


@pytest.mark.quick("wta_crs-columns", "rad-rows")
@pytest.mark.parametrize("compact", COMPACT.values(), ids=COMPACT)
@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_compact_layers_sample_what_they_keep(compact: Callable[[nn.Module], Any], make: Callable[[], Sampler]) -> None:
    x, sampled, plain, whole = inputs(4, 6, N), model().eval(), model().eval(), model().eval()
    sample_linears(sampled, None, make)
    sample_linears(whole, None, lambda: WtaCrs(1.0))
    for of in (sampled, plain, whole):
        compact(of)
    expected = gradients(plain, plain, x)
    assert all(torch.equal(found, expected[name]) for name, found in gradients(whole, whole, x).items())

    found: dict[str, list[Tensor]] = {}
    torch.manual_seed(11)
    for _ in range(120):
        sampled.zero_grad()
        y = sampled(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        for name, p in sampled.named_parameters():
            if p.grad is not None:
                found.setdefault(name, []).append(p.grad.clone())
    compact_names = [name for name in found if name.endswith("compact")]
    assert len(compact_names) == 8
    for name, grads in found.items():
        if name in compact_names:
            assert not torch.equal(grads[0], expected[name])
            assert_mean(torch.stack(grads), expected[name])
        else:
            assert torch.equal(grads[0], expected[name])


def saved_bytes(of: nn.Module, x: Tensor) -> int:
    """Of the storages that forward saves, each once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in of.parameters()}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept_alive = of(x)
    assert kept_alive.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def test_layers_of_one_input_keep_one_sample() -> None:
    dim, tokens = 64, 500
    plain, sampled, x = model(dim).eval(), model(dim).eval(), torch.randn(tokens, dim, dtype=torch.float64)
    x.requires_grad_()
    sample_linears(sampled, None, lambda: WtaCrs(0.3))
    # Two inputs a block, of which tanh keeps one whole; each sample has its rows' numbers.
    saved = 8 * (2 * tokens * dim - 2 * (150 * dim + 150) * 2)
    assert saved_bytes(plain, x) - saved_bytes(sampled, x) == saved


def test_who_keeps_the_whole_of_a_sampled_input_is_said_once() -> None:
    sampled, x = model(), inputs(4, 6, N)
    sample_linears(sampled, ["*.v"], SAMPLERS["wta_crs"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            sampled(x)
    told = [str(one.message) for one in said]
    assert [text.split()[2] for text in told] == ["0.q", "0.k"]


def test_evaluation_draws_nothing() -> None:
    sampled = model().eval()
    sample_linears(sampled, None, SAMPLERS["wta_crs"])
    before = torch.get_rng_state()
    with torch.no_grad():
        sampled(inputs(4, 6, N))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WtaCrs(0.0), r"keep: expected a share in \(0, 1\], got 0.0"),
        (lambda: WtaCrs(0.5, min_rows=1), "min_rows: expected at least 2, got 1"),
        (lambda: Rad(1.5), r"keep: expected a share in \(0, 1\], got 1.5"),
        (lambda: sample_linears(model(), ["*.nothing"], SAMPLERS["rad"]), "'\\*.nothing' matches no nn.Linear"),
    ],
)
def test_bad_input(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Sampled(Model):
    def __init__(self) -> None:
        super().__init__()
        sample_linears(self, ["blocks.*"], lambda: WtaCrs(0.3, min_rows=2))


def sampled_run(engine_name: str, case: str, stage: int) -> tuple[list[float], dict[str, Tensor]]:
    engine = make_engine(engine_name, CASES[case], stage=stage, model=Sampled)
    torch.manual_seed(dist.get_rank())
    found = train(engine, 0, 5), weights_of(engine)
    finish(engine)
    return found


@pytest.mark.quick("Grass-columns-3", "AdamW-1")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("case", ["AdamW", "Grass-columns", "GaLore"])
def test_engines_train_alike_on_equal_draws(two_ranks: RankPool, case: str, stage: int) -> None:
    expected_losses, expected = two_ranks.run(sampled_run, "ddp", case, 0)[0]
    for found, weights in two_ranks.run(sampled_run, "deepspeed", case, stage):
        assert found == pytest.approx(expected_losses, abs=1e-5)
        assert worst(weights, expected) < 1e-4
    exact, _ = two_ranks.run(plain_run, case)[0]
    assert expected_losses != pytest.approx(exact, abs=1e-5)


@pytest.mark.slow
def test_dropout_is_drawn_alike_after_a_resume(corpus: Path, tmp_path: Path) -> None:
    found = []
    for name, last in (("whole", None), ("cut", 1)):
        (tmp_path / name).mkdir()
        path = tiny_config(corpus, tmp_path / name)
        config = json.loads(path.read_text())
        config["model"]["config"] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}
        config["training"] |= {"steps": 3, "checkpoint_interval": 1, "lr_schedule": None}
        path.write_text(json.dumps(config))
        for words in [["--set", f"training.steps={last}"], []] if last else [[]]:
            result = forked.run("train", str(path), *words)
            assert result.returncode == 0, result.stderr
        found.append(losses(path.parent / "run"))
    assert found[0] == found[1]


def plain_run(case: str) -> tuple[list[float], dict[str, Tensor]]:
    engine = make_engine("ddp", CASES[case], stage=0)
    found = train(engine, 0, 5), weights_of(engine)
    finish(engine)
    return found


def run_in(folder: Path, corpus: Path, changes: dict[str, Any], *stops: int, ranks: int) -> dict[int, float]:
    """The losses of a run of six steps that is stopped after some of them and goes on."""
    folder.mkdir()
    path = tiny_config(corpus, folder, **{name: value for name, value in changes.items() if name != "model"})
    config = json.loads(path.read_text())
    config["training"] |= {"steps": 6, "checkpoint_interval": 3, "lr_schedule": None}
    config["model"] |= changes.get("model", {})
    path.write_text(json.dumps(config))
    for words in (*(["--set", f"training.steps={stop}"] for stop in stops), []):
        result = forked.run("train", str(path), *words, ranks=ranks)
        assert result.returncode == 0, result.stderr
        said = " ".join((result.stdout + result.stderr).split())
        assert "sampled backward: 14 of 15 linear layers keep 40% of the" in said
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert len(summary["sampled_backward"]["layers"]) == 14
    return losses(folder / "run")


RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "wta_crs": (1, {"zero_optimization": {"stage": 3}}),
    "rad": (1, {"zero_optimization": {"stage": 3}}),
    "ddp": (2, {"engine": "ddp", "zero_optimization": {"stage": 0}}),
    "non-reentrant": (2, {"model": {"gradient_checkpointing": "non-reentrant"}}),
    "reentrant": (2, {"model": {"gradient_checkpointing": "reentrant"}}),
}


@pytest.mark.quick("wta_crs")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_with_its_draws(corpus: Path, tmp_path: Path, name: str) -> None:
    """And recomputes with them."""
    ranks, changes = RUNS[name]
    changes = {**changes, "sampled_backward": {"method": "rad" if name == "rad" else "wta_crs", "keep": 0.4}}
    whole = run_in(tmp_path / "whole", corpus, changes, ranks=ranks)
    assert run_in(tmp_path / "cut", corpus, changes, 3, ranks=ranks) == whole
    if "model" in changes:
        del changes["model"]
        assert run_in(tmp_path / "kept", corpus, changes, ranks=ranks) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (['sampled_backward={"method": "rad", "keep": 0}'], "sampled_backward.keep: expected greater than 0"),
        (['sampled_backward={"method": "wta_crs", "keep": 0.3, "target_modules": ["*.query"]}'], "'*.query' matches"),
        (['sampled_backward={"method": "rad", "keep": 0.5, "min_rows": 4}'], "min_rows is of the method 'wta_crs'"),
        (
            ['sampled_backward={"method": "rad", "keep": 0.5}', 'quantization={"method": "bitnet"}'],
            "sampled_backward: expected no quantization beside it",
        ),
        (
            ['sampled_backward={"method": "rad", "keep": 0.5}', "engine=megatron", "zero_optimization.stage=0"],
            "sampled_backward: expected engine 'deepspeed' or 'ddp', got 'megatron'",
        ),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_sampled_is_refused(corpus: Path, tmp_path: Path, words: list[str], message: str) -> None:
    settings = [word for setting in words for word in ("--set", setting)]
    result = forked.run("train", str(tiny_config(corpus, tmp_path)), *settings)
    assert result.returncode == 2, result.stdout
    assert message in " ".join(result.stderr.split())


class Hidden(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).last_hidden_state


def transformer(family: str) -> Hidden:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 100}
    if family == "llama":
        return Hidden(LlamaModel(LlamaConfig(num_attention_heads=4, use_cache=False, **sizes)))
    dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return Hidden(BertModel(BertConfig(num_attention_heads=4, **sizes, **dropout), add_pooling_layer=False))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_bytes_that_a_model_as_it_is_saves_no_longer(family: str) -> None:
    """The inputs of queries, keys and values, of the first and of the last matrices of the MLP; attention itself keeps
    its output.
    """
    tokens, plain, sampled = torch.arange(400).view(4, 100) % 100, transformer(family), transformer(family)
    assert len(sample_linears(sampled, None, lambda: WtaCrs(0.3))) == {"llama": 14, "bert": 12}[family]
    whole, kept = 400 * (64 + 64 + 160), 120 * (64 + 64 + 64 + 160)
    expected = 2 * (4 * whole - 4 * kept - 4 * 8 * 120)
    assert saved_bytes(plain, tokens) - saved_bytes(sampled, tokens) == expected
