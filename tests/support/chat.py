"""Conversations that are made up, a small tokenizer with a chat template, and files of both."""

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What the assistant says is marked, its end token too.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{%- else -%}{{ message['content'] + eos_token }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
PLAIN_TEMPLATE = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
_TEXT = (
    "red green blue one two three four five the a cat dog sat on mat big small what is where who when did they go to"
)
_WORDS = _TEXT.split()


def save_tokenizer(folder: Path, template: str | None = TEMPLATE, *, bos: bool = False) -> Path:
    """A byte-level BPE on the words above, with the special tokens of the template, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    if bos:
        template_of = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
        tokenizer.post_processor = template_of  # pyright: ignore[reportAttributeAccessIssue]
    named = {"bos_token": special[1], "eos_token": special[2], "pad_token": special[0]}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = template
    fast.save_pretrained(str(folder))
    return folder


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records of the format ``messages``, with one to three turns, some with a system's message."""
    draw = random.Random(seed)

    def say(most: int) -> str:
        return " ".join(draw.choices(_WORDS, k=draw.randint(1, most)))

    found = []
    for number in range(count):
        messages = [{"role": "system", "content": say(6)}] if number % 5 == 0 else []
        for _ in range(draw.randint(1, 3)):
            messages += [{"role": "user", "content": say(9)}, {"role": "assistant", "content": say(12)}]
        found.append({"messages": messages, "id": number})
    return found


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """JSON Lines, compressed where the name says so."""
    raw = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    elif path.suffix == ".zst":
        import pyarrow

        path.write_bytes(pyarrow.compress(raw, codec="zstd", asbytes=True))
        return path
    path.write_bytes(raw)
    return path


def write_parquet(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    return path


def write_dataset(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(list(records)).save_to_disk(str(path))
    return path
