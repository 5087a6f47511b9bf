"""Fine-tuning records under Megatron: padded or packed, each learned token of a step weighs the same, in any layout."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.config.run_blocks import DataBlock
from narrowgauge.engine.data.loader import RankSampler, training_loader
from narrowgauge.engine.data.mixture import Mixture
from narrowgauge.engine.data.run_data import prepare
from narrowgauge.engine.errors import ConfigError
from narrowgauge.engine.protocol import TrainingEngine
from narrowgauge.engine.run.evaluate import evaluate
from tests.support.cases import cases
from tests.support.chat import conversations, save_tokenizer, write_lines
from tests.support.megatron_models import hf_config, model_block
from tests.support.megatron_ranks import MegatronPool
from tests.support.megatron_runs import MICRO_BATCH, NUM_SEQUENCES, make_engine, run_config, weights_of
from tests.support.zero import worst

LENGTH, STEPS, SEED, NUM_EVALUATED = 96, 4, 4, 7


MODEL: dict[str, Any] = {"vocab_size": 512, "max_position_embeddings": 2 * LENGTH}

Found = tuple[list[float], float, dict[str, Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("records")
    save_tokenizer(folder / "tokenizer")
    write_lines(folder / "a.jsonl", conversations(40))
    for packing in (False, True):
        mixtures(str(folder), packing)
    return folder


def data_block(folder: str, packing: bool) -> dict[str, Any]:
    block = {"train": [f"{folder}/a.jsonl"], "tokenizer": f"{folder}/tokenizer", "cache_dir": f"{folder}/cache"}
    return {**block, "sequence_length": LENGTH, "packing": packing, "validation_fraction": 0.2}


def mixtures(folder: str, packing: bool) -> tuple[Mixture, Mixture]:
    found = prepare(DataBlock.model_validate(data_block(folder, packing)))
    assert isinstance(found.train, Mixture)
    assert isinstance(found.validation, Mixture)
    return found.train, found.validation


def run(folder: str, packing: bool, engine_name: str, family: str, layout: dict[str, Any] | None, more: Any) -> Found:
    """Mean losses over the learned tokens of each step, the validation loss, and the weights."""
    training, validation = mixtures(folder, packing)
    block = {"config": model_block(family, **MODEL)}
    config = run_config(engine_name, family, layout, model=block, data=data_block(folder, packing), **more)
    engine = make_engine(config, family, **MODEL)
    batches, losses = batches_of(engine, training), []
    for _ in range(STEPS):
        loss = engine.train_step(batches, lambda name: nullcontext())
        dist.all_reduce(loss)
        losses.append(float(loss) / dist.get_world_size() / engine.accumulation_steps)
    evaluated = evaluate(engine, validation, num_sequences=NUM_EVALUATED, micro_batch_size=MICRO_BATCH)
    weights = weights_of(engine)
    engine.close()
    return losses, evaluated, weights


def batches_of(engine: TrainingEngine, samples: Mixture) -> Iterator[Any]:
    ranks = engine.data_parallel
    sampler = RankSampler(
        partial(samples.order, seed=SEED),
        first_step=0,
        last_step=STEPS,
        micro_batch_size=MICRO_BATCH,
        accumulation_steps=NUM_SEQUENCES // MICRO_BATCH // ranks.size,
        rank=ranks.rank,
        world_size=ranks.size,
    )
    return iter(training_loader(samples, sampler, 0))


@pytest.fixture(scope="module")
def expected(megatron_ranks: MegatronPool, folder: Path) -> Any:
    """What one process of the ``ddp`` engine finds; once each."""
    found: dict[tuple[bool, str], Found] = {}

    def of(packing: bool, family: str) -> Found:
        if (packing, family) not in found:
            (own,) = megatron_ranks.run(run, str(folder), packing, "ddp", family, None, {}, ranks=1)
            found[packing, family] = own
        return found[packing, family]

    return of


TP2, PP2 = {"tensor_parallel": 2}, {"pipeline_parallel": 2}
SP = {**TP2, "sequence_parallel": True}
SELECTIVE = {"recompute": "selective", "recompute_modules": ["core_attn"]}
EP2, CP2 = {"expert_parallel": 2}, {"context_parallel": 2}
LAYOUTS: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "one": (1, "llama", {}, {}),
    "TP2": (2, "llama", TP2, {}),
    "TP2-SP-DP2": (4, "llama", SP, {}),
    "DP2": (2, "llama", {}, {}),
    "TP2-SP-CP2": (4, "llama", {**SP, **CP2}, {}),
    "CP2-DP2-EP2": (4, "mixtral", {**CP2, **EP2}, {}),
    "PP2-DP2": (4, "llama", PP2, {}),
    "VPP": (2, "llama", {**PP2, "virtual_pipeline": 2}, {}),
    "TP2-PP2-full": (4, "llama", {**TP2, **PP2, "recompute": "full"}, {}),
    "SP-selective": (2, "llama", {**SP, **SELECTIVE}, {}),
    "zero": (4, "llama", SP, {"zero_optimization": {"stage": 2}}),
    "head-norms": (2, "qwen3", TP2, {}),
    "EP2": (2, "mixtral", EP2, {}),
    "EP2-allgather": (2, "mixtral", {**EP2, "expert_dispatcher": "allgather"}, {}),
    "TP2-SP-EP2": (4, "mixtral", {**SP, **EP2, "expert_tensor_parallel": 1}, {}),
}
CASES: dict[str, tuple[str, bool]] = {
    f"{layout}-{'packed' if packing else 'padded'}": (layout, packing)
    for layout in LAYOUTS
    for packing in (False, True)
}
QUICK = {"TP2-SP-DP2-packed", "PP2-DP2-padded"}


@pytest.mark.parametrize(("layout", "packing"), cases(CASES, slow=CASES.keys() - QUICK))
def test_a_layout_equals_one_process_of_ddp(
    megatron_ranks: MegatronPool, folder: Path, expected: Any, layout: str, packing: bool
) -> None:
    """Data-parallel ranks learn different numbers of tokens from samples of different lengths."""
    ranks, family, block, more = LAYOUTS[layout]
    losses, evaluated, weights = expected(packing, family)
    found = megatron_ranks.run(run, str(folder), packing, "megatron", family, block, more, ranks=ranks)
    for number, (own, evaluation, whole) in enumerate(found):
        assert own == pytest.approx(losses, abs=1e-6)
        assert evaluation == pytest.approx(evaluated, abs=1e-6)
        if number == 0:
            assert worst(whole, weights) < 2e-5


def losses_of(folder: str, changed: int) -> list[float]:
    """Of the examples of packed samples one by one, by whether the first token of each sample is another."""
    training, _ = mixtures(folder, True)
    block = {"config": model_block("llama", **MODEL)}
    engine: Any = make_engine(run_config("megatron", "llama", {}, model=block), "llama", **MODEL)
    batch = training.micro_batch([0])
    assert batch.positions is not None
    second = int((batch.positions[0] == 0).nonzero()[1])
    tokens = batch.tokens.clone()
    tokens[0, 0] = changed
    labels = [batch.labels.clone() for _ in range(2)]
    labels[0][:, second:] = labels[1][:, :second] = -100
    found = [float(engine.evaluate(replace(batch, tokens=tokens, labels=own))) for own in labels]
    engine.close()
    return found


def test_no_packed_example_sees_another(megatron_ranks: MegatronPool, folder: Path) -> None:
    """Two samples differ in the first example's first token: the second example's losses are the same bit for bit."""
    (one,) = megatron_ranks.run(losses_of, str(folder), 5, ranks=1)
    (other,) = megatron_ranks.run(losses_of, str(folder), 6, ranks=1)
    assert one[0] != other[0]
    assert one[1] == other[1]


@pytest.mark.parametrize(
    ("key", "value", "expected_value"), [("balance_loss", "global", "'none'"), ("expert_capacity_factor", 1.5, "None")]
)
def test_what_would_count_padding_is_refused(folder: Path, key: str, value: Any, expected_value: str) -> None:
    data = data_block(str(folder), False)
    config = run_config("megatron", "mixtral", {key: value}, data=data)
    backend_of("megatron").check(config)
    with pytest.raises(ConfigError, match=rf"megatron\.{key}: expected {expected_value} with records"):
        backend_of("megatron").check_model(config, hf_config("mixtral", router_aux_loss_coef=0.1), 1)
