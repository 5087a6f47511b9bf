"""torchrun, with an exit code that says why the ranks ended; its arguments are torchrun's.

torchrun itself ends with 1 whatever its ranks' codes were, and with a traceback where it was asked to end.
"""

import os
import signal
import sys
from typing import Any

from narrowgauge.engine.preemption import EXIT_PREEMPTED
from narrowgauge.engine.watchdog import EXIT_HUNG
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

_BAD_INPUT = 2
_TELLING = (_BAD_INPUT, EXIT_PREEMPTED, EXIT_HUNG)


def main() -> int:
    """Run torchrun; returns 2, 75 or 76 where the first rank that failed ended so, 75 where a signal came, else 1."""
    signal.signal(signal.SIGUSR1, _as_sigterm)
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode in _TELLING else 1
    except SignalException as asked:
        return EXIT_PREEMPTED if asked.sigval != signal.SIGINT else 128 + signal.SIGINT
    return 0


def _as_sigterm(number: int, frame: Any) -> None:
    """Pass SIGUSR1 on as the signal that every version of torchrun hands to its ranks; once is enough."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
