"""What happens when something else than its optimizer changes a compact layer, or does not call it."""

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from narrowgauge.engine import initialize
from narrowgauge.optimizers import CompactLinear, GaLore, Grass
from tests.support.models import TinyTransformer, tiny, token_batch
from tests.support.ranks import RankPool
from tests.support.zero import ds_config, finish

Make = Callable[[nn.Module], Any]
METHODS: dict[str, Make] = {
    "grass": lambda model: Grass(model, lr=1e-2, density=0.3, refresh_interval=2),
    "galore": lambda model: GaLore(model, lr=1e-2, density=0.3, refresh_interval=2),
}
each_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
CHANGED = r"blocks\.0\.\w+\.compact: expected values that only (Grass|GaLore) changes"


def backward(model: nn.Module, step: int = 0) -> float:
    loss = model(token_batch(step, 4))
    loss.backward()
    return float(loss.detach())


@each_method
@pytest.mark.parametrize("fused", [False, True])
def test_another_optimizer_is_refused_before_it_changes_anything(make: Make, fused: bool) -> None:
    """``AdamW(model.parameters())`` after ``Grass(model)``, as Hugging Face's Trainer makes with a DeepSpeed JSON,
    trained ``compact`` and no weight changed: exit 0, and the saved model held the first matrices.
    """
    model = tiny()
    make(model)
    gc.collect()
    other = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model)
    with pytest.raises(RuntimeError, match=r"AdamW\.step: " + CHANGED.replace("0", r"\d")):
        other.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@each_method
def test_changed_compact_values_are_refused_by_forward_and_save(make: Make) -> None:
    model = tiny()
    optimizer = make(model)
    with torch.no_grad():
        optimizer.layers[0].module.compact.add_(1.0)
    for use in (lambda: backward(model), model.state_dict, optimizer.step, optimizer.revert):
        with pytest.raises(RuntimeError, match=CHANGED):
            use()


UNSEEN = r"blocks\.0\.q\.weight: expected the values that .* counted no change of either: .* through \.data"


def test_changes_that_no_counter_sees_are_refused_by_a_save_and_within_64_forwards() -> None:
    """Version counters do not count what is written through ``.data``, as some engines do."""
    model = tiny()
    optimizer = METHODS["grass"](model)
    optimizer.layers[0].module.compact.data.add_(1.0)
    with pytest.raises(RuntimeError, match=UNSEEN):
        model.state_dict()
    # The 64th use is the next one.
    for _ in range(63):
        backward(model)
    with pytest.raises(RuntimeError, match=UNSEEN):
        backward(model)


@pytest.mark.parametrize(
    "edit", [lambda weight: weight.data.zero_(), lambda weight: weight.numpy().fill(0.0)], ids=["data", "numpy"]
)
def test_edits_that_no_counter_sees_are_refused_by_the_next_step(edit: Callable[[torch.Tensor], Any]) -> None:
    """The step wrote the selected columns over them, and no comparison after it saw anything; a text that one raised
    before blamed another optimizer.
    """
    model = tiny()
    optimizer = METHODS["grass"](model)
    backward(model)
    before = optimizer.layers[1].module.weight.clone()
    edit(optimizer.layers[0].module.weight)
    with pytest.raises(RuntimeError, match=UNSEEN):
        optimizer.step()
    assert torch.equal(optimizer.layers[1].module.weight, before)


