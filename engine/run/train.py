"""``narrowgauge train``: one run from a configuration to a summary."""

import logging
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from narrowgauge.optimizers import TrustRegion
from narrowgauge.optimizers.numerics.seeds import derive_seed

from ..backends import backend_of
from ..checkpoint.checkpoint import save_checkpoint
from ..checkpoint.retention import Retention
from ..config.json_file import digest
from ..config.redaction import redact
from ..coreset.coreset import Coreset
from ..data.loader import RankSampler, training_loader
from ..data.mixture import Mixture
from ..errors import DataError, UserError
from ..files import finite, write_json
from ..micro_batch import Batch
from ..offload.meter import OffloadMeter, summarize_offload
from ..protocol import TrainingEngine
from ..quantization.quantize import quantization_record
from ..ranks.agreement import agree
from ..ranks.environment import ensure_environment, process_rank, world_size
from ..ranks.failure import FailureWatch
from ..ranks.preemption import Preempted, StopRequest
from ..ranks.watchdog import Watchdog
from ..report.heap import HeapMeter
from ..report.metrics import MetricsLog, step_records
from ..report.phases import named
from ..report.progress import ProgressView
from ..report.sinks import open_sinks
from ..report.summary import (
    SCHEMA_VERSION,
    max_over_ranks,
    memory_now,
    optimizer_state_bytes,
    peak_memory,
    resident_memory,
    tensor_memory,
    traffic_bytes,
)
from ..report.summary_table import RESIDENT, print_summary
from ..report.timing import PhaseTimer
from ..run_folder import CHECKPOINTS, METRICS, SUMMARY, RunLock
from ..sampled_backward import sampling_record
from .evaluate import evaluate
from .foretold import WATCHED_STEPS, Foretold, foretell
from .head import model_block, write_end, write_head
from .plan import Plan, plan_together
from .profile import StepProfile
from .rates import at_width
from .resume import adapters_record, resume
from .sample import try_sample
from .utilization import Utilization

