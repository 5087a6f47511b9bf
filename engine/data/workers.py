"""Worker processes of a data loader that end when they are told to, though they ignore the signals that end a run."""

from multiprocessing import popen_fork
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any


class _Popen(popen_fork.Popen):
    def terminate(self) -> None:
        """SIGTERM is for the rank, and ignored: its exit waited for such a worker for ever."""
        self.kill()


class _Process(ForkProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> _Popen:
        return _Popen(process_obj)


class WorkerContext(ForkContext):
    """Forks, as workers share the mapped files; others would be sent their contents."""

    Process = _Process  # pyright: ignore[reportAssignmentType]
