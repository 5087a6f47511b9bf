"""Every test and benchmark that needs a GPU, stage by stage; run it again to continue.

python -m benchmarks.gpu                        all stages; the figures go to docs/gpu.json and docs/gpu.md
python -m benchmarks.gpu --budget 500           only stages that are sure to end within so many seconds
python -m benchmarks.gpu --stage layers memory  these stages
python -m benchmarks.gpu layers                 one stage in this process: its figures are printed, not kept
python -m benchmarks.gpu --device cpu --small   try the stages where there is no GPU; the figures mean nothing
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.runner import Journal, run_stages
from benchmarks.gpu.stages import ROOT, STAGES

_DOCS = ROOT / "docs"
# Asked of a process of its own, as a stage is: whoever looks for a GPU takes some of its memory.
_MACHINE = "machine"


def describe_machine() -> dict[str, Any]:
    """What the figures depend on besides the code; ``device`` and ``driver`` are None where there is no GPU."""
    import torch

    found = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if found else None,
        "driver": _driver() if found else None,
        "torch": torch.__version__,
    }


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603
    return (done.stdout.split() or ["unknown"])[0]


def _commit() -> str:
    """The checkout's, with a ``+`` where other files than this command's own differ from it."""
    git = shutil.which("git")
    if git is None:
        return "unknown"

    def ask(*words: str) -> str:
        done = subprocess.run([git, "-C", ROOT, *words], capture_output=True, text=True, check=False)  # noqa: S603
        return done.stdout.strip()

    commit = ask("rev-parse", "--short=12", "HEAD")
    changed = ask("status", "--porcelain", "--", ".", ":!docs/gpu.json", ":!docs/gpu.md")
    return (commit or "unknown") + ("+" if changed else "")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("here", nargs="*", metavar="STAGE", help="run these in this process and print their figures")
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="STAGE")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin only what ends within this time")
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--folder", type=Path, help="for gpu.json and gpu.md; default docs/, with --small runs/gpu/")
    parser.add_argument("--commit", help="of the code, where the checkout has no git folder")
    arguments = parser.parse_args()
    unknown = sorted({*arguments.here} - {*STAGES, _MACHINE})
    if unknown:
        parser.error(f"STAGE: expected some of {', '.join(STAGES)}, got {', '.join(unknown)}")
    if arguments.device == "cpu" and not arguments.small:
        parser.error("--device cpu: expected --small with it")
    arguments.folder = arguments.folder or (ROOT / "runs" / "gpu" if arguments.small else _DOCS)
    if arguments.small and arguments.folder.resolve() == _DOCS:
        parser.error("--folder: docs/ is for figures of a GPU at full size; expected another folder")
    return arguments


def _run_here(names: list[str], *, small: bool) -> None:
    # Figures alone go to the standard output; whatever else is printed goes to the other one.
    with os.fdopen(os.dup(1), "w") as figures:
        os.dup2(2, 1)

        def emit(**values: Any) -> None:
            print(json.dumps(values), file=figures, flush=True)

        for name in names:
            if name == _MACHINE:
                emit(**describe_machine())
            else:
                STAGES[name].run(emit, small=small)


def main() -> None:
    arguments = _arguments()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if arguments.here:
        _run_here(arguments.here, small=arguments.small)
        return
    if find_spec("torch") is None:
        print("python -m benchmarks.gpu: PyTorch is not installed", file=sys.stderr)
        sys.exit(2)
    options = ["--device", arguments.device, *(["--small"] if arguments.small else [])]

    def command(name: str) -> list[str]:
        return [sys.executable, "-m", "benchmarks.gpu", name, *options]

    looked = subprocess.run(command(_MACHINE), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    machine = json.loads(looked.stdout)
    if machine["device"] is None and arguments.device == "cuda":
        print(
            "python -m benchmarks.gpu: PyTorch finds no CUDA device here (--device cpu --small tries the stages without"
            " one)",
            file=sys.stderr,
        )
        sys.exit(2)
    print(f"{machine['device']}, driver {machine['driver']}, PyTorch {machine['torch']}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    complete = run_stages(
        [STAGES[name] for name in arguments.stage],
        journal=Journal(folder=arguments.folder),
        machine=machine,
        commit=arguments.commit or _commit(),
        command=lambda stage: command(stage.name),
        budget=arguments.budget,
        again=arguments.again,
    )
    print(f"{arguments.folder / 'gpu.json'}, {arguments.folder / 'gpu.md'}")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
