"""APOLLO against the authors' package, against a second statement of the paper, and on flat partitions."""

import copy
import warnings
from dataclasses import replace
from itertools import pairwise
from typing import Any

import apollo_torch
import pytest
import torch
from torch import Tensor

from narrowgauge.optimizers.apollo.apollo import Apollo
from narrowgauge.optimizers.apollo.channels import own_channels
from narrowgauge.optimizers.sharding.blocks import blocks_of
from narrowgauge.optimizers.sharding.shards import Shard
from tests.support.models import TinyTransformer, is_matrix, tiny, token_batch, train_steps
from tests.support.partition import Partition, gather_pieces, scatter_pieces
from tests.support.ranks import RankPool
from tests.support.references.apollo import PaperApollo

STEPS, INTERVAL = 18, 4
OPTIONS: dict[str, Any] = {
    "lr": 3e-3,
    "refresh_interval": INTERVAL,
    "betas": (0.8, 0.95),
    "eps": 1e-4,
    "weight_decay": 0.1,
    "matrix_lr_scale": 0.5,
}
KINDS: dict[str, dict[str, Any]] = {
    "channel": {"rank": 7, "scale": 1.5},
    "tensor": {"rank": 3, "scale_type": "tensor", "scale": 2.0},
    "mini": {"rank": 1, "scale_type": "tensor"},
    "no-limiter": {"rank": 7, "norm_growth_limit": None},
    "whole-rank": {"rank": 20},
}
DECAYS = [{"params": ["*norm*", "*.bias"], "weight_decay": 0.0}, {"params": ["blocks.1.*"], "lr": 1e-2}]


def difference(model: TinyTransformer, twin: TinyTransformer) -> float:
    """The largest relative difference of a parameter."""
    wanted = {name: p.detach() for name, p in twin.named_parameters()}
    return max(float((p.detach() - wanted[n]).norm() / wanted[n].norm()) for n, p in model.named_parameters())


