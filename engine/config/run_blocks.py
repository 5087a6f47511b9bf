"""The blocks of ``narrowgauge train``, the same with every engine."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .blocks import Count, Flag, StrictBlock
from .coreset_block import CoresetBlock
from .launch_block import LaunchBlock
from .lora_block import LoraBlock
from .offload_block import ActivationOffloadBlock
from .quantization_block import QuantizationBlock
from .rate_blocks import BatchRuleBlock, LengthPhaseBlock, ScheduleBlock, TrustRegionBlock, WidthRuleBlock
from .sampling_block import SampledBackwardBlock


class ModelBlock(StrictBlock):
    """What is trained: give one of ``path``, ``preset`` and ``config``; ``config`` may also adjust a preset."""

    path: str | None = None
    """A local Hugging Face folder; training starts from its weights."""
    preset: str | None = None
    """The name of a size shipped with the package, such as ``llama-60m``; starts from random weights."""
    config: dict[str, Any] = {}
    """A Hugging Face model configuration, with ``model_type``; starts from random weights."""
    initial_weights: Literal["by_name", "transformers"] = "by_name"
    """Random weights: each module's from ``training.seed`` and its name; or as transformers draws them after
    ``torch.manual_seed``, in fp32, for which each process makes the whole model on its CPU."""
    gradient_checkpointing: Literal["none", "reentrant", "non-reentrant"] = "none"

    @model_validator(mode="after")
    def _one_source(self) -> "ModelBlock":
        if self.path is not None and (self.preset is not None or self.config):
            raise ValueError("'path' stands alone: 'preset' and 'config' start from random weights")
        if self.path is not None and "initial_weights" in self.model_fields_set:
            raise ValueError("'initial_weights' is of random weights: 'path' has its own")
        if self.path is None and self.preset is None and not self.config:
            raise ValueError("expected one of 'path', 'preset' and 'config', got none")
        return self


class SourceBlock(StrictBlock):
    """One source of training data; the path alone stands for one without a name or weight."""

    path: str
    """A file, a glob, or a folder that ``datasets`` has saved."""
    name: str | None = Field(default=None, min_length=1)
    """What tables and messages call it; default the path."""
    weight: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Its share of the samples, relative to the other sources'; all of them have one or none has, and then each sample
    comes once per epoch."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class DataBlock(StrictBlock):
    """What it is trained on."""

    train: Literal["stdlib"] | list[SourceBlock] = "stdlib"
    """``stdlib``: the source files of the running Python's standard library. Otherwise plain text files, Megatron
    ``.bin``/``.idx`` pairs (named by either or by their common prefix), or globs of them; or records: JSON, JSON Lines,
    Parquet, folders of ``datasets``."""
    validation: list[SourceBlock] | None = None
    """As ``train``; without it ``validation_fraction`` of the training text, or of the records, is held out."""
    validation_fraction: float = Field(0.02, gt=0.0, lt=1.0)
    format: Literal["text", "messages", "prompt_completion", "alpaca"] | None = None
    """Of records; default what their columns say."""
    packing: Flag = False
    """Several records in a sample, none of which sees another; else each is padded."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What happens to records of more than ``sequence_length`` tokens; those of ``text`` are cut into several."""
    chat_template: str | None = Field(default=None, min_length=1)
    """A file with a chat template, in place of the tokenizer's."""
    tokenizer: str | None = None
    """A Hugging Face tokenizer folder or a sentencepiece ``.model``; without it that in ``model.path``'s folder, and
    where there is none, one that is trained on the text."""
    vocab_size: Count = 4096
    """Of the tokenizer that is trained."""
    sequence_length: int = Field(512, gt=1)
    """Tokens per sample, of records at most; documents are packed, with an end token after each."""
    cache_dir: str = "~/.cache/narrowgauge"
    num_workers: int = Field(1, ge=0)


class ProfileBlock(StrictBlock):
    """Steps that are profiled."""

    steps: list[int] = Field(min_length=2, max_length=2)
    """The first and the last; each process rank writes a trace to ``profile/`` in the run folder."""

    @field_validator("steps")
    @classmethod
    def _in_order(cls, value: list[int]) -> list[int]:
        if not 1 <= value[0] <= value[1]:
            raise ValueError(f"expected the first step and the last, such as [10, 12], got {value}")
        return value


class TrainingBlock(StrictBlock):
    """How long, and what happens on the way."""

    steps: Count | None = None
    """Optimizer steps of the run; this or ``epochs``."""
    epochs: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Times that all training samples are seen, up to a whole step."""
    seed: int = 0
    lr_schedule: ScheduleBlock | None = None
    batch_rule: BatchRuleBlock | None = None
    width_rule: WidthRuleBlock | None = None
    trust_region: TrustRegionBlock | None = None
    length_schedule: Annotated[list[LengthPhaseBlock], Field(min_length=1)] | None = None
    """Phases one after the other; steps after them have sequences of ``data.sequence_length``."""
    eval_interval: Count | None = None
    """Steps between evaluations; there is always one at the end."""
    eval_sequences: Count = 128
    """Validation samples per evaluation, the same ones each time."""
    checkpoint_interval: Count | None = None
    """Steps between checkpoints; there is always one at the end."""
    keep_checkpoints: Count = 2
    hang_timeout: float | None = Field(1800.0, gt=0.0, allow_inf_nan=False)
    """Seconds in which something must get done, a micro-batch or a whole checkpoint, else all ranks end."""
    sample_prompt: str | None = None
    """Text the trained model continues at the end of the run."""
    sample_tokens: Count = 64
    profile: ProfileBlock | None = None

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingBlock":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"expected one of 'steps' and 'epochs', got {'none' if self.steps is None else 'both'}")
        return self


class SinkBlock(StrictBlock):
    """A service that shows curves."""

    project: str = Field("narrowgauge", min_length=1)
    name: str | None = Field(default=None, min_length=1)
    """Of the run; default the run folder's."""


class WandbBlock(SinkBlock):
    """Weights & Biases: ``pip install 'narrowgauge[wandb]'``."""

    entity: str | None = Field(default=None, min_length=1)
    """The user or team; default the account's."""
    mode: Literal["online", "offline"] = "online"
    """``offline``: only into the run folder, for ``wandb sync``."""


class TrackioBlock(SinkBlock):
    """trackio, on this machine or in a Space of Hugging Face: ``pip install 'narrowgauge[trackio]'``."""

    space: str | None = Field(default=None, min_length=1)
    """The Space, ``user/name``; default none: on this machine."""


class LoggingBlock(StrictBlock):
    """Where the run leaves its traces."""

    run_dir: str = Field(min_length=1)
    interval: Count = 1
    """Steps between lines of ``metrics.jsonl`` and points of the other sinks."""
    tensorboard: Flag = True
    wandb: WandbBlock | None = None
    trackio: TrackioBlock | None = None


class RunBlocks(StrictBlock):
    """The top-level keys that are no engine's."""

    engine: str = "deepspeed"
    """A folder of :mod:`narrowgauge.engine.backends`."""
    activation_offload: ActivationOffloadBlock | None = None
    model: ModelBlock | None = None
    lora: LoraBlock | None = None
    quantization: QuantizationBlock | None = None
    sampled_backward: SampledBackwardBlock | None = None
    data: DataBlock | None = None
    coreset: CoresetBlock | None = None
    training: TrainingBlock | None = None
    logging: LoggingBlock | None = None
    launch: LaunchBlock | None = None


OWN_BLOCKS = tuple(RunBlocks.model_fields)