logger = logging.getLogger(__name__)
# A trace has, inside of the optimizer's phase, reduce, fold and refresh by names of their own.
_TRACED = {"optimizer": "step"}
# From the first of the run folder's files that is deleted to the last.
_SECONDS_OF_DELETION = 2.0


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
        Preempted: SIGTERM, SIGUSR1 or SIGHUP came; a checkpoint has been saved. The same on every process rank.
        RankFailed: another process rank raised something else.
    """
    ensure_environment()
    console = console or Console()
    with StopRequest() as stop:
        plan, lock = plan_together(config, overrides, fresh)
        with FailureWatch() as failures:
            stop.tell_others = failures.tell_of_end
            run = _Run(plan, console, stop, lock)
            try:
                if run.is_first_rank:
                    run.foretold = foretell(plan)
                backend = backend_of(plan.config.parsed.engine)
                backend.prepare(plan.config, console)
                backend.init_distributed()
                with Watchdog(plan.training.hang_timeout, plan.run_dir) as run.watchdog:
                    run.execute()
            except BaseException as error:
                try:
                    failures.tell(error)
                finally:
                    # The reason is known; what follows from it only hides it.
                    with suppress(Exception):
                        run.close()
                raise
            run.close()
    return plan.run_dir


class _Run:
    """One process rank's side of a run."""

    def __init__(self, plan: Plan, console: Console, stop: StopRequest, lock: RunLock | None) -> None:
        self.plan, self.console = plan, console
        # On process rank 0.
        self.lock = lock
        # Of what is open, until a failure has been told: closing it may take for ever then.
        self.closing = ExitStack()
        if lock is not None:
            self.closing.callback(lock.release)
        self.closing.callback(_leave_group)
        # What this rank was asked, and whether any rank was by the end of the last step.
        self.stop, self.must_stop = stop, False
        self.doing = "the start"
        self.is_first_rank = process_rank() == 0
        self.timer, self.data_wait = PhaseTimer(), 0.0
        self.tokens_per_step = plan.tokens_per_step
        self.watchdog: Watchdog
        self.engine: TrainingEngine
        # On process rank 0.
        self.utilization: Utilization | None = None
        self.offload_meter = OffloadMeter(None)
        self.retention = Retention(plan.run_dir / CHECKPOINTS, plan.training.keep_checkpoints)
        self.coreset: Coreset | None = None
        # On process rank 0.
        self.foretold = Foretold({})
        self.heap: HeapMeter
        # The interpreter with PyTorch, DeepSpeed and the data; None on a GPU.
        self.resident_before_model: int | None = None
        self.trust_region: TrustRegion | None = None
        # Of a run that trains adapters, on process rank 0.
        self.adapters: dict[str, Any] | None = None
        self.history: dict[str, Any] = {"loss_first": None, "loss_last": None, "eval_loss_first": None}

    def execute(self) -> None:
        plan = self.plan
        self.heap = HeapMeter()
        self.resident_before_model = resident_memory()
        self.engine = self._make_engine()
        self.closing.callback(self.engine.close)
        self.adapters = adapters_record(plan) if self.is_first_rank else None
        self.offload_meter = OffloadMeter(self.engine.activation_offload)
        self.watchdog.beat("loading the checkpoint")
        self.coreset = self._make_coreset()
        self.trust_region = self._make_trust_region()
        first_step, folder, state = resume(self.engine, plan, self.adapters)
        self.history.update(state.get("history", {}))
        if self.trust_region is not None and first_step:
            self.trust_region.load_state(state.get("trust_region", {}))
        if self.coreset is not None and first_step:
            self.coreset.load(state.get("coreset"))
        if self.is_first_rank:
            if folder is not None:
                self.retention.vouch(folder)
            write_head(self.engine, plan, first_step, self.tokens_per_step)
            self.utilization = Utilization(self.engine, plan)
        while_it_trains = self.closing.enter_context(ExitStack())
        self.engine.traffic.attach()
        while_it_trains.callback(self.engine.traffic.detach)
        metrics = None
        if self.is_first_rank:
            sinks = open_sinks(plan.logging, plan.run_dir, redact(plan.config.raw), first_step=first_step)
            metrics = MetricsLog(plan.run_dir, first_step=first_step, sinks=sinks)
            while_it_trains.callback(metrics.close)
        with ProgressView(self.console, first_step=first_step, num_steps=plan.steps) as view:
            self._loop(first_step, view if self.is_first_rank else None, metrics)
        while_it_trains.close()
        self._finish()

    def close(self) -> None:
        """Give back everything, the process group and the run folder too."""
        self.closing.close()

    def _make_engine(self) -> TrainingEngine:
        plan = self.plan
        backend = backend_of(plan.config.parsed.engine)
        model, error = None, None
        try:
            model = backend.construct(plan.model, plan.model_config, plan.config)
        except UserError as found:
            if plan.config.zero_stage == 3:
                # The others are in collectives of a sharded model, and never come to the question.
                raise
            error = str(found)
        # A rank that cannot read the weights takes the others with it; they would wait for it.
        agree({}, error=error)
        assert model is not None
        return backend.build(at_width(plan.config, plan.rates.matrix_factor), model, schedule=plan.rates.make())

    def _make_coreset(self) -> Coreset | None:
        plan, block = self.plan, self.plan.config.parsed.coreset
        if block is None:
            return None
        assert isinstance(plan.train_data, Mixture)

        def beat() -> None:
            self.watchdog.beat(f"{self.doing}, choosing examples")

        self.history["tokens"] = 0
        return Coreset(block, self.engine, plan.train_data, plan.batches, seed=plan.training.seed, beat=beat)

    def _make_trust_region(self) -> TrustRegion | None:
        block, engine = self.plan.training.trust_region, self.engine
        if block is None:
            return None
        trust_region = TrustRegion(
            engine.optimizer, lambda: engine.lr_scheduler.last_epoch, pull=block.pull, steps=block.steps
        )
        self.closing.callback(trust_region.close)
        return trust_region

    def _loop(self, first_step: int, view: ProgressView | None, metrics: MetricsLog | None) -> None:
        plan, training = self.plan, self.plan.training
        # What a coreset takes is not known ahead.
        read_ahead = self._read_ahead(first_step) if self.coreset is None else iter(())
        self.stop.begin()
        profile = StepProfile(training.profile, plan.run_dir, first_step=first_step)
        self.closing.callback(profile.close)
        if first_step == 0:
            self.history["eval_loss_first"] = self._evaluate(0, view, metrics)
        for step in range(first_step + 1, plan.steps + 1):
            # A trace is no memory of the run's.
            is_watched = step <= first_step + WATCHED_STEPS and step not in profile.steps
            with self.heap.watching() if is_watched else nullcontext(), profile.step(step):
                record = self._step(step, read_ahead)
            if metrics is not None and (step % plan.logging.interval == 0 or step == plan.steps):
                self._record(metrics, step, record)
            if view is not None:
                view.update(step, record)
            last = step == plan.steps
            if last or (training.eval_interval and step % training.eval_interval == 0):
                self.history["eval_loss"] = self._evaluate(step, view, metrics)
            is_due = last or (training.checkpoint_interval and step % training.checkpoint_interval == 0)
            if is_due or self.must_stop:
                self._save(step)
            if self.must_stop and not last:
                if self.is_first_rank:
                    write_end(plan.run_dir, step)
                raise Preempted(
                    f"asked to end: saved after step {step} of {plan.steps}; the same command goes on from there"
                )

    def _step(self, step: int, batches: Iterator[Batch]) -> dict[str, Any]:
        engine, plan = self.engine, self.plan
        # A pure function of the step, so that a resumed run draws the same dropout.
        torch.manual_seed(derive_seed(plan.training.seed, "step", step, process_rank()))
        traffic, self.data_wait = engine.traffic, 0.0
        before = traffic.reduced, traffic.gathered
        started = time.perf_counter()
        learning_rates, num_skipped = _learning_rates(engine), engine.counters()["skipped_steps"]
        # The loss, the number of ranks that were asked to end, and of those that miss the run folder.
        sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
        self.doing = f"step {step}"
        if self.coreset is not None:
            with self._phase("choice"):
                batches = iter(list(self.coreset.micro_batches(step)))
            self.history["tokens"] += self.coreset.tokens
        lengths = plan.lengths
        sums[0] = engine.train_step((lengths.cut(batch, step - 1) for batch in batches), self._phase)
        sent = {
            "reduced": round(traffic.reduced - before[0]),
            "gathered": round(traffic.gathered - before[1]),
        }
        sums[1] = self.stop.received is not None
        sums[2] = self.lock is not None and not self.lock.is_there()
        dist.all_reduce(sums)
        loss_sum, num_asked, num_missing = sums.tolist()
        if num_missing:
            raise self._folder_is_gone().shared()
        self.must_stop = num_asked > 0
        mean = loss_sum / (plan.batches.accumulation_steps * world_size())
        moved, stalled = self.offload_meter.step()
        seconds = {**self.timer.collect(), "data_wait": self.data_wait, **stalled}
        seconds["step"] = time.perf_counter() - started
        tokens = self.tokens_per_step if self.coreset is None else self.coreset.tokens
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
            **({"sequence_length": lengths.at(step - 1)} if lengths.phases else {}),
            "tokens": step * self.tokens_per_step if self.coreset is None else self.history["tokens"],
            "tokens_per_second": tokens / seconds["step"],
            **({"mfu": mfu} if (mfu := self._mfu(tokens / seconds["step"])) is not None else {}),
            # Linux counts the two apart, by batches of pages.
            "memory": {"now": (now := memory_now()), "peak": max(now, peak_memory())},
            "time": time.time(),
            "bytes": {**sent, **moved},
            "seconds": seconds,
            **({"coreset": self.coreset.kept} if self.coreset is not None else {}),
            **engine.step_metrics(),
        }

    def _mfu(self, tokens_per_second: float) -> float | None:
        return self.utilization.of(tokens_per_second) if self.utilization is not None else None

    def _record(self, metrics: MetricsLog, step: int, values: dict[str, Any]) -> None:
        try:
            metrics.write(step, values)
        except (OSError, UserError):
            if self.lock is not None and self.lock.is_gone_within(_SECONDS_OF_DELETION):
                raise self._folder_is_gone() from None
            raise

    def _folder_is_gone(self) -> UserError:
        return UserError(f"logging.run_dir: {self.plan.run_dir} was deleted or replaced while the run was going on")

    def _read_ahead(self, first_step: int) -> Iterator[Batch]:
        plan, ranks = self.plan, self.engine.data_parallel
        sampler = RankSampler(
            partial(plan.train_data.order, seed=plan.training.seed),
            first_step=first_step,
            last_step=plan.steps,
            micro_batch_size=plan.batches.micro,
            accumulation_steps=plan.batches.accumulation_steps,
            rank=ranks.rank,
            world_size=ranks.size,
        )
        return self._watch(training_loader(plan.train_data, sampler, plan.data.num_workers))

    def _watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with the time that the step waits for them."""
        batches = iter(batches)
        while True:
            self.watchdog.beat(f"{self.doing}, waiting for data")
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            except DataError as error:
                # Of a worker process: the loader puts its whole traceback before it.
                raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error
            self.data_wait += time.perf_counter() - asked
            yield batch

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.watchdog.beat(f"{self.doing}, {name}")
        with self.timer.phase(name), named(_TRACED.get(name, name)):
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
            self._record(metrics, step, {"eval_loss": loss, "time": time.time()})
        if not math.isfinite(loss) and self.is_first_rank:
            logger.warning(f"step {step}: the validation loss is {loss}; metrics and summary have null")
        if view is not None:
            view.say(f"step {step}: validation loss {loss:.4f}")
        return loss

    def _save(self, step: int) -> None:
        folder = self.plan.run_dir / CHECKPOINTS
        self.watchdog.beat(f"saving after step {step}")
        state = {
            "step": step,
            "data_fingerprint": self.plan.prepared.fingerprint,
            "history": self.history,
            "model": model_block(self.engine),
            **({"adapters": self.adapters} if self.adapters is not None else {}),
            **(
                {"quantization": quantized}
                if (quantized := quantization_record(self.engine.module, self.plan.config))
                else {}
            ),
            **({"coreset": self.coreset.state()} if self.coreset is not None else {}),
            **({"trust_region": self.trust_region.state()} if self.trust_region is not None else {}),
        }
        save_checkpoint(self.engine, folder / f"step-{step}", state)
        if self.is_first_rank:
            self.retention.saved(step)

    def _finish(self) -> None:
        plan, engine = self.plan, self.engine
        training = plan.training
        self.watchdog.beat("the end of the run")
        memory = max_over_ranks(peak_memory(), engine.device)
        tensors = max_over_ranks(tensor_memory(self.heap), engine.device)
        before = max_over_ranks(self.resident_before_model or 0, engine.device)
        summary: dict[str, Any] = {}
        if self.is_first_rank:
            # Before the sample, whose failure shall not cost it.
            summary = finite(self._summarize(int(memory), int(tensors), int(before)))
            write_json(plan.run_dir / SUMMARY, summary)
        if training.sample_prompt is not None:
            sample = try_sample(
                engine, plan.prepared.tokenizer, training.sample_prompt, training.sample_tokens, training.seed
            )
            if self.is_first_rank:
                summary["sample"] = sample
                write_json(plan.run_dir / SUMMARY, summary)
        if self.is_first_rank:
            print_summary(summary, str(plan.run_dir), self.console)
        dist.barrier()

    def _summarize(self, memory: int, tensors: int, before: int) -> dict[str, Any]:
        """The figures of the whole run, also of parts that other processes trained.

        Args:
            memory: see :func:`~narrowgauge.engine.report.summary.peak_memory`.
            tensors: the most in tensors; 0 where that is not known.
            before: what of ``memory`` the process had before the model; 0 where ``memory`` is of a GPU.
        """
        plan, engine = self.plan, self.engine
        # The first steps build what later ones reuse.
        records = step_records(plan.run_dir)
        if not records:
            raise UserError(f"{plan.run_dir}/{METRICS}: expected a training step to make a summary of, got none")
        measured = records[2:] or records
        try:
            median = {
                phase: statistics.median(record["seconds"][phase] for record in measured)
                for phase in ("step", "forward", "backward", "optimizer", "data_wait")
            }
            reduced, gathered = (
                statistics.fmean(record["bytes"][kind] for record in records) for kind in ("reduced", "gathered")
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{plan.run_dir}/{METRICS}: a step's record is damaged: {error!r}") from error
        state, state_dense = optimizer_state_bytes(engine)
        offloaded = summarize_offload(records, engine.activation_offload)
        return {
            "schema_version": SCHEMA_VERSION,
            "config_sha256": digest(plan.config.raw),
            "world_size": world_size(),
            "zero_stage": engine.zero_stage,
            "steps": plan.steps,
            "tokens": plan.steps * self.tokens_per_step,
            **({"data": counts} if (counts := plan.prepared.counts()) else {}),
            **({"rates": applied} if (applied := plan.rates.applied) else {}),
            **({"quantization": quantized} if (quantized := quantization_record(engine.module, plan.config)) else {}),
            **({"sampled_backward": sampled} if (sampled := sampling_record(engine.module, plan.config)) else {}),
            "tokens_per_second": self.tokens_per_step / median["step"],
            **(self.utilization.summary(records) if self.utilization is not None else {}),
            **self.history,
            "parameters": engine.parameter_counts(),
            **({"matrices": engine.own_optimizer.coverage.summary()} if engine.own_optimizer is not None else {}),
            "bytes": {
                **traffic_bytes(engine, reduced=reduced, gathered=gathered),
                "optimizer_state": state,
                "optimizer_state_dense": state_dense,
                "peak_memory": memory,
                **({RESIDENT: before} if before else {}),
                **offloaded.pop("bytes"),
            },
            "seconds": {"step_median": median.pop("step"), **median, **offloaded.pop("seconds")},
            **offloaded,
            "forecast": self.foretold.beside(
                {
                    "peak_tensor_memory": tensors or None,
                    "reduced_per_step": reduced,
                    "gathered_per_step": gathered,
                    "activations_per_step": engine.traffic.activations,
                }
            ),
            "sample": None,
        }


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _learning_rates(engine: TrainingEngine) -> dict[str, float]:
    """The rate of dense parameters as ``lr``, and of the matrices, compact or whole, as ``lr_matrix``."""
    groups = engine.optimizer.param_groups
    rates = {group.get("kind", "dense"): float(group["lr"]) for group in reversed(groups)}
    found = {"lr": rates.get("dense", next(iter(rates.values())))}
    matrix = rates.get("compact", rates.get("matrix"))
    return {**found, "lr_matrix": matrix} if matrix is not None else found