def authors_optimizer(twin: TinyTransformer, model: TinyTransformer, ours: Apollo, disable_limiter: bool) -> Any:
    """The package's optimizer on ``twin``, unmodified, with our groups in our order, from which its seeds come."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = []
    for group in ours.param_groups:
        own = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        own["params"] = [twin.get_parameter(names[id(p)]) for p in group["params"]]
        if group["kind"] == "matrix":
            own.update(rank=ours.options.rank, proj="random", scale_type=ours.options.scale_type, scale=ours.scale**2)
            own.update(update_proj_gap=ours.options.refresh_interval, proj_type="std")
        groups.append(own)
    return apollo_torch.APOLLOAdamW(groups, lr=1.0, disable_nl=disable_limiter)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
def test_equals_the_authors_package(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """Tall, wide and square matrices, three groups, four refreshes; unmodified, weights compared at every step."""
    model, twin = tiny(dtype=dtype), tiny(dtype=dtype)
    optimizer = Apollo(model, **OPTIONS, **KINDS[kind], param_groups=DECAYS, reference_compatible=True)
    authors = authors_optimizer(twin, model, optimizer, disable_limiter=optimizer.options.norm_growth_limit is None)
    for step in range(STEPS):
        train_steps(model, optimizer, step, step + 1)
        train_steps(twin, authors, step, step + 1)
        assert difference(model, twin) < tolerance, step
    assert optimizer.num_refreshes == 4


def test_the_limiter_takes_part_in_the_comparisons() -> None:
    models = []
    for limit in (1.01, None):
        model = tiny(dtype=torch.float64)
        train_steps(model, Apollo(model, rank=7, **OPTIONS, norm_growth_limit=limit), 0, 6)
        models.append(model)
    assert difference(*models) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_paper(kind: str) -> None:
    model, twin = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    optimizer = Apollo(model, **OPTIONS, **KINDS[kind])
    paper = PaperApollo(twin, is_matrix=is_matrix, **OPTIONS, **KINDS[kind])
    drawn = set()
    for step in range(STEPS):
        paper.seeds = optimizer.subspace_state()["seeds"]
        drawn.add(tuple(paper.seeds.values()))
        train_steps(model, optimizer, step, step + 1)
        train_steps(twin, paper, step, step + 1)  # type: ignore[arg-type]
    assert difference(model, twin) < 1e-13
    assert len(drawn) == 5, "new projections at each of four refreshes, and only there"


def test_rank_one_preset_is_apollo_mini() -> None:
    model = tiny()
    optimizer = Apollo.mini(model, lr=1e-2)
    assert (optimizer.options.rank, optimizer.options.scale_type) == (1, "tensor")
    assert optimizer.scale == pytest.approx(128**0.5)
    assert Apollo.mini(model, lr=1e-2, scale=3.0).scale == 3.0
    assert Apollo(model, lr=1e-2, rank=4).scale == 1.0


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6), (1, 4)])
def test_blocks_and_channels_cover_a_cut_matrix_once(shape: tuple[int, int]) -> None:
    size = shape[0] * shape[1]
    matrix = torch.arange(float(size)).view(shape)
    for first in range(size):
        for last in range(first + 1, size + 1):
            ends = [0, first, last, size]
            found = torch.full(shape, -1.0)
            channels = []
            for start, end in pairwise(ends):
                if start == end:
                    continue
                shard = Shard("w", shape, start, end - start, matrix, 0)
                piece = matrix.view(-1)[start:end]
                blocks = list(blocks_of(shard))
                assert len(blocks) <= 3
                for block in blocks:
                    rows = slice(block.row, block.row + block.num_rows)
                    columns = slice(block.column, block.column + block.num_columns)
                    assert (found[rows, columns] == -1).all()
                    found[rows, columns] = block.of(piece)
                channels += own_channels(shard)
            assert torch.equal(found, matrix)
            assert channels == list(range(max(shape)))


def train_partitioned(options: dict[str, Any], cuts: list[float], dtype: torch.dtype) -> dict[str, Any]:
    model, twin = tiny(dtype=dtype), tiny(dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = Apollo(model, **OPTIONS, **options)
    alone = Apollo(twin, **OPTIONS, **options)
    partition = Partition(model, optimizer, cuts)
    for step in range(STEPS):
        model(token_batch(step, 4)).backward()
        partition.step()
        train_steps(twin, alone, step, step + 1)
    own, whole = optimizer.subspace_state(), alone.subspace_state()
    return {
        "difference": difference(model, twin),
        "sums": partition.num_sums,
        "warnings": [str(w.message) for w in caught if "Apollo" in str(w.message)],
        "seeds": own["seeds"] == whole["seeds"],
        "norms": own["norms"],
        "norm_error": max(abs(own["norms"].get(k, 0) / v - 1) for k, v in whole["norms"].items())
        if own["norms"]
        else 0,
        "low_rank_numbers": sum(
            piece.tensor.numel()
            for g in optimizer.param_groups
            for f in g["params"]
            for piece in optimizer.state_pieces(f)
        ),
        "matrix_elements": sum(s.length for s in partition.all_shards() if is_matrix(s.name)),
    }


def check_partitioned(results: list[dict[str, Any]], rank: int, tolerance: float) -> None:
    model = tiny()
    matrices = [p for name, p in model.named_parameters() if is_matrix(name)]
    channels = sum(max(p.shape) for p in matrices)
    (warning,) = [warning for result in results for warning in result["warnings"]]
    assert "does not shrink the traffic" in warning
    for result in results:
        assert result["difference"] < tolerance
        assert result["sums"] == 2 * STEPS, "two all-reduces for all matrices together"
        assert result["seeds"]
        assert result["norms"] == results[0]["norms"], "bit-equal on all ranks"
        assert result["norm_error"] < 1e4 * tolerance
        share = result["matrix_elements"] / sum(p.numel() for p in matrices)
        assert abs(result["low_rank_numbers"] - share * 2 * rank * channels) <= 4 * rank
    assert sum(result["low_rank_numbers"] for result in results) == 2 * rank * channels


@pytest.mark.quick("channel", "mini")
@pytest.mark.parametrize("kind", KINDS)
def test_cut_over_two_ranks_equals_one_process(two_ranks: RankPool, kind: str) -> None:
    """The matrices' moments are cut between the ranks, their norms and projections are equal on both."""
    results = two_ranks.run(train_partitioned, KINDS[kind], [0.37], torch.float64)
    check_partitioned(results, KINDS[kind]["rank"], 1e-11)


