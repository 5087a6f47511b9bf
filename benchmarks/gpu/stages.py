"""The stages: what each measures, what it needs and how long it may take."""

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Emit = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of ``make gpu``, a process of its own: ``benchmarks/gpu/<name>.py`` with ``run(emit, small=...)``.

    Attributes:
        title: as a heading.
        text: what the figures are, for the page.
        needs: packages without which it is left out.
        sources: files and folders of the repository whose change makes its figures old, besides its own file.
        limit: seconds; at most eight minutes.
    """

    name: str
    title: str
    text: str
    needs: tuple[str, ...]
    sources: tuple[str, ...]
    limit: float

    def missing(self) -> list[str]:
        """The packages it needs that are not installed."""
        return [name for name in self.needs if find_spec(name) is None]

    def code(self) -> str:
        """A digest of all code that it runs."""
        digest = hashlib.sha256()
        for source in (f"benchmarks/gpu/{self.name}.py", "benchmarks/gpu/measure.py", *self.sources):
            path = ROOT / source
            files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
            for file in files:
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
        return digest.hexdigest()[:12]

    def run(self, emit: Emit, *, small: bool) -> None:
        module: Any = importlib.import_module(f"benchmarks.gpu.{self.name}")
        module.run(emit, small=small)


_MODELS = ("torch", "transformers", "numpy")
_OFFLOAD = (*_MODELS, "xxhash")
_STEPS = ("benchmarks/compare.py", "benchmarks/step.py", "benchmarks/quality_methods.py", "optimizers")
_OFFLOADS = ("benchmarks/compare.py", "benchmarks/offload_cases.py", "offload")

STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="gpu_tests",
            title="Tests",
            text="Every test marked `gpu`: streams and pinned buffers of the activation offload, compact layers and"
            " optimizers on CUDA.",
            needs=("torch", "numpy", "xxhash", "pytest"),
            sources=("tests", "offload", "optimizers"),
            limit=300,
        ),
        Stage(
            name="layers",
            title="One layer",
            text="Forward and backward of a compact linear layer at density 1/8 against `nn.Linear`.",
            needs=_MODELS,
            sources=("benchmarks/compare.py", "benchmarks/compact_linear.py", "optimizers"),
            limit=150,
        ),
        Stage(
            name="steps",
            title="A training step",
            text="A LLaMA in bf16 with Grass at density 1/8 against `torch.optim.AdamW`, phase by phase. A refresh is"
            " not part of the step.",
            needs=_MODELS,
            sources=_STEPS,
            limit=200,
        ),
        Stage(
            name="methods",
            title="The optimizers",
            text="The same LLaMA in bf16 with each optimizer: time of a step and of the optimizer's part of it, against"
            " AdamW (foreach).",
            needs=_MODELS,
            sources=_STEPS,
            limit=240,
        ),
        Stage(
            name="memory",
            title="Peak memory",
            text="Each optimizer alone on the GPU: the peak of a step and what is left after it, by"
            " `torch.cuda.max_memory_allocated`.",
            needs=_MODELS,
            sources=_STEPS,
            limit=200,
        ),
        Stage(
            name="offload",
            title="Activation offload",
            text="Forward and backward of a LLaMA in bf16. `pinned memory`: offload to RAM; `offload everything`: to"
            " disk; `save_on_cpu`: PyTorch's `torch.autograd.graph.save_on_cpu` with pinned memory.",
            needs=_OFFLOAD,
            sources=_OFFLOADS,
            limit=360,
        ),
        Stage(
            name="offload_bits",
            title="Activation offload, bit for bit",
            text="Whether gradients are the same bits as without offload, with PyTorch's deterministic algorithms.",
            needs=_OFFLOAD,
            sources=_OFFLOADS,
            limit=200,
        ),
        Stage(
            name="large",
            title="A model of 1B parameters",
            text="`configs/models/llama-1b.json` in bf16: dense AdamW against Grass at density 1/8, both fused.",
            needs=_MODELS,
            sources=(*_STEPS, "configs/models/llama-1b.json"),
            limit=300,
        ),
        Stage(
            name="whole_run",
            title="A whole run",
            text="`narrowgauge train` of the quickstart in fp32 with the engine `ddp`: tokenizer, data, training,"
            " evaluation and summary, on one GPU and without DeepSpeed.",
            needs=(*_OFFLOAD, "pydantic", "hjson", "rich", "sentencepiece", "safetensors", "packaging", "psutil"),
            sources=("engine", "optimizers", "offload", "configs/quickstart.json"),
            limit=360,
        ),
    )
}
