"""Lightning: a strategy that trains by narrowgauge's engine where ``DeepSpeedStrategy`` trains by DeepSpeed's."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.optim import Optimizer

from .accelerate import narrowgauge_initializes


class NarrowgaugeStrategy(DeepSpeedStrategy):
    """``DeepSpeedStrategy``, whose configuration may name one of :mod:`narrowgauge.optimizers` and have an
    ``activation_offload`` block; ``configure_optimizers`` may also return an optimizer of ours made from the module.

    Takes the arguments of Lightning's ``DeepSpeedStrategy``. Works on CPUs too, for tests.
    """

    strategy_name = "narrowgauge"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        aio = (self.config or {}).get("aio", {})
        if "thread_count" in aio:
            # Lightning's word for it, which DeepSpeed (0.19) does not know.
            aio["intra_op_parallelism"] = aio.pop("thread_count")

    def setup_environment(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_environment()
        else:
            super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        if isinstance(self.accelerator, CUDAAccelerator):
            super().setup_distributed()
        else:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    def setup(self, trainer: Trainer) -> None:
        with narrowgauge_initializes({}):
            super().setup(trainer)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        module = self.lightning_module
        if module is not None and module.automatic_optimization:
            # Lightning has divided the loss by the number of micro-batches; DeepSpeed would once more.
            kwargs["scale_wrt_gas"] = False
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    @property
    def activation_offload(self) -> Any:
        """The engine's, if there is one."""
        return getattr(self.model, "activation_offload", None)