def test_cut_over_two_ranks_in_fp32_and_as_the_reference(two_ranks: RankPool) -> None:
    results = two_ranks.run(train_partitioned, KINDS["channel"], [0.61], torch.float32)
    check_partitioned(results, 7, 2e-5)
    compatible = {**KINDS["tensor"], "reference_compatible": True}
    check_partitioned(two_ranks.run(train_partitioned, compatible, [0.61], torch.float64), 3, 1e-11)


@pytest.mark.slow
def test_cut_over_three_ranks_equals_one_process(three_ranks: RankPool) -> None:
    """In the second case the middle rank has no element of any parameter."""
    for cuts in ([0.213, 0.641], [0.5, 0.5]):
        for kind in ("channel", "mini"):
            results = three_ranks.run(train_partitioned, KINDS[kind], cuts, torch.float64)
            check_partitioned(results, KINDS[kind]["rank"], 1e-11)


def save_partitioned(options: dict[str, Any], cuts: list[float], steps: int) -> dict[str, Any]:
    """Weights, pieces and counters after some steps; only matrices are trained, so the pieces are all the state."""
    model = tiny(dtype=torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_matrix(name))
    optimizer = Apollo(model, **OPTIONS, **options)
    partition = Partition(model, optimizer, cuts)
    for step in range(steps):
        model(token_batch(step, 4)).backward()
        partition.step()
    scalars = {"step": next(iter(optimizer.state.values()))["step"]}
    return {
        "weights": model.state_dict(),
        "pieces": gather_pieces(optimizer),
        "subspace": optimizer.subspace_state(),
        **scalars,
    }


def continue_partitioned(
    options: dict[str, Any], cuts: list[float], saved: dict[str, Any], first: int, last: int
) -> dict[str, Tensor]:
    model = tiny(seed=5, dtype=torch.float64)
    model.load_state_dict(saved["weights"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_matrix(name))
    optimizer = Apollo(model, **OPTIONS, **options)
    partition = Partition(model, optimizer, cuts) if cuts else None
    optimizer.load_subspace_state(saved["subspace"])
    scatter_pieces(optimizer, saved["pieces"])
    for group in optimizer.param_groups:
        for flat in group["params"]:
            optimizer.state[flat]["step"] = saved["step"]
    for step in range(first, last):
        model(token_batch(step, 4)).backward()
        if partition is not None:
            partition.step()
        else:
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["channel", pytest.param("mini", marks=pytest.mark.slow)])
def test_state_does_not_depend_on_the_cut(two_ranks: RankPool, three_ranks: RankPool, kind: str) -> None:
    """Saved on three ranks between two refreshes, continued on one and on two across the next."""
    options, cuts = KINDS[kind], [0.213, 0.641]
    saved, *others = three_ranks.run(save_partitioned, options, cuts, 6)
    assert all(other["subspace"] == saved["subspace"] for other in others)
    expected = three_ranks.run(save_partitioned, options, cuts, 11)[0]["weights"]
    alone = continue_partitioned(options, [], saved, 6, 11)
    for found in (alone, *two_ranks.run(continue_partitioned, options, [0.37], saved, 6, 11)):
        for name, value in expected.items():
            assert float((found[name] - value).norm() / value.norm()) < 1e-12, name


