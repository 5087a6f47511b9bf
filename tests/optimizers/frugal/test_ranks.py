"""FRUGAL on several process ranks: on shards that are cut anywhere, and with a majority vote of signs."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from narrowgauge.optimizers.frugal.frugal import Frugal
from tests.support.models import TinyTransformer, tiny
from tests.support.partition import Partition, gather_pieces, scatter_pieces
from tests.support.ranks import RankPool

STEPS, INTERVAL = 10, 3
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "density": 0.3,
    "refresh_interval": INTERVAL,
    "weight_decay": 0.1,
    "matrix_lr_scale": 0.5,
    "seed": 3,
}
SELECTIONS = ("columns", "rows", "randk", "blockwise", "svd", "random")


# Shards that are cut anywhere.


def gradients(step: int) -> Iterator[tuple[str, Tensor]]:
    """A gradient for every parameter of the tiny model."""
    generator = torch.Generator().manual_seed(step)
    for name, parameter in TinyTransformer().named_parameters():
        yield name, torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


class Run:
    """The optimizer on the tiny model, its parameters whole or cut over the ranks; the same gradients for all.

    Attributes:
        summed: elements of each tensor that was summed over the ranks.
    """

    def __init__(self, options: dict[str, Any], cuts: Sequence[float] | None) -> None:
        self.model = tiny(dtype=torch.float64)
        self.optimizer = Frugal(self.model, **{**OPTIONS, **options})
        self.summed: list[int] = []
        self.partition = None if cuts is None else Partition(self.model, self.optimizer, cuts)
        if self.partition is not None:
            sum_ = self.partition.sum_

            def counting(tensor: Tensor) -> Tensor:
                self.summed.append(tensor.numel())
                return sum_(tensor)

            self.partition.sum_ = counting  # type: ignore[method-assign]

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            for name, gradient in gradients(step):
                self.model.get_parameter(name).grad = gradient
            self.partition.step() if self.partition is not None else self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def num_moments(self) -> int:
        return sum(state["exp_avg"].numel() for state in self.optimizer.state.values())


CUT_CASES: list[dict[str, Any]] = [
    *({"selection": selection} for selection in SELECTIONS),
    {"selection": "columns", "density": 1.0},
    {"selection": "svd", "embeddings": "projected", "head": "free", "norms": "free"},
    {"selection": "randk", "embeddings": "projected", "head": "projected"},
    {"selection": "blockwise", "embeddings": "projected", "head": "projected", "block_order": "descending"},
]
CUTS = {2: [0.37], 3: [0.21, 0.58]}


def cut_against_whole(options: dict[str, Any]) -> dict[str, Any]:
    run, whole = Run(options, CUTS[dist.get_world_size()]), Run(options, None)
    for made in (run, whole):
        made.train(0, STEPS)
    moments = torch.tensor(run.num_moments())
    dist.all_reduce(moments)
    expected = whole.weights()
    return {
        "error": max(float((value - expected[name]).abs().max()) for name, value in run.weights().items()),
        "moments": (int(moments), whole.num_moments()),
        "refreshes": run.optimizer.num_refreshes,
        "summed": run.summed,
        "formula": run.optimizer.bytes_summed(itemsize=8),
    }


@pytest.mark.cover(1)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("options", CUT_CASES, ids=str)
def test_shards_cut_anywhere_equal_whole_parameters(
    two_ranks: RankPool, three_ranks: RankPool, options: dict[str, Any], size: int
) -> None:
    """Flat tensors with the ends of some parameters, whole ones, the beginnings of others, and padding."""
    for result in (two_ranks if size == 2 else three_ranks).run(cut_against_whole, options):
        assert result["refreshes"] == 3
        assert result["error"] < 1e-11
        assert result["moments"][0] == result["moments"][1]
        step, refresh = result["formula"]["step"], result["formula"]["refresh"]
        assert 8 * sum(result["summed"]) == STEPS * step + 4 * refresh
        assert (step > 0) == (options["selection"] in ("svd", "random"))


def save_cut(options: dict[str, Any], steps: int) -> tuple[Any, ...]:
    run = Run(options, CUTS[dist.get_world_size()])
    run.train(0, steps)
    return run.weights(), gather_pieces(run.optimizer), run.optimizer.subspace_state()


def resume_cut(options: dict[str, Any], steps: int, saved: tuple[Any, ...]) -> float:
    weights, pieces, subspace = saved
    run = Run(options, CUTS[dist.get_world_size()])
    run.train(0, 2)
    assert run.partition is not None
    run.optimizer.load_subspace_state(subspace)
    for shard in run.partition.all_shards():
        shard.of(shard.flat).copy_(weights[shard.name].view(-1)[shard.start : shard.start + shard.length])
    scatter_pieces(run.optimizer, pieces)
    for state in run.optimizer.state.values():
        state.update(step=steps, since_refresh=steps % INTERVAL)
    run.train(steps, STEPS)
    whole = Run(options, None)
    whole.train(0, STEPS)
    expected = whole.weights()
    return max(float((value - expected[name]).abs().max()) for name, value in run.weights().items())


@pytest.mark.parametrize(
    ("options", "saved_after"),
    [*((options, 5) for options in CUT_CASES), (CUT_CASES[0], 3), (CUT_CASES[7], 3)],
    ids=str,
)
def test_pieces_of_three_ranks_load_on_two(
    two_ranks: RankPool, three_ranks: RankPool, options: dict[str, Any], saved_after: int
) -> None:
    """As checkpoints do it: by name, key and position, whatever the cuts were."""
    saved = three_ranks.run(save_cut, options, saved_after)[0]
    assert max(two_ranks.run(resume_cut, options, saved_after, saved)) < 1e-11


# Majority vote.


class Traffic:
    """Records the bytes that this rank puts into collectives."""

    def __init__(self) -> None:
        self.reduced: list[int] = []
        self.gathered: list[int] = []
        self._all_reduce, self._all_gather = dist.all_reduce, dist.all_gather_into_tensor

    def __enter__(self) -> "Traffic":
        def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.reduced.append(tensor.numel() * tensor.element_size())
            return self._all_reduce(tensor, *args, **kwargs)

        def all_gather(output: Tensor, own: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.gathered.append(own.numel() * own.element_size())
            return self._all_gather(output, own, *args, **kwargs)

        dist.all_reduce, dist.all_gather_into_tensor = all_reduce, all_gather
        return self

    def __exit__(self, *exc: Any) -> None:
        dist.all_reduce, dist.all_gather_into_tensor = self._all_reduce, self._all_gather


def rank_gradients(step: int, rank: int, *, zeros: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    found = {}
    for name, parameter in TinyTransformer().named_parameters():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if zeros:
            gradient *= torch.rand(parameter.shape, generator=generator) < 0.7
        found[name] = gradient
    return found


def majority_vote(selection: Any, zeros: bool) -> dict[str, Any]:
    """Train on every rank's own gradients, and once more from all ranks' gradients by the definition."""
    size = dist.get_world_size()
    options: dict[str, Any] = {**OPTIONS, "selection": selection, "embeddings": "projected", "head": "free"}
    model, twin = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = Frugal(model, reduction="majority_vote", **options)
    single = Frugal(twin, **options)
    worst, ties, traffic = 0.0, 0, []
    for step in range(STEPS):
        everyone = [rank_gradients(step, rank, zeros=zeros) for rank in range(size)]
        for name, parameter in model.named_parameters():
            parameter.grad = everyone[dist.get_rank()][name]
        expected = optimizer.bytes_summed(itemsize=8)["step"]
        with Traffic() as sent:
            optimizer.step()
        traffic.append((sum(sent.reduced), sum(sent.gathered), expected))
        # Where a coordinate is state-full the mean, elsewhere the sum of signs, of which signSGD takes the sign.
        for name, parameter in twin.named_parameters():
            mean = sum(g[name] for g in everyone) / size
            votes = torch.stack([g[name].sign() for g in everyone]).sum(0)
            slot = single.slots_of(parameter)[0]
            mask = torch.zeros(parameter.numel(), dtype=torch.bool)
            if slot.count == slot.shard.length:
                mask[:] = True
            else:
                for part in slot.parts():
                    part.put_(mask, mask.new_ones(part.numel()))
            parameter.grad = torch.where(mask.view_as(parameter), mean, votes)
            ties += int(((votes == 0) & ~mask.view_as(votes)).sum())
        single.step()
        for (_, found), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
            worst = max(worst, float((found - wanted).detach().abs().max()))
    free = sum(s.shard.length - s.count for p in twin.parameters() for s in single.slots_of(p))
    full = sum(s.count for p in twin.parameters() for s in single.slots_of(p))
    return {"worst": worst, "ties": ties, "traffic": traffic, "free": free, "full": full}


def check_vote(pool: RankPool, selection: str, zeros: bool, size: int) -> None:
    for result in pool.run(majority_vote, selection, zeros):
        assert result["worst"] < 1e-13
        assert (result["ties"] > 0) == (zeros or size == 2)
        for reduced, gathered, expected in result["traffic"]:
            if zeros:
                assert reduced + gathered // 2 == expected
            else:
                assert reduced + gathered == expected
        if selection == "columns":
            reduced, gathered, _ = result["traffic"][-1]
            # Two groups: each has one number more, and its bits end in a byte of their own.
            assert reduced == 8 * (result["full"] + 2)
            bits = gathered * (4 if zeros else 8)
            assert 0 <= bits - result["free"] < 16


@pytest.mark.cover(1)
@pytest.mark.parametrize("selection", ["columns", "rows", "randk", "blockwise"])
@pytest.mark.parametrize("zeros", [False, True])
def test_majority_vote_on_two_ranks(two_ranks: RankPool, selection: str, zeros: bool) -> None:
    check_vote(two_ranks, selection, zeros, 2)


@pytest.mark.cover(1)
@pytest.mark.parametrize("selection", ["columns", "randk"])
@pytest.mark.parametrize("zeros", [False, True])
def test_majority_vote_on_three_ranks(three_ranks: RankPool, selection: str, zeros: bool) -> None:
    check_vote(three_ranks, selection, zeros, 3)


def construction_messages() -> tuple[list[str], str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = Frugal(tiny())
        optimizer.defer_to_engine(optimizer.shards)
    voting = Frugal(tiny(), reduction="majority_vote")
    try:
        voting.defer_to_engine(voting.shards)
    except ValueError as error:
        return [str(w.message) for w in caught], str(error)
    return [str(w.message) for w in caught], ""


def test_what_is_not_saved_is_said_once_and_a_vote_is_refused_under_an_engine(two_ranks: RankPool) -> None:
    (first, refusal), (second, _) = two_ranks.run(construction_messages)
    assert len(first) == 1
    assert "does not shrink the traffic" in first[0]
    assert second == []
    assert "engine, which averages gradients" in refusal
