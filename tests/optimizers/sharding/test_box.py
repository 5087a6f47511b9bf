"""Slices of a matrix, as tensor parallelism cuts it, against the whole matrix."""

import math

import pytest
import torch
from torch import Tensor

from narrowgauge.optimizers.numerics.precision import write_back
from narrowgauge.optimizers.sharding.blocks import blocks_of
from narrowgauge.optimizers.sharding.box import Box
from narrowgauge.optimizers.sharding.shards import Shard

SHAPE = (7, 10)
# Column-parallel linears have some of the rows, row-parallel ones some of the columns.
BOXES = {
    "column-parallel": Box(SHAPE, (2, 0), (3, 10)),
    "row-parallel": Box(SHAPE, (0, 4), (7, 3)),
    "both": Box(SHAPE, (1, 5), (4, 5)),
    "whole": Box.whole(SHAPE),
}
EACH = pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
# A shard may begin and end anywhere in its box.
CUTS = pytest.mark.parametrize(("first", "last"), [(0, 0), (2, 4), (1, 1)])


def slice_of(whole: Tensor, box: Box) -> Tensor:
    rows, columns = (slice(o, o + n) for o, n in zip(box.offsets, box.local, strict=True))
    return whole[rows, columns].contiguous()


def shard_of(local: Tensor, box: Box, first: int, last: int) -> Shard:
    return Shard("w", SHAPE, first, local.numel() - first - last, local, first, box)


@EACH
@CUTS
def test_a_slice_is_rounded_as_the_whole_is(box: Box, first: int, last: int) -> None:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    whole = torch.zeros(SHAPE, dtype=torch.bfloat16)
    write_back(whole, values, seed=5)
    assert not torch.equal(whole, values.bfloat16())
    local = torch.zeros(box.local, dtype=torch.bfloat16)
    shard = shard_of(local, box, first, last)
    write_back(shard.of(local), shard.of(slice_of(values, box)), seed=5, position=shard.position)
    assert torch.equal(shard.of(local), shard.of(slice_of(whole, box)))


@EACH
@CUTS
def test_blocks_and_runs_say_where_in_the_whole_they_lie(box: Box, first: int, last: int) -> None:
    numbers = torch.arange(70).view(SHAPE)
    local = slice_of(numbers, box)
    shard = shard_of(local, box, first, last)
    piece = shard.of(local)
    blocks = list(blocks_of(shard))
    assert len(blocks) <= 3
    for block in blocks:
        expected = numbers[block.row : block.row + block.num_rows, block.column : block.column + block.num_columns]
        assert torch.equal(block.of(piece), expected)
    assert sum(block.num_rows * block.num_columns for block in blocks) == shard.length
    runs = list(shard.runs())
    found = torch.cat([torch.arange(position, position + length) for position, _, length in runs])
    assert torch.equal(found, piece)
    assert [at for _, at, _ in runs] == [sum(length for *_, length in runs[:i]) for i in range(len(runs))]
    assert torch.equal(box.positions(first, shard.length), piece)


@EACH
@CUTS
def test_the_start_is_one_of_the_whole_or_refused(box: Box, first: int, last: int) -> None:
    """It was that of the slice once, so that optimizers would have taken other elements for theirs."""
    shard = shard_of(torch.zeros(box.local), box, first, last)
    if len(list(shard.runs())) == 1:
        assert shard.start == slice_of(torch.arange(70).view(SHAPE), box).flatten()[first]
    else:
        with pytest.raises(ValueError, match=r"w: expected elements that are neighbours"):
            _ = shard.start


def test_how_many_runs_a_slice_is() -> None:
    """A column-parallel slice is one run of the flattened matrix; a row-parallel one is one for each row."""
    counts = {name: len(list(box.runs(0, box.local[0] * box.local[1]))) for name, box in BOXES.items()}
    assert counts == {"column-parallel": 1, "row-parallel": 7, "both": 4, "whole": 1}


def test_positions_are_found_again_in_a_box_that_shares_some_of_them() -> None:
    """A box of columns and a box of rows of one matrix, and a plane of a stack."""
    for shape, one, other in (
        ((6, 8), ((0, 4), (6, 4)), ((2, 0), (3, 8))),
        ((3, 4, 5), ((1, 0, 2), (1, 4, 3)), ((0, 1, 0), (3, 2, 5))),
    ):
        whole = torch.arange(math.prod(shape)).view(shape)
        box, target = Box(shape, *one), Box(shape, *other)
        slices = tuple(slice(first, first + size) for first, size in zip(*one, strict=True))
        values = whole[slices].reshape(-1)
        positions = target.positions(0, math.prod(target.local))
        found, is_inside = box.locate(positions)
        assert set(positions[is_inside].tolist()) == set(positions.tolist()) & set(values.tolist())
        assert torch.equal(values[found[is_inside]], positions[is_inside])
        assert box.overlaps(target)
    assert not Box((6, 8), (0, 4), (6, 4)).overlaps(Box((6, 8), (0, 0), (6, 4)))
