"""``init``: a first configuration from a few questions or flags."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from narrowgauge.engine.errors import UserError, did_you_mean

from ..configurations import packaged_models
from ..output import make_console, show_libraries_less

AnswerT = TypeVar("AnswerT", int, str)


def init(
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("config.json"),
    model: Annotated[str | None, typer.Option(help="A preset, such as llama-1b, or a Hugging Face folder.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text or token files, or globs; may be given several times. Or stdlib.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A folder; default trained on the data.")] = None,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Of the run.")] = 1000,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of each.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Their name, as of plan.")] = None,
) -> None:
    """Write a configuration that fits a machine. What no option says is asked for."""
    from narrowgauge.engine.files import check_new
    from narrowgauge.engine.forecast.hardware import GPUS, gpu_named
    from narrowgauge.engine.forecast.machine import Machine

    # Before anyone answers questions.
    check_new(out, "--out")
    model = _answer("--model", model, f"Model: {', '.join(packaged_models())}, or a folder", "llama-1b")
    _check_model(model)
    files = data or [_answer("--data", None, "Data: files, or stdlib", "stdlib")]
    _check_data(files)
    if tokenizer == "":
        raise UserError("--tokenizer: expected a folder, got ''")
    gpus = _answer("--gpus", gpus, "GPUs of each machine", 8)
    kind = gpu_named(_answer("--gpu", gpu, f"GPU: {', '.join(GPUS)}", "h100-80"))
    show_libraries_less()
    from narrowgauge.engine.run.initial import Answers, write_first

    answers = Answers(model=model, data=files, tokenizer=tokenizer, sequence_length=sequence_length, steps=steps)
    write_first(answers, Machine(nodes=nodes, gpus=gpus, gpu=kind), out, make_console())


def _check_model(model: str) -> None:
    """
    Raises:
        UserError: it is no folder and no preset.
    """
    names = packaged_models()
    if model not in names and (not model or not Path(model).is_dir()):
        raise UserError(
            f"--model: expected a Hugging Face folder or one of {', '.join(names)}, got {model!r}"
            f"{did_you_mean(model, names)}"
        )


def _check_data(files: Sequence[str]) -> None:
    """
    Raises:
        UserError: one has no name, or stdlib has others beside it.
    """
    if "" in files:
        raise UserError("--data: expected files, globs or stdlib, got ''")
    if "stdlib" in files and len(files) > 1:
        raise UserError(f"--data: expected stdlib alone or files, got {', '.join(files)}")


def _answer(option: str, given: AnswerT | None, question: str, default: AnswerT) -> AnswerT:
    """What was given, or what is answered on a terminal.

    Raises:
        UserError: nothing was given, and there is no terminal.
    """
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise UserError(f"{option}: expected it, or a terminal to ask on, got neither")
    while True:
        found: AnswerT = typer.prompt(question, default=default, type=type(default))
        if not isinstance(found, int) or found >= 1:
            return found
        typer.echo(f"expected at least 1, got {found}")
