"""What `benchmarks.offload` compares: ways to have a forward's activations in backward, on one small LLaMA."""

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.compare import Phases
from narrowgauge.offload import ActivationOffload
from narrowgauge.offload.backends import IOBackend
from narrowgauge.offload.backends.base import Lane
from narrowgauge.offload.backends.probe import Speed, measure
from narrowgauge.offload.backends.threads import ThreadsBackend

KEEP, RECOMPUTE, LAYER_INPUTS = "keep all", "full recompute", "layer inputs"
# Of ActivationOffload, for what is not measured, only counted: it writes nothing.
_ONLY_COUNT: dict[str, Any] = {"keep_resident": 1.0, "min_tensor_bytes": 1 << 60, "capacity_bytes": 1 << 20}

OFFLOADS: dict[str, dict[str, Any]] = {
    "offload everything": {"keep_resident": 0.0},
    "adaptive": {"keep_resident": "auto"},
    "keep 75 %": {"keep_resident": 0.75},
    "keep 50 %": {"keep_resident": 0.5},
    "keep 25 %": {"keep_resident": 0.25},
    LAYER_INPUTS: {"keep_resident": 0.0, "granularity": "layer_inputs"},
    "adaptive, disk at 1/10": {"keep_resident": "auto"},
    "pinned memory": {"keep_resident": 0.0, "host_memory_bytes": 64 << 30},
}
NAMES = [KEEP, "save_on_cpu", RECOMPUTE, *OFFLOADS]
DEFAULT = [name for name in NAMES if name not in ("keep 75 %", "keep 25 %", "pinned memory")]


class OtherProcesses:
    """The share of the machine's CPU time that other processes took inside the block, from /proc/stat."""

    share = 0.0

    def __enter__(self) -> "OtherProcesses":
        self._before = self._now()
        return self

    def __exit__(self, *exception: Any) -> None:
        everyone, busy, own = (now - before for now, before in zip(self._now(), self._before, strict=True))
        self.share = max(0.0, busy - own) / everyone if everyone else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """CPU seconds of all kinds, those that were not idle, and those of this process."""
        file = Path("/proc/stat")
        if not file.is_file():
            return 0.0, 0.0, 0.0
        ticks = [int(part) / os.sysconf("SC_CLK_TCK") for part in file.read_text().split("\n")[0].split()[1:9]]
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4], time.process_time()


class _Limit:
    """Makes the transfers of all lanes in one direction together take at least as long as a slower disk would."""

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth, self._lock, self._free_at = bandwidth, threading.Lock(), 0.0

    @contextmanager
    def transfer(self, nbytes: int) -> Iterator[None]:
        with self._lock:
            self._free_at = until = max(self._free_at, time.perf_counter()) + nbytes / self._bandwidth
        yield
        time.sleep(max(0.0, until - time.perf_counter()))


class _ThrottledLane:
    def __init__(self, lane: Lane, writes: _Limit, reads: _Limit) -> None:
        self._lane, self._writes, self._reads = lane, writes, reads

    def write(self, fd: int, offset: int, buffer: Tensor) -> None:
        with self._writes.transfer(buffer.nbytes):
            self._lane.write(fd, offset, buffer)

    def read(self, fd: int, offset: int, buffer: Tensor) -> None:
        with self._reads.transfer(buffer.nbytes):
            self._lane.read(fd, offset, buffer)

    def close(self) -> None:
        self._lane.close()


class ThrottledBackend(ThreadsBackend):
    """Threads on a slower disk."""

    name = "throttled"

    def __init__(self, speed: Speed) -> None:
        self._writes, self._reads = _Limit(speed.write), _Limit(speed.read)

    def lane(self) -> Any:
        return _ThrottledLane(super().lane(), self._writes, self._reads)


