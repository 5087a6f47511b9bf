"""GPUs, their driver and NCCL."""

import shutil
import subprocess
from collections import Counter
from importlib.metadata import version

import torch.cuda.nccl
import torch.distributed

from .finding import Finding, first_line, gibibytes
from .packages import pip

_PATIENCE = 60.0
_GET_TORCH = "install the build of torch for this driver and GPU: https://pytorch.org/get-started/locally"


def check_gpus() -> list[Finding]:
    """The GPUs that torch sees, compared with those that the driver lists."""
    listed, driver, problem = _ask_driver()
    if problem is not None:
        cure = "where this machine has GPUs: sudo modprobe nvidia, or reboot after an update of the driver"
        return [Finding("warning", "GPUs", f"nvidia-smi: {problem}", cure)]
    if not torch.backends.cuda.is_built():
        if not listed:
            return [Finding("ok", "GPUs", "none, ranks run on the CPU")]
        release = version("torch").partition("+")[0]
        cure = pip("install", "--force-reinstall", "--index-url", "https://pypi.org/simple", f"torch=={release}")
        return [Finding("error", "GPUs", f"{_kinds(listed)}, but torch {version('torch')} is built for the CPU", cure)]
    count = torch.cuda.device_count()
    if count == 0 and listed:
        return [Finding("error", "GPUs", f"{_kinds(listed)}, but torch sees none: {_why_none()}", _GET_TORCH)]
    if count == 0:
        return [Finding("ok", "GPUs", "none, ranks run on the CPU")]
    hidden = f"; the driver lists {len(listed)}" if len(listed) > count else ""
    found = [Finding("ok", "GPUs", _kinds([_describe(number) for number in range(count)]) + hidden)]
    found += [finding for number in range(count) if (finding := _try(number)) is not None]
    platform = f"CUDA {torch.version.cuda}" if torch.version.cuda is not None else f"ROCm {torch.version.hip}"
    found.append(Finding("ok", "driver", f"{driver or 'unknown'}, torch is built for {platform}"))
    if torch.distributed.is_nccl_available():
        numbers = torch.cuda.nccl.version()
        return [*found, Finding("ok", "NCCL", ".".join(map(str, numbers)))]
    return [*found, Finding("error", "NCCL", "this torch has none, which several GPUs need", _GET_TORCH)]


def _ask_driver() -> tuple[list[str], str | None, str | None]:
    """The names of the GPUs, the driver's version, and what went wrong; nothing where there is no nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], None, None
    query = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=_PATIENCE, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], None, first_line(error)
    if result.returncode != 0:
        return [], None, first_line(result.stdout + result.stderr)
    rows = [line.split(", ", 1) for line in result.stdout.splitlines() if ", " in line]
    return [name for _, name in rows], rows[0][0] if rows else None, None


def _kinds(names: list[str]) -> str:
    return ", ".join(f"{number} x {name}" for name, number in Counter(names).items())


def _describe(number: int) -> str:
    properties = torch.cuda.get_device_properties(number)
    return f"{properties.name} ({gibibytes(properties.total_memory)})"


def _why_none() -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return first_line(error)
    return "they are hidden (CUDA_VISIBLE_DEVICES)"


def _try(number: int) -> Finding | None:
    """Run a kernel: torch also sees GPUs for which it has none."""
    try:
        assert torch.ones(8, device=f"cuda:{number}").sum().item() == 8
    except Exception as error:
        return Finding("error", f"GPU {number}", first_line(error), _GET_TORCH)
    return None
