"""What the methods are compared on: the sizes of model and run, and the text, through the project's own pipeline."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality_prose import prose_files
from narrowgauge.engine.config.run_blocks import DataBlock, SourceBlock
from narrowgauge.engine.data.loader import RankSampler, training_loader
from narrowgauge.engine.data.packed import PackedTokens
from narrowgauge.engine.data.prepare import made_cache, prepare_data

_SMALL_TEXT = ("argparse", "ast", "calendar", "configparser", "csv", "datetime", "difflib", "heapq", "inspect")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, a text and a length: the same for all methods.

    Attributes:
        text: ``stdlib``, all source files of the running Python's standard library; ``prose``, what they say in words
            (:mod:`benchmarks.quality_prose`); or ``small``, a few of the files.
        interval: optimizer steps between changes of subspace, of every method that has one.
        num_evaluations: evenly over the run; the last is after the last step.
        eval_sequences: validation samples per evaluation, the same ones each time.
        grid_lr, grid_matrix_lr: the rates of the other parameters and of the matrices with which AdamW begins. A single
            ``grid_lr`` is that of all runs.
    """

    text: str = "stdlib"
    hidden: int = 256
    intermediate: int = 688
    layers: int = 4
    heads: int = 4
    vocab: int = 4096
    length: int = 128
    batch: int = 4
    steps: int = 500
    warmup_steps: int = 50
    interval: int = 50
    num_evaluations: int = 4
    eval_sequences: int = 256
    seed: int = 0
    grid_lr: tuple[float, ...] = (1e-2, 2e-2)
    grid_matrix_lr: tuple[float, ...] = (1.25e-4, 2.5e-4)


# A small model on four times the tokens a step: less noise hides what a method leaves out.
WIDE = Task(
    hidden=128,
    intermediate=344,
    layers=2,
    vocab=2048,
    batch=16,
    steps=400,
    warmup_steps=40,
    grid_lr=(2e-2,),
    grid_matrix_lr=(2e-3,),
)
# The smallest model, and a second text, for so many steps that what is left out adds up.
LONG = Task(
    text="prose",
    hidden=128,
    intermediate=256,
    layers=2,
    vocab=512,
    steps=1500,
    warmup_steps=150,
    num_evaluations=10,
    eval_sequences=128,
    grid_lr=(1e-2,),
    grid_matrix_lr=(2e-3,),
)
SMALL = Task(
    text="small",
    hidden=32,
    intermediate=88,
    layers=2,
    vocab=512,
    length=32,
    batch=4,
    steps=12,
    warmup_steps=2,
    interval=4,
    num_evaluations=2,
    eval_sequences=8,
    grid_lr=(1e-2, 2e-2),
    grid_matrix_lr=(2e-3, 4e-3),
)


def _source(text: str) -> Literal["stdlib"] | list[SourceBlock]:
    if text == "stdlib":
        return "stdlib"
    if text == "prose":
        return [SourceBlock(path=str(path)) for path in prose_files(made_cache(DataBlock.model_validate({})))]
    root = Path(sysconfig.get_paths()["stdlib"])
    return [SourceBlock(path=str(root / f"{name}.py")) for name in _SMALL_TEXT]


class Text:
    """Packed samples for training and validation."""

    def __init__(self, task: Task) -> None:
        """Train the tokenizer and tokenize, or take what the cache holds."""
        block = DataBlock(
            train=_source(task.text),
            vocab_size=task.vocab,
            sequence_length=task.length,
            validation_fraction=0.02,
            num_workers=0,
        )
        prepared = prepare_data(block, print)
        self.fingerprint = prepared.fingerprint
        self.train, self.validation = (
            PackedTokens(streams, task.length, task.vocab) for streams in (prepared.train, prepared.validation)
        )

    def batches(self, task: Task) -> Iterator[Tensor]:
        """The batches of all steps, int64 ``(batch, length)``, in an order that only depends on the seed."""
        sampler = RankSampler(
            partial(self.train.order, seed=task.seed),
            first_step=0,
            last_step=task.steps,
            micro_batch_size=task.batch,
            accumulation_steps=1,
            rank=0,
            world_size=1,
        )
        for batch in training_loader(self.train, sampler, 0):
            assert isinstance(batch, Tensor)
            yield batch

    def evaluation(self, task: Task) -> Iterator[Tensor]:
        """The validation batches, int64 ``(batch, length)``; the last may have fewer samples."""
        num_samples = min(task.eval_sequences, len(self.validation))
        for first in range(0, num_samples, task.batch):
            yield torch.stack([self.validation[i] for i in range(first, min(first + task.batch, num_samples))])


def build_model(task: Task) -> LlamaForCausalLM:
    """The model with the weights that every method starts from, fp32."""
    torch.manual_seed(task.seed)
    config = LlamaConfig(
        vocab_size=task.vocab,
        hidden_size=task.hidden,
        intermediate_size=task.intermediate,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        max_position_embeddings=task.length,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model
