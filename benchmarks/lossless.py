"""What saved tensors shrink to without loss, and how long that takes: byte planes and general compressors on CPUs.

``python -m benchmarks.lossless --csv OUT.csv``: all that an unmodified HF Llama and BERT save for backward, after a
few steps of training on source code, each storage once. Needs ``pyarrow``, whose zstd, LZ4 and gzip are measured.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from benchmarks.quality_data import SMALL, Task, Text
from benchmarks.results_file import write_rows

_CODECS = {
    "LZ4": pyarrow.Codec("lz4_raw"),
    "zstd 1": pyarrow.Codec("zstd", compression_level=1),
    "gzip 1": pyarrow.Codec("gzip", compression_level=1),
}
_LENGTH, _BATCH, _WIDTH, _LAYERS, _VOCAB = 256, 2, 512, 4, 4096


def task_of(*, steps: int, small: bool) -> Task:
    kind = {"text": "small", "vocab": SMALL.vocab} if small else {"vocab": _VOCAB}
    return Task(**kind, length=_LENGTH, batch=_BATCH, steps=steps)  # type: ignore[arg-type]


def model_of(kind: str, task: Task, *, width: int) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": task.vocab,
        "hidden_size": width,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 8,
        "max_position_embeddings": task.length,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=width * 43 // 16))
    return BertForMaskedLM(BertConfig(**sizes, intermediate_size=4 * width))


def saved_by(model: Any, tokens: Tensor, *, autocast: bool) -> tuple[list[Tensor], float]:
    """What a forward saves, each storage once, without parameters; processor seconds of a forward and backward."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        key = tensor.untyped_storage().data_ptr()
        if key not in weights and not _is_cast_weight(base):
            found.setdefault(key, base.detach())
        return tensor

    def loss_of() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(input_ids=tokens, labels=tokens).loss

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of().backward()
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        loss_of().backward()
        seconds.append(time.process_time() - begin)
    return list(found.values()), statistics.median(seconds)


def _is_cast_weight(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.dtype is torch.bfloat16 and tensor.shape[0] not in (_LENGTH * _BATCH, _BATCH)


def raw_bytes(tensor: Tensor) -> numpy.ndarray:
    """Of the whole storage."""
    flat = torch.empty(0, dtype=torch.uint8)
    flat.set_(tensor.untyped_storage())  # type: ignore[call-overload]
    return flat.numpy()


def planes_of(raw: numpy.ndarray, size: int) -> numpy.ndarray:
    """All first bytes, all second bytes and so on; ``(size, elements)``."""
    return numpy.ascontiguousarray(raw.reshape(-1, size).T)


Part = tuple[bytes, int, bool]


def whole(codec: pyarrow.Codec, raw: numpy.ndarray, size: int) -> Iterator[Part]:
    """As it is. Yields bytes, how many they were, and whether they are compressed."""
    yield codec.compress(raw, asbytes=True), raw.nbytes, True


def all_planes(codec: pyarrow.Codec, raw: numpy.ndarray, size: int) -> Iterator[Part]:
    """Each of them."""
    for plane in planes_of(raw, size):
        yield codec.compress(plane, asbytes=True), plane.nbytes, True


def top_plane(codec: pyarrow.Codec, raw: numpy.ndarray, size: int) -> Iterator[Part]:
    """The sign and the upper 7 bits of the exponent; the rest as it is."""
    *others, top = planes_of(raw, size)
    for plane in others:
        yield plane.tobytes(), plane.nbytes, False
    yield codec.compress(top, asbytes=True), top.nbytes, True


_WAYS: dict[str, Callable[[pyarrow.Codec, numpy.ndarray, int], Iterator[Part]]] = {
    "whole": whole,
    "planes": all_planes,
    "top plane": top_plane,
}


def measure(tensors: list[Tensor], way: str, codec: pyarrow.Codec) -> dict[str, float]:
    """Ratio of the bytes, and bytes per second of one core's time to encode and to decode all of them."""
    before = after = 0
    encoding = decoding = 0.0
    for tensor in tensors:
        raw, size = raw_bytes(tensor), tensor.element_size()
        begin = time.process_time()
        parts = list(_WAYS[way](codec, raw, size))
        encoding += time.process_time() - begin
        before, after = before + raw.nbytes, after + sum(len(part) for part, *_ in parts)
        begin = time.process_time()
        planes = [
            numpy.frombuffer(codec.decompress(part, n, asbytes=True) if is_compressed else part, numpy.uint8)
            for part, n, is_compressed in parts
        ]
        back = planes[0] if way == "whole" else numpy.ascontiguousarray(numpy.stack(planes).T).reshape(-1)
        decoding += time.process_time() - begin
        assert numpy.array_equal(back, raw)
    return {
        "mb": round(before / 1e6, 2),
        "ratio": round(after / before, 3),
        "encode_mb_s": round(before / encoding / 1e6, 1),
        "decode_mb_s": round(before / decoding / 1e6, 1),
    }


def rows_of(kind: str, autocast: bool, tensors: list[Tensor], step: float) -> Iterator[dict[str, Any]]:
    """All ways over all tensors, and the planes in zstd over those of each type."""
    common = {"model": kind, "autocast": "yes" if autocast else "no", "step_s": round(step, 3)}
    for way in _WAYS:
        for name, codec in _CODECS.items():
            yield {**common, "types": "all", "way": way, "codec": name, **measure(tensors, way, codec)}
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        of_type = [tensor for tensor in tensors if tensor.dtype is dtype]
        found = measure(of_type, "planes", _CODECS["zstd 1"])
        yield {**common, "types": str(dtype).removeprefix("torch."), "way": "planes", "codec": "zstd 1", **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="of training before it")
    parser.add_argument("--small", action="store_true", help="seconds, for a test")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    task, rows = task_of(steps=2 if arguments.small else arguments.steps, small=arguments.small), []
    width = 64 if arguments.small else _WIDTH
    text = Text(task)
    for kind in ("llama", "bert"):
        model = model_of(kind, task, width=width)
        optimizer, tokens = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.empty(0)
        for tokens in text.batches(task):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for autocast in (False, True):
            tensors, step = saved_by(model, tokens, autocast=autocast)
            for row in rows_of(kind, autocast, tensors, step):
                rows.append(row)
                print(row, flush=True)
    if arguments.csv:
        write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
