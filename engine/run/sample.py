"""A continuation of a prompt by the trained model."""

import logging
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from ..protocol import TrainingEngine
from ..ranks.agreement import store_of_group
from ..ranks.failure import say_what

logger = logging.getLogger(__name__)
# Seconds that a rank that has failed waits for the others, besides two of the longest turns so far.
_PATIENCE = 10.0
_FORWARD, _DONE = "forward", "done"


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
        RuntimeError: this rank alone failed, and within a forward that the others take part in: they wait for it there.
    """
    turns = _Turns() if engine.forward_is_collective and dist.get_world_size() > 1 else None
    text, failure = None, None
    try:
        text = sample_text(engine, tokenizer_folder, prompt, num_tokens, seed, turns)
    except _Left as left:
        failure = str(left)
    except Exception as error:
        failure = say_what(error)
        if turns is not None and not turns.leave(failure):
            raise RuntimeError(
                f"training.sample_prompt: no sample: {failure}; other ranks did not fail and wait for this one in a"
                " forward that they share. The run is complete without the sample"
            ) from error
    if failure is not None and dist.get_rank() == 0:
        logger.warning(f"training.sample_prompt: no sample: {failure}")
    return text


class _Left(Exception):
    """Another rank does not come to the next forward."""


class _Turns:
    """The ranks go into each forward together, or none of them does: outside of the forwards, which are collectives,
    they ask the store.
    """

    def __init__(self) -> None:
        store = store_of_group()
        # Others may have been taken in this group before.
        number = store.add(f"narrowgauge/samples/{dist.get_rank()}", 1)
        self._store, self._number, self._ended = PrefixStore(f"narrowgauge/sample/{number}", store), 0, False
        self._began, self._longest = time.monotonic(), 0.0

    def forward(self) -> None:
        """Before each forward.

        Raises:
            _Left: another rank has failed or ended.
        """
        words = self._take(_FORWARD)
        if left := [(rank, word) for rank, word in enumerate(words) if word != _FORWARD]:
            self._ended = True
            rank, word = next((pair for pair in left if pair[1] != _DONE), left[0])
            raise _Left(f"process rank {rank}: {word}" if word != _DONE else f"process rank {rank} ended before others")

    def done(self) -> None:
        """After the last forward."""
        self._ended = True
        self._take(_DONE)

    def leave(self, failure: str) -> bool:
        """This rank has failed: whether the others know, and wait for it no longer."""
        if self._ended:
            return True
        now = time.monotonic()
        try:
            self._take(failure, seconds=_PATIENCE + 2 * max(self._longest, now - self._began))
        except dist.DistStoreError:
            return False
        return True

    def _take(self, word: str, seconds: float | None = None) -> list[str]:
        """Say what this rank does next; returns what each does."""
        now = time.monotonic()
        self._longest, self._began = max(self._longest, now - self._began), now
        self._number += 1
        keys = [f"{self._number}/{rank}" for rank in range(dist.get_world_size())]
        self._store.set(keys[dist.get_rank()], word)
        self._store.wait(keys, *([] if seconds is None else [timedelta(seconds=seconds)]))
        return [found.decode() for found in self._store.multi_get(keys)]


@torch.no_grad()
def sample_text(
    engine: TrainingEngine,
    tokenizer_folder: Path | None,
    prompt: str,
    num_tokens: int,
    seed: int,
    turns: _Turns | None,
) -> str | None:
    """Generate with temperature 0.8; returns the text on process rank 0. Collective where every rank takes part in a
    forward: all of them generate the same.
    """
    if dist.get_rank() > 0 and not engine.forward_is_collective:
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
            before_forward=turns.forward if turns is not None else lambda: None,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=num_tokens,
            do_sample=True,
            temperature=0.8,
            use_cache=True,
            # Which asks in a collective that a rank that has failed would not come to.
            synced_gpus=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        if turns is not None:
            turns.done()
    finally:
        model.train()
    return tokenizer.decode(generated[0], skip_special_tokens=True) if dist.get_rank() == 0 else None
