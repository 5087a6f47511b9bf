"""Your own loop under DeepSpeed ZeRO, with accumulation, clipping and a checkpoint.

python examples/zero.py
torchrun --nproc_per_node 8 examples/zero.py
"""

import os
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from narrowgauge.engine import initialize

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "optimizer": {
        "type": "Grass",
        "params": {"lr": 5e-3, "matrix_lr_scale": 0.2, "density": 0.125, "refresh_interval": 4},
    },
}

torch.manual_seed(0)
shape = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4)
engine, optimizer, _, _ = initialize(model=LlamaForCausalLM(shape), config=CONFIG)
process_rank = int(os.environ.get("RANK", "0"))
data = torch.Generator().manual_seed(process_rank)
losses = []
for _ in range(10 * CONFIG["gradient_accumulation_steps"]):
    tokens = (torch.randint(256, (4, 1), generator=data) + torch.arange(32)).remainder(256).to(engine.device)
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    # Steps after every second micro-batch; folds and refreshes by itself.
    engine.step()
    losses.append(loss.item())

folder = sys.argv[1] if len(sys.argv) > 1 else "checkpoints"
engine.save_checkpoint(folder, client_state={"loss": losses[-1]})
_, client_state = engine.load_checkpoint(folder)
if process_rank == 0:
    print(f"loss {losses[0]:.3f} -> {client_state['loss']:.3f} after {engine.global_steps} steps")
assert client_state["loss"] < losses[0]
