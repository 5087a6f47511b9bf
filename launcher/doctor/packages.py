"""The packages that a run needs or can use: their versions, and whether they can be imported."""

import platform
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from narrowgauge.engine.backends.megatron.installed import (
    fused_by,
    has_transformer_engine,
    not_usable_because,
    other_apex,
)

from .finding import Finding, first_line

# Shown also where they are as they should be.
_SHOWN = ("torch", "deepspeed", "transformers")


def check_versions() -> list[Finding]:
    """Python and the packages against the ranges in this package's metadata."""
    try:
        own: Distribution = distribution("narrowgauge")
    except PackageNotFoundError:
        cure = f"in the source folder: {pip('install', '--editable', '.')}"
        return [Finding("error", "narrowgauge", "runs, but is not installed", cure)]
    found = [Finding("ok", "narrowgauge", own.version)]
    needed = own.metadata["Requires-Python"]
    running = platform.python_version()
    if SpecifierSet(needed).contains(running, prereleases=True):
        found.append(Finding("ok", "Python", f"{running}, {needed} needed"))
    else:
        found.append(Finding("error", "Python", f"{running}, {needed} needed", "make the environment with another one"))
    for requirement in map(Requirement, own.requires or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            finding = _requirement(requirement.name, requirement.specifier)
            found += [finding] if finding.status != "ok" or requirement.name in _SHOWN else []
    return found


def _requirement(name: str, allowed: SpecifierSet) -> Finding:
    cure = pip("install", f"{name}{allowed}")
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Finding("error", name, f"not installed, {allowed} needed", cure)
    # NVIDIA's images have builds between two releases.
    if allowed.contains(installed, prereleases=True):
        return Finding("ok", name, f"{installed}, {allowed} needed")
    return Finding("error", name, f"{installed}, {allowed} needed", cure)


def check_imports() -> list[Finding]:
    """Errors of the packages that cannot be imported."""
    found = []
    for name in _SHOWN:
        problem = _import_problem(name)
        if problem is not None:
            cure = pip("install", "--force-reinstall", "--no-deps", _pinned(name))
            found.append(Finding("error", name, f"cannot be imported: {problem}", cure))
    return found


def _pinned(name: str) -> str:
    try:
        return f"{name}=={version(name)}"
    except PackageNotFoundError:
        return name


def check_transformer_engine() -> list[Finding]:
    """Transformer Engine: not needed, but it should work where it is."""
    subject = "Transformer Engine"
    if find_spec("transformer_engine") is None:
        return [Finding("ok", subject, "not installed, not needed")]
    problem = _import_problem("transformer_engine.pytorch")
    if problem is None:
        return [Finding("ok", subject, _pinned("transformer_engine").rpartition("=")[2])]
    cure = pip("install", "--no-build-isolation", "--force-reinstall", "--no-deps", "transformer_engine[pytorch]")
    return [Finding("warning", subject, f"cannot be imported: {problem}", cure)]


def check_apex() -> list[Finding]:
    """NVIDIA's apex: not needed; PyPI's package of that name is something else, and is taken for it."""
    spec = find_spec("apex")
    if spec is None:
        return [Finding("ok", "apex", "not installed, not needed")]
    place = other_apex()
    if place is not None:
        return [Finding("warning", "apex", f"{place} is not NVIDIA's apex", _removal(place))]
    problem = _import_problem("apex.multi_tensor_apply")
    if problem is None:
        used = "NVIDIA's" if find_spec("amp_C") is not None else "NVIDIA's, without its extensions (amp_C): not used"
        return [Finding("ok", "apex", used)]
    return [
        Finding(
            "warning",
            "apex",
            f"cannot be imported: {problem}",
            _removal(Path(next(iter(spec.submodule_search_locations or ["apex"])))),
        )
    ]


def check_fused() -> list[Finding]:
    """Whose kernels the ``megatron`` engine uses beside PyTorch's; nothing where it is not installed."""
    if not_usable_because() is not None:
        return []
    kernels = fused_by()
    if kernels is None:
        return [Finding("ok", "megatron", "PyTorch's kernels alone")]
    layers = ", norms and attention" if has_transformer_engine() else ""
    return [Finding("ok", "megatron", f"norms of gradients, and AdamW{layers} on GPUs, by {kernels}")]


def _removal(place: Path) -> str:
    try:
        installed = Path(str(distribution("apex").locate_file("apex")))
    except PackageNotFoundError:
        installed = None
    return pip("uninstall", "apex") if installed == place else f"rm -r {shlex.quote(str(place))}"


def _import_problem(name: str) -> str | None:
    try:
        import_module(name)
    except Exception as error:
        # Whatever a package that is half installed raises.
        return first_line(error)
    return None


def pip(*words: str) -> str:
    """A command line of this environment's pip."""
    return shlex.join([sys.executable, "-m", "pip", *words])


def install_packages(*names: str) -> str:
    """A command line that installs packages of the system."""
    tools: Sequence[tuple[str, str]] = (("apt-get", "apt-get install"), ("dnf", "dnf install"), ("yum", "yum install"))
    command = next((words for tool, words in tools if shutil.which(tool) is not None), "apt-get install")
    return f"sudo {command} {' '.join(names)}"
