"""``narrowgauge train``: one run from a configuration to a summary."""

import json
import logging
import math
import os
import shutil
import socket
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch.optim.lr_scheduler import LambdaLR

from narrowgauge.optimizers.numerics.seeds import derive_seed

from ..backends import backend_of
from ..checkpoint.checkpoint import load_checkpoint, save_checkpoint
from ..checkpoint.files import find_checkpoints
from ..config.json_file import digest
from ..config.redaction import redact
from ..data.packed import RankSampler, training_loader
from ..data.tokenizer import load_tokenizer
from ..errors import CheckpointError, UserError
from ..files import write_json
from ..offload.meter import OffloadMeter, summarize_offload
from ..protocol import TrainingEngine
from ..ranks.agreement import agree
from ..ranks.environment import ensure_environment, process_rank, world_size
from ..ranks.preemption import Preempted, StopRequest
from ..ranks.watchdog import Watchdog
from ..report.metrics import MetricsLog, step_records
from ..report.progress import ProgressView
from ..report.summary import (
    SCHEMA_VERSION,
    count_parameters,
    max_over_ranks,
    optimizer_state_bytes,
    peak_memory,
    traffic_bytes,
)
from ..report.summary_table import print_summary
from ..report.timing import PhaseTimer
from ..run_folder import CHECKPOINTS, CONFIG, METRICS, STARTS, SUMMARY, TOKENIZER
from .evaluate import evaluate
from .plan import Plan, plan_together
from .sample import sample_text
from .schedule import make_schedule

logger = logging.getLogger(__name__)


def train(
    config: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    console: Console | None = None,
) -> Path:
    """Train as the configuration says, resuming where its run folder has a checkpoint.

    Args:
        config: a JSON file, or its contents.
        overrides: ``a.b=value`` each.
        fresh: start over, in a new folder beside one that exists.
        console: shows the progress and the summary; messages go to the logger ``narrowgauge``.

    Returns:
        The run folder.

    Raises:
        UserError: the configuration, data, run folder or a checkpoint does not hold; the same on every process rank.
        Preempted: SIGTERM or SIGUSR1 came; a checkpoint has been saved. The same on every process rank.
    """
    ensure_environment()
    console = console or Console()
    with StopRequest() as stop:
        plan, lock = plan_together(config, overrides, fresh)
        backend = backend_of(plan.config.parsed.engine)
        backend.prepare(plan.config, console)
        backend.init_distributed()
        run = _Run(plan, console, stop)
        try:
            with Watchdog(plan.training.hang_timeout, plan.run_dir) as run.watchdog:
                run.execute()
        finally:
            dist.destroy_process_group()
            if lock is not None:
                lock.release()
    return plan.run_dir


