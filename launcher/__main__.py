"""``python -m narrowgauge.launcher``: what ``torchrun`` and ``deepspeed`` start on each process rank."""

from .main import main

if __name__ == "__main__":
    main()
