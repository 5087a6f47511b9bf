"""What the command prints: its own messages and narrowgauge's log on the console, other libraries' chatter nowhere."""

import logging
import os
import sys
import threading
import warnings
from contextlib import suppress
from typing import TextIO

from rich.console import Console
from rich.text import Text

from narrowgauge.engine.config.redaction import redact_text

# DeepSpeed warns of what narrowgauge does on purpose.
_KNOWN = (
    "Setting accelerator to CPU",
    "**** You are using ZeRO with an untested optimizer",
)


def make_console() -> Console:
    """The console of standard output, which narrowgauge's log goes to from now on."""
    # A file or a pipe has no width of its own; 80 columns would break the table.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    log = logging.getLogger("narrowgauge")
    log.handlers = [_ConsoleHandler(console)]
    log.setLevel(logging.INFO)
    log.propagate = False
    return console


class _ConsoleHandler(logging.Handler):
    """Messages as plain lines, in the same console as a progress bar, which they must not break."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        word = [("warning:", "yellow"), " "] if record.levelno >= logging.WARNING else []
        self._console.print(Text.assemble(*word, record.getMessage()))


def show_libraries_less() -> None:
    """Keep other libraries' chatter out of the output; warnings about the user's model or data remain."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # transformers' bars too, of files that are read within a second.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # peft asks models of transformers by an old name.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.modeling_utils")
    # torch announces renamed collectives at every call of DeepSpeed's.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").addFilter(lambda record: not record.getMessage().startswith(_KNOWN))
    # At import, of a product that no run here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    threading.excepthook = _say_of_thread


def show_warnings_as_lines() -> None:
    """From now on without the place in the code, which helps no one who has not written it."""
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    # Whoever read it may be gone.
    with suppress(OSError):
        print(f"warning: {' '.join(redact_text(str(message)).split())}", file=file or sys.stderr, flush=True)


def _say_of_thread(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread raises what whoever writes to it next gets, too."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)
