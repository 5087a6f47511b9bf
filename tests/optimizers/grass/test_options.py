"""What else Grass offers: shared columns, carried moments, adaptive intervals, budgets, rows of the vocabulary."""

import copy
import gc
import json
import threading
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from narrowgauge.optimizers import Grass
from narrowgauge.optimizers.grass.budget import ranks_within
from narrowgauge.optimizers.grass.grass import _similarity
from narrowgauge.optimizers.grass.interval import AdaptiveInterval
from narrowgauge.optimizers.layers.selected_embedding import SelectedEmbedding
from narrowgauge.optimizers.layers.selected_linear import SelectedLinear
from narrowgauge.optimizers.layers.shared_copy import SharedCopy
from narrowgauge.optimizers.numerics.selection import SELECTION_RULES, select_index
from tests.support.models import is_matrix, tiny, token_batch, train_steps
from tests.support.ranks import RankPool
from tests.support.references.selected import SelectedReference, projections


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options}))


def saved_storages(loss_of: Any) -> dict[int, tuple[int, tuple[int, ...]]]:
    """Bytes and shape of what a forward keeps for backward, by storage; the parameters are not counted."""
    found: dict[int, tuple[int, tuple[int, ...]]] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            alive.append(tensor)
            found[tensor.untyped_storage()._cdata] = (tensor.untyped_storage().nbytes(), tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of()
    loss.backward()
    return found


def test_shared_columns_are_kept_once_and_the_gradients_are_the_same_bit_for_bit() -> None:
    """Of q, k, v two copies less per layer, of gate, up one; measured as storages that autograd keeps."""
    tokens = token_batch(0, 3, vocab=64)

    def run(share: bool) -> tuple[Any, dict[int, tuple[int, tuple[int, ...]]]]:
        model = llama()
        # The same choice in both, so that the gradients can be compared.
        optimizer = Grass(model, density=0.25, shared_inputs="siblings")
        if not share:
            for layer in optimizer.layers:
                setattr(layer.module, "shared", None)  # noqa: B010
        return model, saved_storages(lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss)

    (shared, found), (apart, wanted) = run(True), run(False)
    copy_bytes, layers = tokens.numel() * 8 * 4, 2
    copies = [sum(shape == (tokens.numel(), 8) for _, shape in kept.values()) for kept in (wanted, found)]
    # q, k, v, o, gate, up of each layer have 8 of 32 inputs; down has 12 of 48.
    assert copies == [6 * layers, 3 * layers]
    assert sum(b for b, _ in wanted.values()) - sum(b for b, _ in found.values()) == 3 * layers * copy_bytes
    for (name, one), other in zip(shared.named_parameters(), apart.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name


def test_siblings_choose_the_same_columns_at_every_refresh_and_others_do_not() -> None:
    model = llama()
    optimizer = Grass(model, density=0.25, refresh_interval=1, selection="multinomial", shared_inputs="siblings")
    for step in range(3):
        index = {layer.name: layer.module.subspace()["index"] for layer in optimizer.layers}
        for block in ("model.layers.0", "model.layers.1"):
            q, k, v = (index[f"{block}.self_attn.{name}_proj"] for name in "qkv")
            assert torch.equal(q, k)
            assert torch.equal(q, v)
            assert torch.equal(index[f"{block}.mlp.gate_proj"], index[f"{block}.mlp.up_proj"])
            assert not torch.equal(q, index[f"{block}.mlp.up_proj"])
        tokens = token_batch(step, 3, vocab=64)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(12, 7, dtype=torch.float64) for _ in range(3))


def three(**options: Any) -> tuple[Any, Grass]:
    model = nn.ModuleList([Three()])
    optimizer = Grass(model, rank=4, shared_inputs="siblings", **options)
    return model[0], optimizer


def expected(layer: SelectedLinear, x: Tensor, grad: Tensor) -> Tensor:
    return grad.t() @ x[:, layer.index]


def test_an_input_that_was_changed_in_place_is_another_input() -> None:
    model, _ = three()
    x, grad = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    first = x.clone()
    y = model.q(x)
    x.mul_(2.0)
    z = model.k(x)
    (y + z).backward(grad)
    torch.testing.assert_close(model.q.compact.grad, expected(model.q, first, grad))
    torch.testing.assert_close(model.k.compact.grad, expected(model.k, 2.0 * first, grad))


def test_views_of_one_storage_are_told_apart_and_aliases_are_not() -> None:
    model, _ = three()
    x, grad = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    outputs = [model.q(x), model.k(x.flip(0)), model.v(x[:3])]
    torch.autograd.backward(outputs, [grad, grad, grad[:3]])
    torch.testing.assert_close(model.q.compact.grad, expected(model.q, x, grad))
    torch.testing.assert_close(model.k.compact.grad, expected(model.k, x.flip(0), grad))
    torch.testing.assert_close(model.v.compact.grad, expected(model.v, x[:3], grad[:3]))
    saved = saved_storages(lambda: sum(layer(x.detach()).sum() for layer in (model.q, model.k, model.v)))
    assert [shape for _, shape in saved.values()].count((5, 4)) == 1


def test_a_new_choice_of_one_layer_or_of_all_gets_a_new_copy() -> None:
    """An input that outlives the step: a copy of the old columns is still held for the third layer."""
    model, optimizer = three(refresh_interval=1)
    x, grad = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    for _ in range(4):
        (model.q(x) + model.k(x)).backward(grad)
        torch.testing.assert_close(model.k.compact.grad, expected(model.k, x, grad))
        optimizer.step()
        optimizer.zero_grad()
    model.k.set_subspace({"index": torch.tensor([0, 1, 2, 3])})
    (model.q(x) + model.k(x)).backward(grad)
    torch.testing.assert_close(model.q.compact.grad, expected(model.q, x, grad))
    torch.testing.assert_close(model.k.compact.grad, expected(model.k, x, grad))


def test_neither_input_nor_copy_is_kept_alive() -> None:
    """Also if not all layers of the group were called, after backward, and without gradients."""
    model, _ = three()
    for layers in ("q", "qk", "qkv"):
        x = torch.randn(5, 12, dtype=torch.float64)
        alive = weakref.ref(x)
        outputs = [getattr(model, name)(x) for name in layers]
        shared: SharedCopy = model.q.shared
        held = shared.copy
        assert (held is None) == (layers == "qkv")
        kept = weakref.ref(held.untyped_storage()) if held is not None else lambda: None
        del x, held
        gc.collect()
        assert alive() is None
        assert shared.copy is None
        torch.autograd.backward([y.sum() for y in outputs])
        del outputs
        gc.collect()
        assert kept() is None
    with torch.no_grad():
        model.q(torch.randn(5, 12, dtype=torch.float64))
    assert model.q.shared.copy is None
    with torch.inference_mode():
        x = torch.randn(5, 12, dtype=torch.float64)
    model.q(x)
    assert model.q.shared.copy is None


def test_threads_with_inputs_of_their_own_get_their_own_copies() -> None:
    model, _ = three()
    failures: list[Any] = []

    def run(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(100):
            x = torch.randn(5, 12, dtype=torch.float64, generator=generator)
            for layer in (model.q, model.k, model.v):
                saved = [t for t in layer(x).grad_fn.saved_tensors if t is not None and t.shape == (5, 4)]
                if not torch.equal(saved[0], x[:, layer.index]):
                    failures.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert model.q.shared.copy is None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool, whole: bool) -> None:
    """Around all three, with the input as the argument, and around a part of the group."""
    model, _ = three()
    grad = torch.randn(5, 7, dtype=torch.float64)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
        model.zero_grad()

        def part(x: Tensor) -> Tensor:
            return model.q(x) + model.k(x) + model.v(x) if whole else model.k(x) + model.v(x)

        y = checkpoint(part, x, use_reentrant=reentrant) if checkpointed else part(x)
        assert isinstance(y, Tensor)
        (y if whole else y + model.q(x)).backward(grad)
        found.append([x.grad, *(layer.compact.grad for layer in (model.q, model.k, model.v))])
    # The three contributions to the input's gradient may be added up in another order.
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-14, atol=1e-15)
    assert all(torch.equal(one, other) for one, other in zip(found[0][1:], found[1][1:], strict=True))