class Gathered(TorchDispatchMode):
    """Counts what is read of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.gather.default, torch.ops.aten.index_select.default):
            self.numel += result.numel()
        return result


@pytest.mark.parametrize("side", ["columns", "rows"])
def test_a_step_compares_a_sixteenth_of_a_large_layer_and_other_rows_each_time(side: Any) -> None:
    """All rows took as long as 40 % of the step."""
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    optimizer = Grass(model, lr=1e-3, density=0.5, side=side, target_modules=["*"], refresh_interval=None)
    module = optimizer.layers[0].module
    rows = torch.arange(512) if side == "columns" else module.selected()
    found = []
    for step in range(16):
        model(torch.ones(1, 512)).sum().backward()
        kept = module.weight.detach().clone()
        module.weight.data[rows[21]] += 1.0
        try:
            optimizer.before_step()
        except RuntimeError:
            found.append(step)
        module.weight.data.copy_(kept)
        with Gathered() as gathered:
            optimizer.before_step()
        assert gathered.numel == module.compact.numel() / 16
        optimizer.step()
        optimizer.zero_grad()
    assert found == [5]
    module.weight.data[rows[22]] += 1.0
    with pytest.raises(RuntimeError, match="counted no change of either"):
        optimizer.revert()


def steps_under_zero(stage: int) -> str:
    engine, *_ = initialize(model=tiny(), config=ds_config(stage, global_batch=4))
    engine.module.blocks[0].q.weight.data.mul_(0.5)
    try:
        for _ in range(2):
            engine.backward(engine(token_batch(0, 2)))
            engine.step()
    except RuntimeError as error:
        return str(error)
    finally:
        finish(engine)
    return ""


@pytest.mark.parametrize("stage", [0, 2])
def test_they_are_refused_under_zero_too(stage: int, one_rank: RankPool) -> None:
    assert "blocks.0.q.weight: expected the values that" in one_rank.run(steps_under_zero, stage)[0]


@each_method
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["", "pickle"])  # noqa: S301
def test_a_copy_is_not_trained_by_another_optimizer(make: Make, copied: Callable[[nn.Module], Any]) -> None:
    """Nothing watched its layers: AdamW trained ``compact``, and no weight of them moved."""
    model = tiny()
    optimizer = make(model)
    backward(model)
    optimizer.step()
    twin = copied(model)
    other = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    assert backward(twin, 1) == pytest.approx(backward(model, 1), rel=1e-6)
    with pytest.raises(RuntimeError, match=r"AdamW\.step: .*The model is a copy of one that"):
        other.step()
    with torch.no_grad():
        twin.blocks[0].q.compact.add_(1.0)
    with pytest.raises(RuntimeError, match=r"The model is a copy of one that"):
        backward(twin)


def test_an_average_of_models_is_no_copy_that_is_trained() -> None:
    """Its compact values mean other columns than those of the model, which has another subspace every second step."""
    model: Any = tiny()
    optimizer = METHODS["grass"](model)
    average: Any = torch.optim.swa_utils.AveragedModel(model)
    seen = []
    for step in range(5):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        seen.append(model.blocks[0].q.weight.clone())
        average(token_batch(step, 4))
    torch.testing.assert_close(average.module.state_dict()["blocks.0.q.weight"], torch.stack(seen).mean(0))


def test_a_weight_that_is_computed_is_refused() -> None:
    """What was folded into a pruned weight was gone with the next forward, without a word."""
    for add in (partial(prune.l1_unstructured, name="weight", amount=0.5), nn.utils.parametrizations.weight_norm):
        model: Any = tiny()
        optimizer = METHODS["grass"](model)
        add(model.blocks[0].q)
        for use in (lambda model=model: backward(model), optimizer.step):
            with pytest.raises(
                RuntimeError, match=r"blocks\.0\.q\.weight: expected the parameter that Grass was made with"
            ):
                use()


def test_other_weights_can_be_lent() -> None:
    """``functional_call``, as for an average's evaluation; it was taken for a parametrization."""
    model = tiny()
    optimizer = METHODS["grass"](model)
    backward(model)
    optimizer.step()
    halved = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    found = torch.func.functional_call(model, halved, (token_batch(0, 4),))
    expected = tiny()
    expected.load_state_dict({name: value * 0.5 for name, value in model.state_dict().items()})
    torch.testing.assert_close(found, expected(token_batch(0, 4)))
    backward(model, 1)
    optimizer.step()


def steps_of_a_foreign_engine(stage: int) -> tuple[int, str]:
    model = tiny()
    METHODS["grass"](model)
    trainable: Any = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=config)
    step = 0
    try:
        for step in range(4):
            engine.backward(engine(token_batch(step, 4)))
            engine.step()
    except RuntimeError as error:
        return step, str(error)
    finally:
        engine.destroy()
    return step, ""


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_that_does_not_know_the_layers_stops_at_the_second_step(stage: int, one_rank: RankPool) -> None:
    """DeepSpeed's own optimizer writes through flat buffers, which no version counter counts."""
    ((step, error),) = one_rank.run(steps_of_a_foreign_engine, stage)
    assert step == (0 if stage == 0 else 1)
    assert "compact: expected values that only Grass changes" in error


def test_an_edit_of_the_weight_is_kept() -> None:
    """``weight.zero_()`` was undone in the selected entries by the next fold."""
    model = tiny()
    optimizer = METHODS["grass"](model)
    module = optimizer.layers[0].module
    outside = torch.ones(module.weight_shape[1], dtype=torch.bool)
    outside[module.selected()] = False
    backward(model)
    with torch.no_grad():
        module.weight.zero_()
    optimizer.step()
    assert module.weight[:, outside].abs().max() == 0.0
    # AdamW's first step is the rate; decay of zero is zero.
    selected = module.weight[:, module.selected()]
    torch.testing.assert_close(selected.abs(), torch.full_like(selected, 1e-2), rtol=1e-3, atol=0)


