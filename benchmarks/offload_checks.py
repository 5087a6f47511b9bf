"""The parts of `benchmarks.offload` that are not about time: memory of the process, the disk, leaks."""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.compare import quartiles
from benchmarks.offload_cases import KEEP, Case, build, make_case, make_tokens
from narrowgauge.offload import ActivationOffload
from narrowgauge.offload.backends import make_backend
from narrowgauge.offload.backends.aio import is_built
from narrowgauge.offload.backends.probe import measure

_MIB, _GB = 1 << 20, 1e9
# Freed memory goes back to the kernel at once: one arena, and pages of their own for all but small allocations.
_RSS_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident_set() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def compare_rss(arguments: argparse.Namespace) -> None:
    """Each case in a fresh process."""
    settings = " ".join(f"{name}={value}" for name, value in _RSS_ENVIRONMENT.items())
    table = Table(title=f"growth of the process, peak of 3 steps; {settings}", title_justify="left")
    for column in ("", "above weights and gradients", "against keep all", "saved bytes of that"):
        table.add_column(column, justify="left" if not column else "right")
    base = 0
    for name in [KEEP, *(name for name in arguments.cases if name != KEEP)]:
        command = [sys.executable, "-m", "benchmarks.offload", "--rss-case", name, *arguments.given]
        done = subprocess.run(  # noqa: S603
            command, env=os.environ | _RSS_ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True
        )
        growth, resident = map(int, done.stdout.split()[-2:])
        base = base or growth
        table.add_row(
            name, f"{growth / _MIB:.0f} MiB", f"{100 * (growth / base - 1):+.0f} %", f"{resident / _MIB:.0f} MiB"
        )
    Console(width=130).print(table)


def one_rss(arguments: argparse.Namespace) -> None:
    """Print by how many bytes this process grows in the steps of one case, and how many of them saved tensors take."""
    name = arguments.rss_case
    tokens = make_tokens(arguments, arguments.batch)
    case = make_case(name, arguments, build(arguments), tokens, arguments.capacity_mib << 20)
    # What libraries allocate once.
    case.model(input_ids=tokens[:1, :16], labels=tokens[:1, :16]).loss.backward()
    before = highest = resident_set()
    stop = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not stop.wait(0.002):
            highest = max(highest, resident_set())

    sampler = threading.Thread(target=sample, daemon=True)
    # The plan is made in the first steps.
    for _ in range(6 if "adaptive" in name else 1):
        case.step()
    sampler.start()
    for _ in range(3):
        case.step()
    stop.set()
    sampler.join()
    case.count(arguments.path)
    print(highest - before, int(max(case.seen["resident"][-3:])))
    case.close()


def compare_io(arguments: argparse.Namespace) -> None:
    """The chosen backend as :class:`ActivationOffload` drives it, against one aio handle in a loop."""
    backend, _ = make_backend(arguments.backend, arguments.path, torch.device(arguments.device))
    lanes = {"lanes": arguments.lanes} if arguments.lanes is not None else {}
    total = 256 * _MIB
    names = [backend.name]
    raw = _raw_aio(arguments.path, total) if is_built() else None
    if raw is None:
        print("DeepSpeed's aio is not built (narrowgauge build --aio): nothing to compare with")
    else:
        names.append("raw aio")
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        for name in names if number % 2 else names[::-1]:
            if name == "raw aio":
                assert raw is not None
                speeds[name].append(raw())
            else:
                speed = measure(backend, arguments.path, total_bytes=total, **lanes)
                speeds[name].append((speed.write, speed.read))
    table = Table(title=f"{total // _MIB} MiB written, then read, {arguments.rounds} rounds", title_justify="left")
    for column in ("", "write", "read", "write / raw aio", "read / raw aio"):
        table.add_column(column, justify="left" if not column else "right")
    for name, measured in speeds.items():
        cells = [f"{statistics.median(row[way] for row in measured) / _GB:.2f} GB/s" for way in range(2)]
        if raw is not None:
            for way in range(2):
                pairs = zip(measured, speeds["raw aio"], strict=True)
                low, middle, high = quartiles([mine[way] / theirs[way] for mine, theirs in pairs])
                cells.append(f"{middle:.2f}x ({low:.2f}-{high:.2f})")
        table.add_row(name, *cells)
    Console(width=110).print(table)