def test_autocast_shares_a_copy_in_its_dtype() -> None:
    model = nn.ModuleList([Three()]).float()
    Grass(model, rank=4, shared_inputs="siblings")
    x = torch.randn(5, 12)
    block: Any = model[0]
    with torch.autocast("cpu", torch.bfloat16):
        saved = saved_storages(lambda: sum(layer(x).float().sum() for layer in (block.q, block.k, block.v)))
    assert [(size, shape) for size, shape in saved.values() if shape == (5, 4)] == [(40, (5, 4))]


def test_a_compiled_group_trains_alike() -> None:
    torch._dynamo.reset()
    model, twin = tiny(blocks=1), tiny(blocks=1)
    optimizers = [Grass(m, density=0.3, refresh_interval=2, lr=1e-3, shared_inputs="siblings") for m in (model, twin)]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(4):
        for trained, optimizer in zip((compiled, twin), optimizers, strict=True):
            trained(token_batch(step, 4)).backward()
            optimizer.step()
            optimizer.zero_grad()
    wanted = twin.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)


def test_a_copied_model_shares_within_itself() -> None:
    model, _ = three()
    x = torch.randn(5, 12, dtype=torch.float64)
    model.q(x)
    copied = copy.deepcopy(model)
    assert copied.q.shared is copied.k.shared
    assert copied.q.shared is not model.q.shared
    assert copied.q.shared.copy is None


