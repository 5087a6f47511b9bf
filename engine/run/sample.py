"""A continuation of a prompt by the trained model."""

import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from ..data.tokenizer import load_tokenizer
from ..errors import UserError, first_line
from ..protocol import TrainingEngine

logger = logging.getLogger(__name__)
_PATIENCE = timedelta(seconds=10)


def check_prompt(prompt: str, tokenizer_folder: Path | None) -> None:
    """Check before the training what would fail after it.

    Raises:
        UserError: there is no tokenizer, or the prompt has no tokens.
    """
    if tokenizer_folder is None:
        raise UserError("training.sample_prompt: token files carry no tokenizer; name one as data.tokenizer")
    if not load_tokenizer(tokenizer_folder)(prompt, add_special_tokens=False)["input_ids"]:
        raise UserError(f"training.sample_prompt: expected at least one token, got {prompt!r}")


def try_sample(
    engine: TrainingEngine, tokenizer_folder: Path | None, prompt: str, num_tokens: int, seed: int
) -> str | None:
    """:func:`sample_text`, or a warning and None: the run is trained and saved, and a model that cannot generate with
    this version of transformers still has its summary. Collective.

    Raises:
        RuntimeError: this rank alone failed, and the others wait for it in a forward that they take part in together.
    """
    text, failure = None, None
    try:
        text = sample_text(engine, tokenizer_folder, prompt, num_tokens, seed)
    except Exception as error:
        failure = f"{type(error).__name__}: {first_line(error)}"
    if engine.forward_is_collective and not _all_are_here(failure is not None):
        raise RuntimeError(
            f"training.sample_prompt: no sample: {failure}; other ranks did not fail and wait for this one. The run is"
            " complete without the sample"
        )
    if failure is not None and dist.get_rank() == 0:
        logger.warning(f"training.sample_prompt: no sample: {failure}")
    return text


def _all_are_here(wait: bool) -> bool:
    """Tell the others that this rank is past the forwards; if ``wait``, whether they are, soon."""
    store = PrefixStore("narrowgauge/sample", _get_default_store())
    store.set(str(dist.get_rank()), "")
    try:
        if wait:
            store.wait([str(rank) for rank in range(dist.get_world_size())], _PATIENCE)
    except dist.DistStoreError:
        return False
    return True


@torch.no_grad()
def sample_text(
    engine: TrainingEngine, tokenizer_folder: Path | None, prompt: str, num_tokens: int, seed: int
) -> str | None:
    """Generate with temperature 0.8; returns the text on process rank 0. Collective where every rank takes part in a
    forward.
    """
    together = engine.forward_is_collective
    if dist.get_rank() > 0 and not together:
        return None
    assert tokenizer_folder is not None  # see check_prompt
    tokenizer = load_tokenizer(tokenizer_folder)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(engine.device)
    # The prompt's end, and as many tokens as the model's positions leave room for.
    model: Any = engine.module
    context = getattr(model.config, "max_position_embeddings", None) or tokens.shape[1] + num_tokens
    tokens = tokens[:, 1 - context :]
    num_tokens = min(num_tokens, context - tokens.shape[1])
    torch.manual_seed(seed)
    model.eval()
    try:
        generated = engine.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=num_tokens,
            do_sample=True,
            temperature=0.8,
            use_cache=True,
            synced_gpus=together,
            pad_token_id=tokenizer.eos_token_id,
        )
    finally:
        model.train()
    return tokenizer.decode(generated[0], skip_special_tokens=True) if dist.get_rank() == 0 else None
