"""DeepSpeed's curriculum (``data_efficiency``) over a resume: the batches that an uninterrupted run gets.

DeepSpeed's sampler saves neither the state of the generator that it draws from nor the order of the samples in its
clusters, whose files it shuffles in place. Both follow from the seed: the batches of before are drawn again.
"""

from typing import Any

from deepspeed.runtime.data_pipeline.data_sampling.data_sampler import DeepSpeedDataSampler
from deepspeed.runtime.engine import DeepSpeedEngine

from ...config.config import Config
from ...ranks.together import together

_GENERATOR, _BATCH_SIZE = "generator", "global_batch_size"
# What of the saved place the batches that are drawn again must lead to.
_MUST_AGREE = ("current_difficulties", "data_cluster_paths", "data_cluster_current_position", _GENERATOR)


def check_curriculum(config: Config) -> None:
    """Refuse what a resume could not go on with.

    Raises:
        ConfigError: worker processes, for which the sampler is ahead of the training, nobody knows how far.
    """
    sampling = (config.raw.get("data_efficiency") or {}).get("data_sampling") or {}
    workers = sampling.get("num_workers", 0)
    if workers and (sampling.get("curriculum_learning") or {}).get("enabled"):
        raise config.error(
            f"data_efficiency.data_sampling.num_workers: expected 0 with curriculum_learning, got {workers}"
        )


def keep_curriculum(engine: DeepSpeedEngine) -> None:
    """Make a checkpoint of the engine hold its curriculum's place."""
    loader: Any = engine.training_dataloader
    if loader is not None and engine.curriculum_learning_enabled():
        loader.data_sampler.__class__ = _Sampler


class _Sampler(DeepSpeedDataSampler):
    def state_dict(self) -> dict[str, Any]:
        own = {_GENERATOR: self.np_rng.bit_generator.state, _BATCH_SIZE: self.global_batch_size}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a place. Collective.

        Raises:
            CheckpointError: with this batch size, seed, schedule or data the batches of before are others.
        """
        together("load", lambda: _check(state_dict, _BATCH_SIZE, self.global_batch_size))
        self._start_over()
        while self.curriculum_step < state_dict["curriculum_step"]:
            self.get_next_global_batch()
        self.batch = list(state_dict["batch"])
        # An iterator that waits counts its last micro-batch only when it is asked for the next.
        self.consumed_samples = self.curriculum_step * self.global_batch_size - len(self.batch)
        together("load", lambda: self._check_place(state_dict))

    def _check_place(self, state: dict[str, Any]) -> None:
        # Only this rank draws.
        if self.global_rank == 0:
            found = self.state_dict()
            for key in _MUST_AGREE:
                _check(state, key, found[key])

    def _start_over(self) -> None:
        """As it was made, with the schedules that the caller has set since."""
        schedulers = self.curriculum_schedulers
        self.__init__(
            self.data_efficiency_config,
            self.one_epoch_total_samples,
            self.micro_batch_size,
            self.data_parallel_rank,
            self.data_parallel_group.size(),
            self.data_parallel_group,
            self.gradient_accumulation_steps,
            self.global_rank,
            self.drop_last,
        )
        custom = {k: s.custom_get_difficulty for k, s in schedulers.items() if hasattr(s, "custom_get_difficulty")}
        self.set_custom_curriculum_learning_schedule(custom)


def _check(state: dict[str, Any], key: str, found: Any) -> None:
    if key in state and state[key] != found:
        raise ValueError(
            "data_efficiency: expected the batch size, seed, schedule and data that the curriculum began with, got"
            f" others: {key} was {state[key]}, is {found}"
        )