def test_groups_by_globs() -> None:
    model = tiny()
    optimizer = Grass(model, density=0.3, shared_inputs=[["*.q", "*.v"]])
    index = {layer.name: layer.module.subspace()["index"] for layer in optimizer.layers}
    assert torch.equal(index["blocks.0.q"], index["blocks.0.v"])
    assert not torch.equal(index["blocks.0.q"], index["blocks.0.k"])
    assert not torch.equal(index["blocks.0.q"], index["blocks.1.q"])
    assert [layer.name for layer in optimizer.layers if layer.module.shared is not None] == [  # type: ignore[union-attr]
        f"blocks.{block}.{name}" for block in (0, 1) for name in "qv"
    ]
    alone = Grass(tiny(), density=0.3, shared_inputs=None)
    assert all(layer.module.shared is None for layer in alone.layers)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_inputs": "q"}, "shared_inputs: expected 'siblings' or a list of lists of globs or None, got 'q'"),
        ({"shared_inputs": [["*.q", 1]]}, "expected 'siblings' or a list of lists of globs or None, got"),
        (
            {"shared_inputs": [["*.q"]], "side": "rows"},
            "shared_inputs: expected side 'columns' with .*, got side 'rows'",
        ),
        ({"shared_inputs": [["*.query"]]}, r"shared_inputs\[0\]: \['\*.query'\] matches no two layers"),
        ({"shared_inputs": [["*.q", "*.down"]]}, r"shared_inputs\[0\]: expected layers of one input width"),
        ({"statistics": "guess"}, "statistics: expected one of .*, got 'guess'"),
        ({"sketch_size": 0}, "sketch_size: expected an integer of at least 1, got 0"),
        ({"moments": "keep"}, "moments: expected one of .*, got 'keep'"),
        (
            {"moments": "carry", "selection": "multinomial_replacement"},
            "moments: expected 'reset' with selection 'multinomial_replacement', got 'carry'",
        ),
        ({"moments": "carry", "base": "Adafactor"}, "moments: expected 'reset' with base 'Adafactor', got 'carry'"),
        ({"decay": "active", "selection": "multinomial_replacement"}, "decay: expected 'all' with .*, got 'active'"),
        (
            {"adaptive_refresh": 1.5, "selection": "top"},
            r"adaptive_refresh: expected a number in \(0, 1\] or None, got 1.5",
        ),
        ({"adaptive_refresh": 0.4}, "a selection by norms, got 100 and 'uniform'"),
        ({"adaptive_refresh": 0.4, "selection": "top", "refresh_interval": None}, "a refresh_interval and a selection"),
        ({"max_refresh_interval": 400}, "max_refresh_interval: expected None without adaptive_refresh, got 400"),
        (
            {"adaptive_refresh": 0.4, "selection": "top", "max_refresh_interval": 50},
            "max_refresh_interval: expected at least refresh_interval, 100, got 50",
        ),
        ({"rank": None, "budget": 10}, "budget: expected at least 266, one column or row of each layer, got 10"),
        ({"budget": 1000}, "exactly one of rank, density and budget"),
        ({"vocabulary": "columns"}, "vocabulary: expected one of .*, got 'columns'"),
        (
            {"vocabulary": "rows", "selection": "multinomial_replacement"},
            "vocabulary: expected 'dense' with .*, got 'rows'",
        ),
    ],
)
def test_bad_options_leave_the_model_as_it_was(options: dict[str, Any], message: str) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=message):
        Grass(model, **{"rank": 4, **options})
    assert not any(isinstance(m, SelectedLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_training_with_shared_choices_resumes() -> None:
    options: dict[str, Any] = {"density": 0.3, "refresh_interval": 3, "lr": 1e-2}
    model = tiny(dtype=torch.float64)
    optimizer = Grass(model, **options)
    train_steps(model, optimizer, 0, 4)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    wanted = train_steps(model, optimizer, 4, 10)
    other = tiny(seed=5, dtype=torch.float64)
    resumed = Grass(other, **options)
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert train_steps(other, resumed, 4, 10) == wanted


def carry_against_reference(rank: int, world_size: int, wrap: bool, **options: Any) -> dict[str, float]:
    model, twin = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    rates: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "matrix_lr_scale": 0.5}
    optimizer = Grass(model, refresh_interval=4, moments="carry", **rates, **options)
    found = projections(optimizer)
    reference = SelectedReference(twin, found, dict.fromkeys(found, options["side"]), **rates)
    trained = DistributedDataParallel(model) if wrap else model
    overlaps = set()
    for step in range(18):
        trained(token_batch(step, 8).chunk(world_size)[rank]).backward()
        twin(token_batch(step, 8)).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
        twin.zero_grad()
        if (step + 1) % 4 == 0:
            old, found = found, projections(optimizer)
            overlaps |= {float((old[name] * p.sum(1, keepdim=True)).sum()) / p.shape[1] for name, p in found.items()}
            reference.select(found, carry=True)
    counts = {
        float(optimizer.state[p]["step"])
        for group in optimizer.param_groups
        if group["kind"] == "compact"
        for p in group["params"]
    }
    assert counts == {18.0}
    wanted = twin.state_dict()
    return {
        "weights": max(float((v - wanted[k]).norm() / wanted[k].norm()) for k, v in model.state_dict().items()),
        "least": min(overlaps),
        "most": max(overlaps),
    }


@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("selection", ["uniform", "block", "multinomial"])
def test_carried_moments_equal_the_reference_in_fp64(side: str, selection: str) -> None:
    """Some entries stay, some are new; with blocks all stay or none."""
    result = carry_against_reference(0, 1, False, side=side, selection=selection, density=0.3)
    assert result["least"] == 0.0 or selection == "multinomial"
    assert result["most"] > 0.0
    assert (result["most"] == 1.0) == (selection == "block")
    assert result["weights"] < 1e-12


def carry_under_ddp(side: str) -> dict[str, float]:
    options: dict[str, Any] = {"side": side, "selection": "uniform", "density": 0.4}
    return carry_against_reference(dist.get_rank(), dist.get_world_size(), True, **options)


def test_carried_moments_under_ddp_equal_the_reference_in_fp64(two_ranks: RankPool) -> None:
    for result in two_ranks.run(carry_under_ddp, "columns"):
        assert result["weights"] < 1e-12


def test_an_adaptive_interval_doubles_while_the_last_five_are_similar_enough() -> None:
    interval = AdaptiveInterval(10, threshold=0.4, longest=50)
    seen = [interval.observe(similarity) for similarity in (1.0, 0.5, 0.3, 0.1, 0.0, 0.8, 0.8, 0.8, -0.2, 0.8, 0.8, 0)]
    # Means of five: 0.38 | 0.34 | 0.4 | 0.5 | 0.44 | 0.6 | 0.6 | 0.44, capped.
    assert seen == [10, 10, 10, 10, 10, 10, 20, 40, 50, 50, 50, 50]
    assert interval.next_refresh == 10 + sum(seen)
    other = AdaptiveInterval(10, threshold=0.4, longest=50)
    other.load_state(json.loads(json.dumps(interval.state())))
    assert (other.observe(-9.0), other.next_refresh) == (interval.observe(-9.0), interval.next_refresh)


def test_an_interval_never_shrinks_to_a_longest_that_was_lowered() -> None:
    interval = AdaptiveInterval(10, threshold=0.4, longest=50)
    interval.load_state({"interval": 80, "next_refresh": 160, "recent": [1.0] * 5})
    assert interval.observe(1.0) == 80


def refresh_steps(model: nn.Module, optimizer: Grass, first: int, last: int) -> list[int]:
    found = []
    for step in range(first, last):
        before = optimizer.num_refreshes
        train_steps(model, optimizer, step % 4, step % 4 + 1)
        if optimizer.num_refreshes > before:
            found.append(step + 1)
    return found


def test_the_interval_of_an_optimizer_grows_when_its_choices_stand_still() -> None:
    """A learning rate of 0 and four batches in turn: ``top`` keeps choosing alike; and it resumes where it was."""
    options: dict[str, Any] = {"density": 0.3, "lr": 0.0, "selection": "top", "statistics": "exact"}
    options |= {"refresh_interval": 4, "adaptive_refresh": 0.9, "max_refresh_interval": 12}
    model = tiny()
    optimizer = Grass(model, **options)
    steps = refresh_steps(model, optimizer, 0, 70)
    # The first refresh replaces a uniform choice; the mean of five reaches 0.9 when that has left the window.
    assert steps == [4, 8, 12, 16, 20, 24, 32, 44, 56, 68]
    resumed_model = tiny()
    resumed = Grass(resumed_model, **options)
    early = Grass(tiny(), **options)
    refresh_steps(resumed_model, resumed, 0, 27)
    early.load_state_dict(resumed.state_dict())
    assert resumed.subspace_state()["interval"]["next_refresh"] == 32
    assert early.subspace_state()["interval"] == resumed.subspace_state()["interval"]
    with pytest.raises(ValueError, match="expected one with adaptive_refresh, got one without"):
        early.load_state_dict(Grass(tiny(), density=0.3, selection="top").state_dict())


def test_similarity_is_measured_above_chance() -> None:
    """Independent choices: 0 within the sampling error, also where they repeat; equal ones: 1."""
    for rule in ("uniform", "multinomial_replacement"):
        choices = [
            select_index(SELECTION_RULES[rule], 40, 12, seed=0, refresh=refresh, name="a") for refresh in range(2001)
        ]
        found = [_similarity([a], [b], [40]) for a, b in pairwise(choices)]
        assert sum(found) / len(found) == pytest.approx(0.0, abs=0.02)
        assert _similarity(choices[:3], choices[:3], [40] * 3) == pytest.approx(1.0)


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_a_budget_is_met_within_two_percent_with_one_density(side: str) -> None:
    whole = sum(p.numel() for n, p in tiny(width=64, hidden=150).named_parameters() if is_matrix(n))
    for share in (0.05, 0.123, 0.5, 0.9):
        model = tiny(width=64, hidden=150)
        budget = round(share * whole)
        optimizer = Grass(model, budget=budget, side=side, shared_inputs="siblings")  # type: ignore[arg-type]
        found = sum(layer.module.compact.numel() for layer in optimizer.layers)
        assert 0.98 * budget <= found <= budget
        for layer in optimizer.layers:
            dim = layer.module.weight_shape[1 if side == "columns" else 0]
            rank = layer.module.subspace()["index"].numel()
            assert abs(rank - share * dim) < 2.0


def test_budgets_at_the_ends() -> None:
    dims = {"a": (10, 7), "b": (4, 100)}
    assert ranks_within(dims, 107) == {"a": 1, "b": 1}
    assert ranks_within(dims, 470) == {"a": 10, "b": 4}
    assert ranks_within(dims, 10**9) == {"a": 10, "b": 4}
    with pytest.raises(ValueError, match="budget: expected at least 107, one column or row of each layer, got 106"):
        ranks_within(dims, 106)
    # Density 0.436 would be 4.36 and 1.74: what rounding down leaves, 77, does not suffice for another of b.
    assert ranks_within(dims, 205) == {"a": 5, "b": 1}
    whole = Grass(tiny(), budget=10**6)
    assert not whole.layers
    assert {group["kind"] for group in whole.param_groups} == {"matrix", "dense"}


VOCABULARY = ("embed.weight", "head.weight")


@pytest.mark.parametrize(
    ("selection", "statistics"), [("multinomial", "sketch"), ("top", "exact"), ("block", "sketch")]
)
def test_rows_of_the_vocabulary_equal_the_reference_in_fp64(selection: str, statistics: str) -> None:
    """Rows of embedding and head, at the dense rate, beside the blocks' columns, through three refreshes."""
    rates: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "matrix_lr_scale": 0.5}
    model, twin = tiny(dtype=torch.float64), tiny(dtype=torch.float64)
    options: dict[str, Any] = {"selection": selection, "statistics": statistics}
    optimizer = Grass(model, density=0.3, refresh_interval=4, vocabulary="rows", **rates, **options)
    found = projections(optimizer)
    assert found["head.weight"].shape == found["embed.weight"].shape == (37, 11)
    sides = {name: "rows" if name in VOCABULARY else "columns" for name in found}
    reference = SelectedReference(twin, found, sides, dense_rate=VOCABULARY, **rates)
    for step in range(14):
        for trained in (model, twin):
            for micro_batch in token_batch(step, 8).chunk(2):
                (trained(micro_batch) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
        if (step + 1) % 4 == 0:
            found = projections(optimizer)
            for name in VOCABULARY if selection == "top" else ():
                grad = twin.get_parameter(name).grad
                assert grad is not None
                assert torch.equal(found[name].sum(1).nonzero().squeeze(1), grad.norm(dim=1).topk(11).indices.sort()[0])
            reference.select(found)
        twin.zero_grad()
    wanted = twin.state_dict()
    assert model.state_dict().keys() == wanted.keys()
    for name, value in model.state_dict().items():
        assert float((value - wanted[name]).norm() / wanted[name].norm()) < 1e-12


def test_rows_of_the_vocabulary_have_groups_of_the_dense_rate() -> None:
    by_rank = Grass(tiny(), rank=5, vocabulary="rows", matrix_lr_scale=0.1, lr=1e-2)
    shapes = {layer.name: tuple(layer.module.compact.shape) for layer in by_rank.layers}
    # 5 of 20 inputs in the blocks: a quarter of the 37 tokens.
    assert shapes["head"] == shapes["embed"] == (9, 20)
    assert shapes["blocks.0.q"] == (20, 5)
    groups = [(g["kind"], g["lr"], sum(p.numel() for p in g["params"])) for g in by_rank.param_groups]
    assert groups[:2] == [("compact", pytest.approx(1e-3), 12 * 100 + 2 * 13 * 5), ("compact", 1e-2, 2 * 9 * 20)]
    whole = Grass(tiny(), rank=20, target_modules=["*.q"], vocabulary="rows", matrix_lr_scale=0.1, lr=1e-2)
    assert not whole.layers
    assert {(g["kind"], g["lr"]) for g in whole.param_groups} == {("matrix", 1e-3), ("dense", 1e-2)}


def test_which_vocabularies_stay_dense() -> None:
    with pytest.warns(UserWarning, match=r"the weight of (model\.embed_tokens|lm_head) is tied and stays dense"):
        tied = Grass(llama(tie_word_embeddings=True), density=0.25, vocabulary="rows")
    assert not {"lm_head", "model.embed_tokens"} & {layer.name for layer in tied.layers}
    untied = Grass(llama(), density=0.25, vocabulary="rows")
    assert {"lm_head", "model.embed_tokens"} <= {layer.name for layer in untied.layers}
    with pytest.raises(ValueError, match=r"vocabulary: 'rows' expected an nn\.Linear outside"):
        Grass(nn.ModuleList([nn.Linear(8, 8)]), density=0.5, target_modules=["0"], vocabulary="rows")
    sparse = tiny()
    sparse.embed.sparse = True
    with pytest.warns(UserWarning, match="embed has max_norm, scale_grad_by_freq or sparse and stays dense"):
        assert "embed" not in [layer.name for layer in Grass(sparse, density=0.3, vocabulary="rows").layers]


@pytest.mark.parametrize("padding", [None, 3])
def test_an_embeddings_gradient_is_the_selected_rows_of_the_dense_one(padding: int | None) -> None:
    """Also of its sketch and of what ``exact`` observes; tokens that come up often, and those that are not selected."""
    torch.manual_seed(0)
    dense = nn.Embedding(9, 5, padding_idx=padding, dtype=torch.float64)
    index = torch.tensor([0, 3, 4, 8])
    tokens = torch.tensor([[3, 3, 4, 1, 0], [3, 7, 7, 8, 8]])
    grad = torch.randn(2, 5, 5, dtype=torch.float64)
    omega = torch.randn(5, 2, dtype=torch.float64)
    dense(tokens).backward(grad)
    assert dense.weight.grad is not None
    for kind, wanted in (("rows", dense.weight.grad @ omega), ("full", dense.weight.grad)):
        layer = SelectedEmbedding.convert(copy.deepcopy(dense), index=index, contiguous=False)
        with torch.no_grad():
            layer.compact.copy_(layer.compact_of(layer.weight))
        layer.start_probe(kind, omega if kind == "rows" else None)  # type: ignore[arg-type]
        y = layer(tokens)
        assert torch.equal(y, dense(tokens))
        y.backward(grad)
        torch.testing.assert_close(layer.compact.grad, dense.weight.grad[index])
        torch.testing.assert_close(layer.end_probe(), wanted)
        assert layer.weight.grad is None
        assert list(layer.state_dict()) == ["weight"]
        layer.revert()
        assert type(layer) is nn.Embedding
        assert layer.weight.requires_grad


def test_a_token_that_comes_up_often_is_summed_in_fp32() -> None:
    """In bf16 a sum of 1,000 ones stands still at 256."""
    layer = SelectedEmbedding.convert(
        nn.Embedding(4, 2, dtype=torch.bfloat16), index=torch.tensor([1]), contiguous=True
    )
    layer(torch.ones(1000, dtype=torch.int64)).sum().backward()
    assert layer.compact.grad is not None
    assert layer.compact.grad.tolist() == [[1000.0, 1000.0]]


def test_a_compiled_embedding_trains_alike() -> None:
    torch._dynamo.reset()
    model, twin = tiny(blocks=1), tiny(blocks=1)
    optimizers = [Grass(m, density=0.3, refresh_interval=2, lr=1e-3, vocabulary="rows") for m in (model, twin)]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(4):
        for trained, optimizer in zip((compiled, twin), optimizers, strict=True):
            trained(token_batch(step, 4)).backward()
            optimizer.step()
            optimizer.zero_grad()
    wanted = twin.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 6, "strata": 4}, "strata: expected a divisor of rank 6, got 4"),
        ({"budget": 9000, "strata": 4}, "strata: expected 1 with budget 9000, got 4"),
        ({"density": 0.5, "strata": 5}, r"strata: expected a divisor of the 32 columns \(in_features\) of .*, got 5"),
    ],
)
def test_strata_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grass(llama(), lr=1e-2, **options)