@each_method
def test_reverted_layers_are_trained_by_another_optimizer(make: Make) -> None:
    model, twin = tiny(), tiny()
    optimizer = make(model)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.revert()
    assert not any(isinstance(m, CompactLinear) for m in model.modules())
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    twin.load_state_dict(trained)
    losses = []
    for each in (model, twin):
        other = torch.optim.AdamW(each.parameters(), lr=1e-2)
        backward(each)
        other.step()
        losses.append(backward(each, 1))
    assert losses[0] == losses[1]
    with pytest.raises(RuntimeError, match="were reverted"):
        optimizer.step()


def test_revert_applies_the_decay_that_waits() -> None:
    model = tiny()
    optimizer = Grass(model, lr=1e-2, density=0.3, decay="all", weight_decay=0.5, refresh_interval=100)
    module = optimizer.layers[0].module
    before, index = module.weight.detach().clone(), module.selected().clone()
    for step in range(2):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    selected = module.compact.detach().clone()
    optimizer.revert()
    expected = (before * (1.0 - 0.005) ** 2).index_copy(1, index, selected)
    torch.testing.assert_close(module.weight.detach(), expected)


class ReadsWeight(nn.Module):
    """As WavLM's attention: the weight of ``read`` is used without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"called": nn.Linear(8, 8), "read": nn.Linear(8, 8)})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block: Any = self.blocks[0]
        return (block["called"](x) @ block["read"].weight.t()).square().sum()


def test_a_layer_that_is_not_called_is_named_after_the_first_step() -> None:
    """Thirty steps moved such a weight by 0.0 without a word."""
    model = ReadsWeight()
    optimizer = Grass(model, density=0.5)
    model(torch.randn(4, 8)).backward()
    with pytest.warns(UserWarning, match=r"no forward of these compact layers has run.*: blocks\.0\.read\. "):
        optimizer.step()
    model(torch.randn(4, 8)).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def cross_attention_without_an_encoder(stage: int) -> list[str]:
    """What is warned of in a step of BART's decoder alone, whose cross-attention is never called."""
    from transformers import AutoModelForCausalLM, BartConfig

    sizes: dict[str, Any] = {"vocab_size": 60, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
    config = BartConfig(**sizes, decoder_ffn_dim=32, max_position_embeddings=32, is_encoder_decoder=False)
    engine, *_ = initialize(model=AutoModelForCausalLM.from_config(config), config=ds_config(stage, global_batch=4))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2 * engine.gradient_accumulation_steps()):
            tokens = token_batch(step, engine.train_micro_batch_size_per_gpu(), vocab=60)
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
    finish(engine)
    return [str(each.message) for each in caught if "no forward" in str(each.message)]


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_layer_that_is_not_called_is_named_under_zero(one_rank: RankPool, stage: int) -> None:
    ((said,),) = one_rank.run(cross_attention_without_an_encoder, stage)
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        assert f"layers.0.encoder_attn.{name}" in said
    assert "self_attn" not in said


def test_decay_of_all_entries_spares_layers_without_a_gradient() -> None:
    """The other entries of a layer that was not used were decayed, its selected ones were not."""
    model: TinyTransformer = tiny()
    optimizer = Grass(model, lr=1e-2, density=0.3, decay="all", weight_decay=0.5, refresh_interval=1)
    layers = {layer.name: layer.module for layer in optimizer.layers}
    before = {name: module.weight.detach().clone() for name, module in layers.items()}
    x = torch.randn(4, 20)
    model.get_submodule("blocks.0.q")(x).square().sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    changed = [name for name, module in layers.items() if not torch.equal(module.weight, before[name])]
    assert changed == ["blocks.0.q"]


def test_averaged_weights_can_be_swapped_in() -> None:
    """After a refresh the average of ``compact`` is of two subspaces; it was taken for another optimizer's work."""
    model: TinyTransformer = tiny()
    optimizer = Grass(model, lr=1e-2, density=0.3, refresh_interval=2)
    averages = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        for average, parameter in zip(averages, model.parameters(), strict=True):
            average.lerp_(parameter.detach(), 0.5)
    wanted = {name: average for (name, _), average in zip(model.named_parameters(), averages, strict=True)}
    with torch.no_grad():
        for parameter, average in zip(model.parameters(), averages, strict=True):
            parameter.copy_(average)
    backward(model, 9)
    state = model.state_dict()
    for layer in optimizer.layers:
        assert torch.equal(state[f"{layer.name}.weight"], wanted[f"{layer.name}.weight"])
        assert torch.equal(layer.module.compact, layer.module.weight[:, layer.module.selected()])


@each_method
def test_parameters_that_were_put_into_one_vector_are_named_as_such(make: Make) -> None:
    """The message guessed at FSDP."""
    model = tiny()
    optimizer = make(model)
    assert optimizer.layers
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(vector.detach().clone(), model.parameters())
    with pytest.raises(RuntimeError, match=CHANGED + r".*as after torch\.nn\.utils\.vector_to_parameters"):
        backward(model)
