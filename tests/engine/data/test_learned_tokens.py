"""Training on records: each learned token of a step weighs the same, however the step is cut over ranks and
micro-batches, packed or padded, and no example sees another.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from narrowgauge.engine.backends import backend_of
from narrowgauge.engine.config.config import load_config
from narrowgauge.engine.config.run_blocks import DataBlock
from narrowgauge.engine.data.loader import RankSampler, training_loader
from narrowgauge.engine.data.mixture import Mixture
from narrowgauge.engine.data.run_data import prepare
from narrowgauge.engine.run.packable import FAMILIES, check_packing
from tests.engine.backends.ddp.test_parity import finish, weights_of
from tests.support.chat import conversations, save_tokenizer, write_lines
from tests.support.command import ROOT
from tests.support.families import small
from tests.support.ranks import RankPool
from tests.support.zero import worst

BATCH, STEPS, RATE, SEED = 8, 3, 0.5, 4
QUICK = ("gpt2", "llama", "qwen2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    save_tokenizer(folder / "tokenizer")
    write_lines(folder / "a.jsonl", conversations(30))
    for packing in (False, True):
        mixture(str(folder), packing)
    return folder


def mixture(folder: str, packing: bool) -> Mixture:
    block = {"train": [f"{folder}/a.jsonl"], "tokenizer": f"{folder}/tokenizer", "cache_dir": f"{folder}/cache"}
    found = prepare(DataBlock.model_validate({**block, "sequence_length": 96, "packing": packing})).train
    assert isinstance(found, Mixture)
    return found


def model_of(family: str = "llama", attention: str = "sdpa") -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(small(family), dtype=torch.float32, attn_implementation=attention)
    model.config.use_cache = False
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def plain_run(samples: Mixture) -> tuple[list[float], dict[str, Tensor]]:
    """Stochastic gradient descent, one example at a time: nothing is padded or packed."""
    model, losses = model_of(), []
    for step in range(STEPS):
        total, count = torch.zeros(()), 0
        for sample in samples.order(np.arange(step * BATCH, (step + 1) * BATCH), SEED).tolist():
            source, number = samples.source_of(sample)
            for tokens, learned in source.spans(number):
                given, wanted = torch.from_numpy(tokens), torch.from_numpy(learned)[1:]
                logits = model(input_ids=given[None]).logits[0, :-1]
                total = total + cross_entropy(logits[wanted], given[1:][wanted], reduction="sum")
                count += int(wanted.sum())
        model.zero_grad()
        (total / count).backward()
        losses.append(float(total.detach()) / count)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def engine_run(folder: str, packing: bool, engine_name: str, stage: int, micro: int) -> tuple[list[float], Any]:
    samples, ranks = mixture(folder, packing), dist.get_world_size()
    steps = BATCH // (micro * ranks)
    config = load_config(
        {
            "engine": engine_name,
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "SGD", "params": {"lr": RATE}},
            "steps_per_print": 1 << 40,
            **({"zero_allow_untested_optimizer": True} if stage else {}),
        }
    )
    engine: Any = backend_of(engine_name).build(config, model_of(), schedule=None)
    sampler = RankSampler(
        partial(samples.order, seed=SEED),
        first_step=0,
        last_step=STEPS,
        micro_batch_size=micro,
        accumulation_steps=steps,
        rank=dist.get_rank(),
        world_size=ranks,
    )
    batches, losses = iter(training_loader(samples, sampler, 0)), []
    for _ in range(STEPS):
        loss = engine.train_step(batches, lambda name: nullcontext())
        dist.all_reduce(loss)
        losses.append(float(loss) / ranks / steps)
    weights = weights_of(engine)
    finish(engine)
    return losses, weights


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("engine", "stage"), [("ddp", 0), ("deepspeed", 1), pytest.param("deepspeed", 3, marks=pytest.mark.slow)]
)
def test_every_split_of_a_step_trains_the_same(
    one_rank: RankPool, two_ranks: RankPool, folder: Path, engine: str, stage: int, packing: bool
) -> None:
    """The mean of the micro-batches' means gave a token of a short answer more weight than one of a long one."""
    samples = mixture(str(folder), packing)
    expected_losses, expected = plain_run(samples)
    counts = samples.learned(samples.order(np.arange(BATCH), SEED))
    assert counts.max() > 1.5 * counts.min()
    for pool, micro in ((one_rank, 1), (two_ranks, 1), (two_ranks, 4)):
        for losses, weights in pool.run(engine_run, str(folder), packing, engine, stage, micro):
            assert losses == pytest.approx(expected_losses, abs=1e-6)
            assert worst(weights, expected) < 1e-6


def differences(family: str, attention: str) -> tuple[float, float]:
    """Of packed logits from those of the examples one by one: with positions, and with nothing that parts them."""
    model = model_of(family, attention).eval()
    generator = torch.Generator().manual_seed(1)
    examples = [torch.randint(3, 300, (1, length), generator=generator) for length in (5, 9, 24, 1, 7)]
    tokens = torch.cat(examples, dim=1)
    positions = torch.cat([torch.arange(example.shape[1]) for example in examples])[None]
    # Beside a row that is one example.
    tokens = torch.cat((tokens, tokens.flip(1)))
    positions = torch.cat((positions, torch.arange(tokens.shape[1])[None]))
    with torch.no_grad():
        expected = torch.cat([model(input_ids=example).logits[0] for example in examples])
        found = [model(input_ids=tokens, **more).logits[0] for more in ({"position_ids": positions}, {})]
    scale = float(expected.abs().max())
    packed, mixed = (float((logits - expected).abs().max()) / scale for logits in found)
    return packed, mixed


def attentions(family: str) -> list[str]:
    supports = getattr(type(model_of(family, "eager")), "_supports_sdpa", False)
    return ["eager", *(["sdpa"] if supports else [])]


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in sorted(FAMILIES)],
)
def test_packed_equals_unpacked(family: str) -> None:
    for attention in attentions(family):
        packed, mixed = differences(family, attention)
        assert packed < 1e-6
        assert mixed > 0.1


def test_a_model_that_mixes_examples_is_refused() -> None:
    """Bloom's distances in attention come from its mask alone, and Mamba has none."""
    block = DataBlock.model_validate({"packing": True})
    for family in ("bloom", "mamba"):
        assert differences(family, "eager")[0] > 1e-2
        with pytest.raises(ValueError, match=rf"data\.packing: expected false with a {family}, got true"):
            check_packing(block, small(family))
    check_packing(block, small("llama"))
    page = (ROOT / "docs" / "data.md").read_text()
    assert [name for name in FAMILIES if f"`{name}`" not in page] == []
    unmasked = small("llama")
    unmasked._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="expected the attention 'sdpa' or 'eager' with it, got 'flash_attention_2'"):
        check_packing(block, unmasked)