def _raw_aio(folder: Path, total: int) -> Callable[[], tuple[float, float]]:
    """Writes, then reads, a preallocated file with one handle and one page-locked tensor; bytes per second of both."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    module: Any = accelerator.create_op_builder("AsyncIOBuilder").load(verbose=False)
    handle: Any = module.aio_handle(
        block_size=_MIB, queue_depth=32, single_submit=False, overlap_events=True, intra_op_parallelism=1
    )
    buffer = handle.new_cpu_locked_tensor(32 * _MIB, torch.empty(0, dtype=torch.uint8)).random_()

    def once() -> tuple[float, float]:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".narrowgauge-") as file:
            os.posix_fallocate(file.fileno(), 0, total)
            speeds = []
            # The first pass gives the file its blocks.
            for move in (handle.pwrite, handle.pwrite, handle.pread):
                started = time.perf_counter()
                for offset in range(0, total, buffer.nbytes):
                    if move(buffer, file.name, False, False, offset) != 1:
                        raise OSError("DeepSpeed's aio failed")
                speeds.append(total / (time.perf_counter() - started))
        return speeds[1], speeds[2]

    return once


def compare_budget(arguments: argparse.Namespace) -> None:
    """Whether twice the batch fits where one batch did."""
    model = build(arguments)
    rows = []
    for name, batch in ((KEEP, arguments.batch), ("offload everything", 2 * arguments.batch)):
        case = make_case(name, arguments, model, make_tokens(arguments, batch), arguments.capacity_mib << 20)
        for _ in range(2):
            case.step()
        case.count(arguments.path)
        rows.append((name, batch, max(case.seen["resident"]), max(case.seen["saved"])))
        case.close()
    for name, batch, resident, saved in rows:
        print(f"{name}, batch {batch}: {saved / _MIB:.0f} MiB saved, {resident / _MIB:.0f} MiB in memory at the peak")
    fits = rows[1][2] <= rows[0][2]
    print(f"twice the batch {'fits' if fits else 'does not fit'}: {rows[1][2] / rows[0][2]:.2f} of the memory")


def look_for_leaks(arguments: argparse.Namespace) -> None:
    """What many steps leave behind: in memory, on disk, threads and descriptors."""
    with tempfile.TemporaryDirectory(prefix="narrowgauge-", dir=arguments.path) as folder:
        _look_for_leaks(arguments, Path(folder))


def _look_for_leaks(arguments: argparse.Namespace, folder: Path) -> None:
    small = argparse.Namespace(**{**vars(arguments), "hidden": 512, "layers": 2, "sequence": 64, "batch": 2})
    model, tokens = build(small), make_tokens(small, 2)

    def counts() -> dict[str, int]:
        gc.collect()
        files = len(list(folder.iterdir()))
        descriptors = len(os.listdir("/proc/self/fd"))
        return {"files": files, "threads": len(os.listdir("/proc/self/task")), "descriptors": descriptors}

    # What libraries keep once used is no leak.
    ActivationOffload(folder, capacity_bytes=64 << 20).close()
    make_case(KEEP, small, model, tokens, 0).step()
    before = counts()
    offload = ActivationOffload(folder, model=model, keep_resident=0.0, min_tensor_bytes=4096, capacity_bytes=64 << 20)
    case = Case("leaks", model, tokens, lambda: offload, offload)
    table = Table(title=f"{arguments.leaks} steps of a small model", title_justify="left")
    columns = ("saved", "in memory", "written", "process", "files", "threads", "descriptors")
    for column in ("", *columns):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("before", "", "", "", f"{resident_set() / _MIB:.0f} MiB", *map(str, before.values()))
    marks = sorted({min(10, arguments.leaks), arguments.leaks // 2, arguments.leaks} - {0})
    for number in range(1, arguments.leaks + 1):
        case.step()
        if number in marks:
            stats = offload.stats()
            memory = (f"{stats.saved:,}", f"{stats.resident:,}", f"{stats.written / _MIB:.0f} MiB")
            process = f"{resident_set() / _MIB:.0f} MiB"
            table.add_row(f"after {number}", *memory, process, *map(str, counts().values()))
    case.close()
    after = counts()
    table.add_row("closed", "", "", "", f"{resident_set() / _MIB:.0f} MiB", *map(str, after.values()))
    Console(width=120).print(table)
    stats = offload.stats()
    left = [f"{name}: {before[name]} before, {after[name]} after" for name in before if after[name] > before[name]]
    left += [
        f"{name}: {value:,} bytes" for name, value in (("saved", stats.saved), ("in memory", stats.resident)) if value
    ]
    print("left behind: " + "; ".join(left) if left else "nothing is left behind")
