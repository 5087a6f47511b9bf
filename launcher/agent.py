"""torchrun, with an exit code that says why the ranks ended; its arguments are torchrun's.

torchrun itself ends with 1 whatever its ranks' codes were, and with a traceback where it was asked to end.
"""

import os
import signal
import sys
from typing import Any

from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser
from torch.distributed.run import main as torchrun

from narrowgauge.engine.ranks.exit_codes import EXIT_BAD_INPUT, EXIT_HUNG, EXIT_PREEMPTED

_TELLING = (EXIT_BAD_INPUT, EXIT_PREEMPTED, EXIT_HUNG)


def main() -> int:
    """Run torchrun; returns 2, 75 or 76 where the first rank that failed ended so, 75 where a signal came, else 1."""
    signal.signal(signal.SIGUSR1, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    # torchrun stops waiting for ranks that save when it is asked again, as schedulers do: they signal all processes.
    api._terminate_process_handler = _Once(api._terminate_process_handler)
    try:
        torchrun([*_without_hangup(), *sys.argv[1:]])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode in _TELLING else 1
    except SignalException as asked:
        return EXIT_PREEMPTED if asked.sigval != signal.SIGINT else 128 + signal.SIGINT
    return 0


def _without_hangup() -> list[str]:
    """Under ``nohup`` a closed terminal is not for this process; torchrun ends for it all the same."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    known = "--signals-to-handle" in get_args_parser().format_help()
    return ["--signals-to-handle=SIGTERM,SIGINT,SIGQUIT"] if ignored and known else []


class _Once:
    """A signal handler that is called for the first signal; SIGINT, typed by an impatient user, always counts."""

    def __init__(self, handler: Any) -> None:
        self._handler, self._called = handler, False

    def __call__(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT or not self._called:
            self._called = True
            self._handler(number, frame)


if __name__ == "__main__":
    sys.exit(main())
