"""Exit codes of ``narrowgauge`` and of its process ranks; the batch scripts in ``slurm/`` know the same numbers."""

EXIT_BAD_INPUT = 2
"""Bad input: another try would meet it again."""

EXIT_PREEMPTED = 75
"""The run was asked to end and has saved: EX_TEMPFAIL of sysexits.h, try again later."""

EXIT_HUNG = 76
"""The watchdog of a process rank has ended it."""

EXIT_NOTHING_SAVED = 77
"""Of ``launch`` in a SLURM job: it was asked to end before its ranks had saved anything, and would be again."""
