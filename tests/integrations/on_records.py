"""Fine-tuning on records by ``narrowgauge train``, and by the Trainer on the same batches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from narrowgauge.engine.config.run_blocks import DataBlock
from narrowgauge.engine.data.examples import prepare_examples
from narrowgauge.integrations.transformers import prepare_trainer
from tests.integrations.fine_tuning import (
    ACCUMULATION,
    BATCH,
    CLIP,
    DECAY,
    EPSILON,
    LR,
    PARAMS,
    STEPS,
    arguments,
    block,
    deepspeed_file,
)
from tests.support.chat import conversations, save_tokenizer, write_lines

_SEED = 3


def made_inputs(folder: Path) -> None:
    """A tokenizer, conversations and a model."""
    save_tokenizer(folder / "tokenizer")
    write_lines(folder / "chats.jsonl", conversations(60))
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=320, max_position_embeddings=64, num_attention_heads=4, **sizes)
    LlamaForCausalLM(shape).save_pretrained(str(folder / "base"))


def config_of(folder: Path, run_dir: Path, *, stage: int | None, ranks: int) -> Path:
    """Of ``narrowgauge train``; without a stage by the engine ``ddp``."""
    params = {"lr": LR, "weight_decay": DECAY, "eps": EPSILON, **PARAMS["Grass"]}
    config: dict[str, Any] = {
        "engine": "ddp" if stage is None else "deepspeed",
        "model": {"path": str(folder / "base")},
        "data": _data(folder),
        "training": {"steps": STEPS, "seed": _SEED},
        "logging": {"run_dir": str(run_dir)},
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // ACCUMULATION // ranks,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "Grass", "params": params},
    }
    if stage is not None:
        config["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 500}
    path = run_dir.with_suffix(".json")
    path.write_text(json.dumps(config))
    return path


def _data(folder: Path) -> dict[str, Any]:
    chats = [str(folder / "chats.jsonl")]
    block = {"train": chats, "validation": chats, "tokenizer": str(folder / "tokenizer"), "sequence_length": 64}
    return {**block, "cache_dir": str(folder / "cache")}


def samples(folder: Path) -> list[dict[str, Tensor]]:
    """Of a run of :func:`config_of`, in its order, each as long as it is."""
    mixture, found = prepare_examples(DataBlock.model_validate(_data(folder))).train, []
    for number in mixture.order(np.arange(STEPS * BATCH), _SEED).tolist():
        one = mixture.micro_batch([number])
        assert one.attention_mask is not None
        length = int(one.attention_mask.sum())
        found.append({"input_ids": one.tokens[0, :length], "labels": one.labels[0, :length]})
    return found


def _padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    def side_by_side(name: str, fill: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)

    mask = [{"mask": torch.ones_like(row["labels"])} for row in rows]
    lengths = torch.nn.utils.rnn.pad_sequence([row["mask"] for row in mask], batch_first=True)
    return {
        "input_ids": side_by_side("input_ids", 0),
        "labels": side_by_side("labels", -100),
        "attention_mask": lengths,
    }


def trained_by_trainer(folder: Path, target: Path, *, stage: int | None) -> None:
    """The model in ``target``."""
    constant: dict[str, Any] = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    args = arguments(target, deepspeed_file(stage) if stage is not None else None, **constant)
    trainer = Trainer(
        model=LlamaForCausalLM.from_pretrained(str(folder / "base")),
        args=args,
        train_dataset=samples(folder),  # pyright: ignore[reportArgumentType] (a list has what it takes)
        data_collator=_padded,
    )
    prepare_trainer(trainer, optimizer=block("Grass") if stage is None else None)
    trainer.train()
    trainer.save_model(str(target))
