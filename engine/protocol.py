"""What the training loop, checkpoints and summary need of an engine, and what an engine brings along.

An engine owns how a step runs (accumulation, a pipeline's schedule), where parameters, masters and moments lie, and
which process groups reduce what. The others know only this file. What they must not take for granted: the
data-parallel group is not the world; a shard is a piece of a box of a global shape; parameters have global names, also
where a process holds only some of the layers; weights have a name and a layout that may differ from Hugging Face's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from narrowgauge.offload import ActivationOffload
from narrowgauge.optimizers import EngineOptimizer
from narrowgauge.optimizers.sharding.shards import Shard

from .micro_batch import Batch

if TYPE_CHECKING:
    from rich.console import Console
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PretrainedConfig

    from .config.config import Config
    from .config.engine_keys import EngineKeys
    from .config.run_blocks import ModelBlock
    from .forecast.held import Rank
    from .forecast.sent import Sent
    from .forecast.whole_model import Traces

Phase = Callable[[str], AbstractContextManager[None]]
"""Opens one of the phases ``forward``, ``backward`` and ``optimizer`` of a step: they are timed and watched."""

Schedule = Callable[[torch.optim.Optimizer], "LRScheduler"]


@dataclass(frozen=True)
class ParallelGroup:
    """Process ranks that do the same on different data, or on different parts of the model.

    Attributes:
        rank: of this process within the group.
        size: number of process ranks in it.
        group: for torch.distributed; None is the world.
    """

    rank: int
    size: int
    group: "torch.distributed.ProcessGroup | None" = None


@dataclass(frozen=True)
class MemoryLayout:
    """How an engine keeps the trainable parameters, for what a dense AdamW would take in the same place.

    Attributes:
        has_masters: the optimizer steps fp32 copies of the parameters.
        num_shares: over how many process ranks the master and moments of what is a parameter here are cut; 1 where each
            holds them whole.
    """

    has_masters: bool
    num_shares: Callable[[Tensor], int]


@dataclass(frozen=True)
class HeldByRank:
    """What a process rank will hold before it has trained a step, without activations.

    Attributes:
        process_ranks: which: ``0-7``.
        what: of the model: ``layers 0-3``.
        parameters: number of elements.
        bytes: by kind: parameters and, as far as it is known ahead, gradients, masters, moments.
    """

    process_ranks: str
    what: str
    parameters: int
    bytes: Mapping[str, int]


class Traffic(Protocol):
    """Bytes this process rank has sent since :meth:`attach`, for reductions and for gathers.

    Attributes:
        activations: in one step, to ranks that share layers or have those before and after; None where there are none,
            or it is not known.
    """

    reduced: float
    gathered: float
    activations: float | None

    def attach(self) -> None: ...

    def detach(self) -> None: ...


class WeightSource(Protocol):
    """Weights under Hugging Face's names, in its layout."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None where there is no weight of this name."""
        ...

    def read(self, name: str) -> Tensor: ...