class _Run:
    """One process rank's side of a run."""

    def __init__(self, plan: Plan, console: Console, stop: StopRequest) -> None:
        self.plan, self.console = plan, console
        # What this rank was asked, and whether any rank was by the end of the last step.
        self.stop, self.must_stop = stop, False
        self.doing = "the start"
        self.is_first_rank = process_rank() == 0
        self.timer, self.data_wait = PhaseTimer(), 0.0
        self.tokens_per_step = plan.batches.total * plan.data.sequence_length
        self.watchdog: Watchdog
        self.engine: TrainingEngine
        self.offload_meter = OffloadMeter(None)
        self.history: dict[str, Any] = {"loss_first": None, "loss_last": None, "eval_loss_first": None}

    def execute(self) -> None:
        self.engine = self._make_engine()
        try:
            self._train()
        finally:
            self.engine.close()

    def _train(self) -> None:
        plan = self.plan
        self.offload_meter = OffloadMeter(self.engine.activation_offload)
        self.watchdog.beat("loading the checkpoint")
        first_step = self._resume()
        if self.is_first_rank:
            self._write_head(first_step)
        self.engine.traffic.attach()
        metrics = (
            MetricsLog(plan.run_dir, first_step=first_step, tensorboard=plan.logging.tensorboard)
            if self.is_first_rank
            else None
        )
        try:
            with ProgressView(self.console, first_step=first_step, num_steps=plan.training.steps) as view:
                self._loop(first_step, view if self.is_first_rank else None, metrics)
        finally:
            self.engine.traffic.detach()
            if metrics is not None:
                metrics.close()
        self._finish()

    def _write_head(self, first_step: int) -> None:
        plan = self.plan
        start = {
            "time": time.time(),
            "host": socket.gethostname(),
            "world_size": world_size(),
            "after_step": first_step,
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
        }
        with (plan.run_dir / STARTS).open("a") as file:
            file.write(json.dumps(start) + "\n")
        model: Any = self.engine.module
        resolved = {
            "config": redact(plan.config.raw),
            "world_size": world_size(),
            "train_batch_size": plan.batches.total,
            "train_micro_batch_size_per_gpu": plan.batches.micro,
            "gradient_accumulation_steps": plan.batches.accumulation_steps,
            "resolved": redact(plan.config.parsed.model_dump(mode="json", exclude_unset=False, exclude_none=True)),
            "model": {**model.config.to_dict(), "use_cache": True},
            "data_fingerprint": plan.prepared.fingerprint,
        }
        write_json(plan.run_dir / CONFIG, resolved)
        parameters, ranks = count_parameters(self.engine.module, self.engine.shape_of)["total"], world_size()
        logger.info(
            f"{parameters:,} parameters, {plan.config.raw['optimizer']['type']} at {self.engine.description} on"
            f" {ranks} rank{'s' if ranks > 1 else ''}, {self.tokens_per_step:,} tokens per step; {plan.run_dir}"
        )
        if plan.prepared.tokenizer is not None:
            # Not a copy of the folder: the user's may be a whole model.
            load_tokenizer(plan.prepared.tokenizer).save_pretrained(str(plan.run_dir / TOKENIZER))

    def _make_engine(self) -> TrainingEngine:
        plan = self.plan
        backend = backend_of(plan.config.parsed.engine)
        model, error = None, None
        try:
            model = backend.construct(plan.model, plan.model_config, plan.config)
        except UserError as found:
            error = str(found)
        # A rank that cannot read the weights takes the others with it; they would wait for it.
        agree({}, error=error)
        assert model is not None
        schedule = plan.training.lr_schedule
        return backend.build(
            plan.config,
            model,
            schedule=make_schedule(schedule, plan.training.steps) if schedule is not None else None,
        )

    def _resume(self) -> int:
        """Continue from the newest checkpoint that is whole; returns the step it was written after."""
        checkpoints = find_checkpoints(self.plan.run_dir / CHECKPOINTS)
        for number, (step, folder) in enumerate(reversed(checkpoints)):
            try:
                state = load_checkpoint(self.engine, folder)
            except CheckpointError as error:
                if number == len(checkpoints) - 1:
                    raise
                if self.is_first_rank:
                    logger.warning(f"{error}; trying the checkpoint before it")
                continue
            if state["data_fingerprint"] != self.plan.prepared.fingerprint:
                raise UserError(f"{folder}: the run was trained on other data than data.train names now").shared()
            if step > self.plan.training.steps:
                raise UserError(
                    f"training.steps: expected at least the {step} steps that {self.plan.run_dir} has been trained for,"
                    f" got {self.plan.training.steps}; use --fresh or another logging.run_dir"
                ).shared()
            self.history.update(state["history"])
            _follow_schedule(self.engine.lr_scheduler)
            if self.is_first_rank:
                logger.info(f"resumed after step {step} from {folder}")
            return step
        return 0

    def _loop(self, first_step: int, view: ProgressView | None, metrics: MetricsLog | None) -> None:
        plan, training = self.plan, self.plan.training
        sampler = RankSampler(
            num_samples=len(plan.train_data),
            seed=training.seed,
            first_step=first_step,
            last_step=training.steps,
            micro_batch_size=plan.batches.micro,
            accumulation_steps=plan.batches.accumulation_steps,
            rank=self.engine.data_parallel.rank,
            world_size=self.engine.data_parallel.size,
        )
        batches = training_loader(plan.train_data, sampler, plan.data.num_workers)
        waited_for = self._watch(batches)
        if first_step == 0:
            self.history["eval_loss_first"] = self._evaluate(0, view, metrics)
        for step in range(first_step + 1, training.steps + 1):
            record = self._step(step, waited_for)
            if metrics is not None and (step % plan.logging.interval == 0 or step == training.steps):
                metrics.write(step, record)
            if view is not None:
                view.update(step, loss=record["loss"], lr=record["lr"], tokens_per_second=record["tokens_per_second"])
            last = step == training.steps
            if last or (training.eval_interval and step % training.eval_interval == 0):
                self.history["eval_loss"] = self._evaluate(step, view, metrics)
            is_due = last or (training.checkpoint_interval and step % training.checkpoint_interval == 0)
            if is_due or self.must_stop:
                self._save(step)
            if self.must_stop and not last:
                raise Preempted(
                    f"asked to end: saved after step {step} of {training.steps}; the same command goes on from there"
                )

    def _step(self, step: int, batches: Iterator[torch.Tensor]) -> dict[str, Any]:
        engine, plan = self.engine, self.plan
        # A pure function of the step, so that a resumed run draws the same dropout.
        torch.manual_seed(derive_seed(plan.training.seed, "step", step, process_rank()))
        traffic, self.data_wait = engine.traffic, 0.0
        before = traffic.reduced, traffic.gathered
        started = time.perf_counter()
        learning_rates, num_skipped = _learning_rates(engine), engine.counters()["skipped_steps"]
        # The loss, and the number of ranks that were asked to end.
        sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
        self.doing = f"step {step}"
        sums[0] = engine.train_step(batches, self._phase)
        sent = {
            "reduced": round(traffic.reduced - before[0]),
            "gathered": round(traffic.gathered - before[1]),
        }
        sums[1] = self.stop.received is not None
        dist.all_reduce(sums)
        loss_sum, num_asked = sums.tolist()
        self.must_stop = num_asked > 0
        mean = loss_sum / (plan.batches.accumulation_steps * world_size())
        moved, stalled = self.offload_meter.step()
        seconds = {**self.timer.collect(), "data_wait": self.data_wait, **stalled}
        seconds["step"] = time.perf_counter() - started
        if not math.isfinite(mean):
            folder = plan.run_dir / CHECKPOINTS
            raise UserError(f"step {step}: the loss is {mean}; checkpoints of before are in {folder}").shared()
        is_skipped = engine.counters()["skipped_steps"] > num_skipped
        if is_skipped and self.is_first_rank:
            logger.warning(f"step {step}: the gradients are not finite: the step is left out, the weights stay")
        if self.history["loss_first"] is None:
            self.history["loss_first"] = mean
        self.history["loss_last"] = mean
        return {
            "loss": mean,
            **learning_rates,
            "grad_norm": engine.grad_norm(),
            "skipped": is_skipped,
            "tokens": step * self.tokens_per_step,
            "tokens_per_second": self.tokens_per_step / seconds["step"],
            "bytes": {**sent, **moved},
            "seconds": seconds,
        }

    def _watch(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The batches, with the time that the step waits for them."""
        batches = iter(batches)
        while True:
            self.watchdog.beat(f"{self.doing}, waiting for data")
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.data_wait += time.perf_counter() - asked
            yield batch

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.watchdog.beat(f"{self.doing}, {name}")
        with self.timer.phase(name):
            yield

    def _evaluate(self, step: int, view: ProgressView | None, metrics: MetricsLog | None) -> float:
        loss = evaluate(
            self.engine,
            self.plan.eval_data,
            num_sequences=self.plan.training.eval_sequences,
            micro_batch_size=self.plan.batches.micro,
            beat=lambda: self.watchdog.beat(f"evaluation after step {step}"),
        )
        if metrics is not None:
            metrics.write(step, {"eval_loss": loss})
        if view is not None:
            view.say(f"step {step}: validation loss {loss:.4f}")
        return loss

    def _save(self, step: int) -> None:
        folder = self.plan.run_dir / CHECKPOINTS
        self.watchdog.beat(f"saving after step {step}")
        state = {"step": step, "data_fingerprint": self.plan.prepared.fingerprint, "history": self.history}
        save_checkpoint(self.engine, folder / f"step-{step}", state)
        if self.is_first_rank:
            for _, old in find_checkpoints(folder)[: -self.plan.training.keep_checkpoints]:
                shutil.rmtree(old, ignore_errors=True)

    def _finish(self) -> None:
        plan, engine = self.plan, self.engine
        training = plan.training
        self.watchdog.beat("the end of the run")
        sample = None
        if training.sample_prompt is not None:
            sample = sample_text(
                engine, plan.prepared.tokenizer, training.sample_prompt, training.sample_tokens, training.seed
            )
        memory = max_over_ranks(peak_memory(), engine.device)
        if self.is_first_rank:
            summary = self._summarize(int(memory), sample)
            write_json(plan.run_dir / SUMMARY, summary)
            print_summary(summary, str(plan.run_dir), self.console)
        dist.barrier()

    def _summarize(self, memory: int, sample: str | None) -> dict[str, Any]:
        """The figures of the whole run, also of parts that other processes trained."""
        plan, engine = self.plan, self.engine
        # The first steps build what later ones reuse.
        records = step_records(plan.run_dir)
        if not records:
            raise UserError(f"{plan.run_dir}/{METRICS}: expected a training step to make a summary of, got none")
        measured = records[2:] or records
        median = {
            phase: statistics.median(record["seconds"][phase] for record in measured)
            for phase in ("step", "forward", "backward", "optimizer", "data_wait")
        }
        reduced, gathered = (
            statistics.fmean(record["bytes"][kind] for record in records) for kind in ("reduced", "gathered")
        )
        state, state_dense = optimizer_state_bytes(engine)
        offloaded = summarize_offload(records, engine.activation_offload)
        return {
            "schema_version": SCHEMA_VERSION,
            "config_sha256": digest(plan.config.raw),
            "world_size": world_size(),
            "zero_stage": engine.zero_stage,
            "steps": plan.training.steps,
            "tokens": plan.training.steps * self.tokens_per_step,
            "tokens_per_second": self.tokens_per_step / median["step"],
            **self.history,
            "parameters": count_parameters(engine.module, engine.shape_of),
            **({"matrices": engine.own_optimizer.coverage.summary()} if engine.own_optimizer is not None else {}),
            "bytes": {
                **traffic_bytes(engine, reduced=reduced, gathered=gathered),
                "optimizer_state": state,
                "optimizer_state_dense": state_dense,
                "peak_memory": memory,
                **offloaded.pop("bytes"),
            },
            "seconds": {"step_median": median.pop("step"), **median, **offloaded.pop("seconds")},
            **offloaded,
            "sample": sample,
        }


def _follow_schedule(scheduler: Any) -> None:
    """Set the rates of the step the schedule is at: the run may have been given another length since."""
    if isinstance(scheduler, LambdaLR):
        for group, base, factor in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(scheduler.last_epoch)


def _learning_rates(engine: TrainingEngine) -> dict[str, float]:
    """The rate of dense parameters as ``lr``, and of the matrices, compact or whole, as ``lr_matrix``."""
    groups = engine.optimizer.param_groups
    rates = {group.get("kind", "dense"): float(group["lr"]) for group in reversed(groups)}
    found = {"lr": rates.get("dense", next(iter(rates.values())))}
    matrix = rates.get("compact", rates.get("matrix"))
    return {**found, "lr_matrix": matrix} if matrix is not None else found
