"""Sequences that process ranks share: together they have each position once, and their losses add up to the whole."""

import pytest
import torch
from megatron.core.utils import get_batch_on_this_cp_rank

from narrowgauge.engine.backends.megatron.layout import Layout, Sizes
from narrowgauge.engine.backends.megatron.micro_batches import Given, positions_at
from narrowgauge.engine.backends.megatron.rehearse import group_of
from narrowgauge.engine.backends.megatron.sequence_pieces import in_order, positions_on

LENGTH = 24


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_each_position_is_on_one_rank(num_ranks: int) -> None:
    """In the order of Megatron's own cutting, which Transformer Engine's attention expects; as many pairs on each."""
    parts = [positions_on(rank, num_ranks, LENGTH) for rank in range(num_ranks)]
    assert sorted(torch.cat(parts).tolist()) == [*range(LENGTH)]
    assert torch.equal(in_order(torch.cat(parts), num_ranks), torch.arange(LENGTH))
    assert len({int((part + 1).sum()) for part in parts}) == 1
    for rank, part in enumerate(parts):
        with group_of(rank, num_ranks):
            group = torch.distributed.group.WORLD
            theirs = get_batch_on_this_cp_rank({"tokens": torch.arange(LENGTH)[None]}, cp_group=group)
        assert torch.equal(theirs["tokens"][0], part)


@pytest.mark.parametrize("is_learned", [None, "some"])
def test_losses_of_the_parts_add_up(is_learned: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(9, (2, LENGTH), generator=generator)
    losses = torch.rand(2, LENGTH, generator=generator, dtype=torch.float64)
    learned, weight = None, 1.0
    if is_learned is not None:
        learned, weight = (torch.rand(2, LENGTH, generator=generator) < 0.3).double(), 1.5
        learned[:, -1] = 0.0
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    whole = Given(tokens, learned, mask, weight)
    layout = Layout.of(Sizes(context=3, tensor=2, expert_tensor=2), 12)
    total, seen = torch.zeros((), dtype=torch.float64), 0
    for rank in (0, 2, 4):  # three that share a sequence, of the first of two data-parallel ones
        positions = positions_at(layout, layout.place_of(rank), tokens)
        assert positions is not None
        own = Given(tokens, learned, mask, weight, positions)
        inputs = own.inputs()
        assert torch.equal(inputs["input_ids"], tokens[:, positions])
        assert torch.equal(inputs["labels"][:, :-1], tokens[:, (positions[:-1] + 1) % LENGTH])
        assert torch.equal(inputs["attention_mask"].sum(-1)[0, 0], positions + 1)
        total, seen = total + own.loss(losses[:, positions]), seen + inputs["input_ids"].numel()
    assert seen == tokens.numel()
    torch.testing.assert_close(total, whole.loss(losses), rtol=1e-12, atol=0)


def test_where_ranks_stand() -> None:
    """Neighbours share matrices, then sequences, then data, then layers; what divides a sequence's length."""
    layout = Layout.of(Sizes(tensor=2, context=2, pipeline=2, expert_tensor=2, sequence_parallel=True), 16)
    assert (layout.data, layout.replicas, layout.length_divisor, layout.length_shares) == (2, 4, 4, 4)
    assert layout.describe() == "TP2 CP2 PP2 DP2 SP"
    place = layout.place_of(14)
    assert (place.tensor, place.context, place.data, place.replica, place.pipeline) == (0, 1, 1, 3, 1)
    assert Layout.of(Sizes(tensor=3, context=2, expert_tensor=3, sequence_parallel=True), 6).length_divisor == 12