@pytest.mark.cover(2)
@pytest.mark.parametrize("kind", ["channel", "mini"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compatible", [False, True])
def test_continues_bit_equal_from_its_state(kind: str, dtype: torch.dtype, compatible: bool) -> None:
    """Saved between two refreshes, continued across the next."""
    options = {**OPTIONS, **KINDS[kind], "reference_compatible": compatible}
    model = tiny(dtype=dtype)
    optimizer = Apollo(model, **options)
    train_steps(model, optimizer, 0, 6)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train_steps(model, optimizer, 6, 12)
    other = tiny(seed=3, dtype=dtype)
    other.load_state_dict(weights)
    resumed = Apollo(other, **{**options, "seed": 9})
    resumed.load_state_dict(state)
    resumed.options = replace(resumed.options, seed=0)
    assert train_steps(other, resumed, 6, 12) == expected
    found = other.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())


def test_state_is_two_moments_of_rank_numbers_per_channel_and_nothing_else() -> None:
    """No projection is kept between steps: every tensor that the optimizer or its state holds is counted."""
    model = tiny()
    optimizer = Apollo(model, rank=7, **OPTIONS)
    train_steps(model, optimizer, 0, 3)
    matrices = {name: p for name, p in model.named_parameters() if is_matrix(name)}
    others = [p for name, p in model.named_parameters() if not is_matrix(name)]
    expected = 2 * 7 * sum(max(p.shape) for p in matrices.values()) + 2 * sum(p.numel() for p in others)
    found = sum(v.numel() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))
    assert found == expected
    held = [v for v in vars(optimizer).values() if torch.is_tensor(v)]
    held += [v for d in vars(optimizer).values() if isinstance(d, dict) for v in d.values() if torch.is_tensor(v)]
    assert sum(v.untyped_storage().nbytes() for v in held) == 4 * len(matrices), "one norm per matrix"


def test_a_matrix_without_a_gradient_once_moves_again() -> None:
    """The limiter would allow 1.01 times nothing for ever; the factor of a zero gradient is 0/0."""
    model = tiny()
    optimizer = Apollo(model, rank=7, **{**OPTIONS, "weight_decay": 0.0})
    weight = model.get_parameter("blocks.0.q.weight")
    for step, silent in enumerate((False, True, False)):
        before = weight.detach().clone()
        model(token_batch(step, 4)).backward()
        if silent:
            torch.nn.init.zeros_(weight.grad)  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(weight).all()
        moved = float((weight.detach() - before).norm())
        assert moved == 0.0 if silent else moved > 1e-4


def test_bf16_parameters_follow_fp32() -> None:
    """The computation and the moments are in fp32; steps smaller than bf16's spacing add up."""
    model, twin = tiny(dtype=torch.bfloat16), tiny(dtype=torch.bfloat16).float()
    options: dict[str, Any] = {"rank": 7, "refresh_interval": INTERVAL, "lr": 1e-4, "norm_growth_limit": None}
    optimizers = Apollo(model, **options), Apollo(twin, **options)
    start = {name: p.detach().clone() for name, p in twin.named_parameters()}
    for _ in range(60):
        for name, p in model.named_parameters():
            p.grad = start[name].sign().bfloat16()
            twin.get_parameter(name).grad = start[name].sign()
        for optimizer in optimizers:
            optimizer.step()
    assert all(v.dtype == torch.float32 for s in optimizers[0].state.values() for v in s.values() if torch.is_tensor(v))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            moved = float((start[name] - p.detach().float()).mul(start[name].sign()).mean())
            expected = float((start[name] - twin.get_parameter(name).detach()).mul(start[name].sign()).mean())
            assert expected > 1e-3, name
            assert abs(moved / expected - 1) < 0.15, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: expected an integer of at least 1, got 0"),
        ({"rank": 21}, "rank: 21 is above the shorter side 20 of 'blocks.0.q.weight'; at most 20 fits"),
        ({"refresh_interval": 0}, "refresh_interval: expected an integer of at least 1 or None, got 0"),
        ({"scale_type": "row"}, r"scale_type: expected one of \['channel', 'tensor'\], got 'row'"),
        ({"scale": -1.0}, "scale: expected a number above 0 or None, got -1.0"),
        ({"norm_growth_limit": 1.0}, "norm_growth_limit: expected a number above 1 or None, got 1.0"),
        ({"eps": -1e-8}, "eps: expected a number of at least 0, got -1e-08"),
        ({"target_modules": ["nothing*"]}, "target_modules: 'nothing\\*' matches no nn.Linear"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Apollo(tiny(), **{"rank": 4, **options})


def test_refuses_the_state_of_another_configuration() -> None:
    state = Apollo(tiny(), rank=4).state_dict()
    optimizer = Apollo(tiny(), rank=5)
    with pytest.raises(ValueError, match="expected rank 5, got 4"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="its matrices differ"):
        Apollo(tiny(), rank=4, target_modules=["*.q"]).load_state_dict(state)