@dataclass
class Case:
    """One alternative, and what its measured steps came to.

    Attributes:
        around: entered around the forward.
        offload: whose figures are read; None where there are none.
        seen: per step: ``saved`` and ``resident`` peaks, ``stall`` seconds, ``written`` and ``read`` bytes.
    """

    name: str
    model: LlamaForCausalLM
    tokens: Tensor
    around: Callable[[], AbstractContextManager[Any]]
    offload: ActivationOffload | None = None
    seen: dict[str, list[float]] = field(default_factory=dict)

    def step(self) -> Phases:
        """Forward and backward, timed; whatever of it is still in flight afterwards is waited for untimed."""
        cuda = self.tokens.device.type == "cuda"
        offload = self.offload
        if offload is not None:
            offload.reset_peaks()
        before = offload.stats() if offload is not None else None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated() if cuda else 0
        phases = Phases()
        with phases.phase("step"):
            with phases.phase("forward"), self.around():
                loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
            with phases.phase("backward"):
                loss.backward()
        phases.settle()
        figures: dict[str, float] = {}
        if offload is not None and before is not None:
            after = offload.stats()
            figures = {"saved": after.saved_peak, "resident": after.resident_peak}
            figures |= {"stall": after.io_stall - before.io_stall}
            figures |= {"written": after.written - before.written, "read": after.read - before.read}
        if cuda:
            figures["resident"] = torch.cuda.max_memory_allocated() - allocated
        for name, value in figures.items():
            self.seen.setdefault(name, []).append(value)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        time.sleep(0.02)
        return phases

    def forget_step(self) -> None:
        """Drop the figures of the latest step."""
        for values in self.seen.values():
            values.pop()

    def count(self, path: Path) -> None:
        """Where no :class:`ActivationOffload` is at work, let one that writes nothing count a step."""
        if self.offload is not None:
            return
        counter = ActivationOffload(path, model=self.model, backend="threads", **_ONLY_COUNT)
        counted = Case(self.name, self.model, self.tokens, lambda: counter, counter)
        counted.step()
        counter.close()
        self.seen = counted.seen | self.seen

    def gradients(self) -> list[Tensor]:
        """Of one step, for comparison."""
        with self.around():
            loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        found = [parameter.grad.clone() for parameter in self.model.parameters() if parameter.grad is not None]
        self.model.zero_grad(set_to_none=False)
        return found

    def close(self) -> None:
        if self.offload is not None:
            self.offload.close()


def build(arguments: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=-(-8 * arguments.hidden // 3 // 32) * 32,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        max_position_embeddings=arguments.sequence,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, arguments.device, dtype=getattr(torch, arguments.dtype))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model.train()


def make_tokens(arguments: argparse.Namespace, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(arguments.vocab, (batch, arguments.sequence), generator=generator).to(arguments.device)


def make_cases(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Case]:
    """Cases on one model; those that recompute have one of their own."""
    plain, tokens = build(arguments), make_tokens(arguments, arguments.batch)
    keep = make_case(KEEP, arguments, plain, tokens, 0)
    keep.step()
    keep.count(arguments.path)
    capacity = int(2 * keep.seen["saved"][-1]) + (64 << 20)
    cases = {KEEP: keep}
    for name in names:
        if name != KEEP:
            model = build(arguments) if recomputes(name) else plain
            cases[name] = make_case(name, arguments, model, tokens, capacity)
    return cases


def make_case(
    name: str, arguments: argparse.Namespace, model: LlamaForCausalLM, tokens: Tensor, capacity_bytes: int
) -> Case:
    """A case; recomputing ones change the model, which must then be theirs alone."""
    if name == KEEP:
        return Case(name, model, tokens, nullcontext)
    if name == "save_on_cpu":
        return Case(name, model, tokens, lambda: save_on_cpu(pin_memory=arguments.device == "cuda"))
    if name == RECOMPUTE:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return Case(name, model, tokens, nullcontext)
    backend: str | IOBackend = arguments.backend
    if "1/10" in name:
        speed = measure(ThreadsBackend(), arguments.path)
        backend = ThrottledBackend(Speed(speed.write / 10, speed.read / 10))
    options: dict[str, Any] = {"backend": backend, **OFFLOADS[name]}
    if arguments.buffer_mib:
        options["buffer_bytes"] = arguments.buffer_mib << 20
    if arguments.lanes is not None:
        options["num_lanes"] = arguments.lanes
    offload = ActivationOffload(arguments.path, model=model, capacity_bytes=capacity_bytes, **options)
    return Case(name, model, tokens, lambda: offload, offload)


def recomputes(name: str) -> bool:
    return name in (RECOMPUTE, LAYER_INPUTS)
