"""Lightning with Grass under DeepSpeed ZeRO: the strategy is narrowgauge's, nothing else changes.

python examples/with_lightning.py
torchrun --nproc_per_node 8 examples/with_lightning.py --stage 3
"""

import argparse
import os

import lightning.pytorch as pl
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from narrowgauge.integrations.lightning import NarrowgaugeStrategy
from narrowgauge.optimizers import Grass

parser = argparse.ArgumentParser()
parser.add_argument("--stage", type=int, default=2, help="of ZeRO")
parser.add_argument("--save", default="runs/with_lightning.ckpt")
options = parser.parse_args()


class Counter(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
        self.model = LlamaForCausalLM(shape)
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        (tokens,) = batch
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Grass(self, lr=1e-2, density=0.25, matrix_lr_scale=0.3, refresh_interval=10)


sequences = (torch.arange(24) + 37 * torch.arange(640)[:, None]).remainder(128)
trainer = pl.Trainer(
    strategy=NarrowgaugeStrategy(stage=options.stage),
    devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    gradient_clip_val=1.0,
    max_steps=30,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
module = Counter()
trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(sequences), batch_size=8, shuffle=True))
trainer.save_checkpoint(options.save)
if trainer.is_global_zero:
    print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}, saved in {options.save}")