class TrainingEngine(Protocol):
    """A model, its optimizer and the ranks that train it. Collective methods are called by all ranks alike.

    Attributes:
        module: the model as it was built, with compact layers where the optimizer made some.
        device: where its inputs go.
        optimizer: the one that holds parameter groups and state, below any wrapper.
        own_optimizer: the same, where it is one of :mod:`narrowgauge.optimizers`.
        lr_scheduler: has ``step``, ``state_dict`` and ``load_state_dict``; None for constant rates.
        data_parallel: the ranks that train on different data.
        accumulation_steps: micro-batches per optimizer step.
        activation_offload: keeps what training forwards save; None where all of it stays.
        traffic: what the engine's collectives send.
        description: of the layout, in a few words for people: ``ZeRO-1``.
        zero_stage: 0 where nothing is sharded as ZeRO does.
        forward_is_collective: every rank must take part in each forward (sharded weights), also to generate.
        state_is_replicated: every rank of ``data_parallel`` holds the whole optimizer state; one of them saves it.
    """

    # Read-only, so that an engine may have narrower types and properties.
    @property
    def module(self) -> nn.Module: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    @property
    def own_optimizer(self) -> EngineOptimizer | None: ...
    @property
    def lr_scheduler(self) -> Any: ...
    @property
    def data_parallel(self) -> ParallelGroup: ...
    @property
    def accumulation_steps(self) -> int: ...
    @property
    def activation_offload(self) -> ActivationOffload | None: ...
    @property
    def traffic(self) -> Traffic: ...
    @property
    def description(self) -> str: ...
    @property
    def zero_stage(self) -> int: ...
    @property
    def forward_is_collective(self) -> bool: ...
    @property
    def state_is_replicated(self) -> bool: ...

    def train_step(self, batches: Iterator[Batch], phase: Phase) -> Tensor:
        """One optimizer step over ``accumulation_steps`` micro-batches. Collective.

        Args:
            batches: on any device; the loss of each is multiplied by its weight.
            phase: entered around each forward, backward and optimizer call.

        Returns:
            The sum of the micro-batches' mean losses on this rank, weighted, a float64 scalar on ``device``; the same
            on all ranks that have the same rank in ``data_parallel``.
        """
        ...

    def evaluate(self, batch: Batch) -> Tensor:
        """The mean loss over the learned tokens of a micro-batch, without gradients and dropout; float32 scalar.
        Collective where ``forward_is_collective``.
        """
        ...

    def generate(self, tokens: Tensor, *, before_forward: Callable[[], None], **options: Any) -> Tensor:
        """Continue int64 tokens ``(batch, sequence)`` as transformers' ``generate`` does, in evaluation mode.
        Collective where ``forward_is_collective``: all ranks generate the same then.

        Args:
            before_forward: called before each forward, and before any of its collectives.
            options: of that function.
        """
        ...

    def grad_norm(self) -> float | None:
        """Of the averaged gradients of the last step, before clipping; None where the engine does not compute it."""
        ...

    def step_metrics(self) -> Mapping[str, Any]:
        """What else is worth recording of the last step: numbers by name, or such mappings; the same on all ranks."""
        ...

    def shards(self) -> Sequence[Shard]:
        """This rank's pieces of all trainable parameters, in a fixed order, with the tensors that hold them.

        Raises:
            UserError: the engine keeps its masters in a form whose pieces are not known.
        """
        ...

    def saves(self, shard: Shard) -> bool:
        """Whether this rank, of those that hold the same shard, is the one that saves it; only asked where the state is
        not replicated as a whole.
        """
        ...

    def trainable_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The whole shape of each trainable parameter, by global name, also of those other ranks hold."""
        ...

    def subspace_state(self) -> dict[str, Any] | None:
        """What :meth:`.EngineOptimizer.subspace_state` says of the layers of all ranks, as :meth:`before_save` found
        it; None where the optimizer is not ours. Only rank 0 is asked.
        """
        ...

    def load_subspace_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`subspace_state` gave, as far as it belongs here.

        Raises:
            ValueError: it was saved by another version, type or configuration; nothing has changed then.
        """
        ...

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of elements over all ranks; see :func:`narrowgauge.engine.report.parameters.count_parameters`."""
        ...

    def parameter_groups(self) -> Mapping[str, int]:
        """The parameter group of each trainable parameter, by global name, also of those other ranks hold."""
        ...

    def shape_of(self, parameter: Tensor) -> tuple[int, ...]:
        """The whole shape of a parameter that may be sharded."""
        ...

    def gathered(self, parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """The parameters are whole inside. Collective."""
        ...

    def local_part(self, parameter: Tensor) -> tuple[Tensor, int]:
        """What this rank keeps of a parameter or buffer: a flat view to write to, and its first element's position."""
        ...

    def before_save(self) -> None:
        """Bring the weights up to date on all ranks. Collective."""
        ...

    def masters_to_model(self) -> None:
        """After masters were written: the parameters become their rounded copies. Collective."""
        ...

    def model_to_masters(self) -> None:
        """After parameters were written: masters become copies of them."""
        ...

    def after_load(self) -> None:
        """After everything was written: renew whatever the engine keeps gathered. Collective."""
        ...

    def counters(self) -> dict[str, Any]:
        """Steps and whatever else the engine counts, for :meth:`restore_counters`."""
        ...

    def restore_counters(self, values: Mapping[str, Any]) -> None: ...

    def memory_layout(self) -> MemoryLayout: ...

    def dense_traffic(self, *, gathered: float) -> tuple[float, float]:
        """Bytes reduced and gathered per step and rank if all parameters were trained whole, in the same layout.

        Args:
            gathered: bytes gathered per step and rank by the run as it is.
        """
        ...

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The plain weights, each whole and folded, under Hugging Face's names and in its layout, and the persistent
        buffers. Collective: every rank goes through all of them; only rank 0 of the world needs the values.
        """
        ...

    def load_weights(self, source: WeightSource, *, rebuild_compact: bool) -> None:
        """Read the weights and buffers this rank holds, whole or its part; no communication.

        Args:
            rebuild_compact: also take the compact values, and all masters, from the weights read.

        Raises:
            ValueError: a weight is missing or has another shape; nothing has been read then.
        """
        ...

    def close(self) -> None:
        """Give back what the engine holds outside torch: offload, hooks."""
        ...


class Backend(Protocol):
    """A kind of engine: a folder of :mod:`narrowgauge.engine.backends` whose ``__init__`` has one as ``BACKEND``.

    ``engine`` in the configuration names the folder. Its module must be importable without the engine's packages:
    they are imported in the methods.

    Attributes:
        keys: pydantic model of the configuration keys that the engine takes beside narrowgauge's blocks.
    """

    name: ClassVar[str]

    @property
    def keys(self) -> "type[EngineKeys]": ...

    def check(self, config: "Config") -> None:
        """Refuse what the engine cannot do, or cannot do with the configured optimizer, before anything is built.

        Raises:
            ConfigError: naming each setting, why, and what to use instead.
        """
        ...

    def check_model(self, config: "Config", model_config: "PretrainedConfig", world_size: int) -> None:
        """Refuse a model that the engine does not build, or cannot cut over this number of process ranks; before there
        is a process group.

        Raises:
            ConfigError: naming each key, what fits, and what was found.
        """
        ...

    def data_parallel_size(self, config: "Config", world_size: int) -> int:
        """Number of process ranks that train on different data.

        Raises:
            ConfigError: the layout does not fit this number of process ranks.
        """
        ...

    def rehearse(self, config: "Config", model_config: "PretrainedConfig", world_size: int) -> Sequence[HeldByRank]:
        """Build what each process rank would hold, without storage and in this process alone, after
        :meth:`check_model`; nothing where the engine does not say.
        """
        ...

    def forecast(
        self,
        config: "Config",
        model_config: "PretrainedConfig",
        world_size: int,
        *,
        on_gpu: bool,
        steps: int,
        traces: "Traces | None" = None,
    ) -> "Sequence[tuple[Rank, Sent]]":
        """What each kind of process rank will hold and send, without storage and in this process alone, after
        :meth:`check_model`.

        Args:
            on_gpu: of a run on GPUs and NCCL, not on CPUs and gloo.
            steps: of the run; what happens now and then is a mean over them.
            traces: of other forecasts of the same model, to go on from.

        Raises:
            UserError: it cannot be told ahead, or the optimizer's options do not fit the model.
        """
        ...

    def prepare(self, config: "Config", console: "Console | None" = None) -> None:
        """Build ahead what the engine would compile at its first use."""
        ...

    def init_distributed(self) -> None:
        """Make the process group, if there is none."""
        ...

    def construct(self, block: "ModelBlock", model_config: "PretrainedConfig", config: "Config") -> nn.Module:
        """The model to train, where the engine wants it; weights from scratch depend on seed and name only."""
        ...

    def build(self, config: "Config", model: nn.Module, *, schedule: Schedule | None) -> TrainingEngine:
        """The engine. Collective.

        Raises:
            ConfigError: it cannot be made with these settings.
        """
        ...
