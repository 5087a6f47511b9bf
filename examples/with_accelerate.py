"""A loop of your own with Accelerate: Grass alone, on several process ranks, or under DeepSpeed ZeRO.

python examples/with_accelerate.py
torchrun --nproc_per_node 8 examples/with_accelerate.py --stage 3
"""

import argparse

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from transformers import LlamaConfig, LlamaForCausalLM

from narrowgauge.integrations.accelerate import cpu_ranks, prepare_accelerator
from narrowgauge.optimizers import Grass

parser = argparse.ArgumentParser()
parser.add_argument("--stage", type=int, help="of ZeRO; without it there is no DeepSpeed")
parser.add_argument("--save", default="runs/with_accelerate")
options = parser.parse_args()

plugin = None
if options.stage is not None:
    cpu_ranks()
    plugin = DeepSpeedPlugin(zero_stage=options.stage, gradient_clipping=1.0, zero3_save_16bit_model=True)
# Only for CPUs: where there is a GPU it is used all the same.
on_cpu = plugin is None and not torch.cuda.is_available()
accelerator = prepare_accelerator(Accelerator(cpu=on_cpu, deepspeed_plugin=plugin, gradient_accumulation_steps=2))

torch.manual_seed(0)
shape = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(shape)
optimizer = Grass(model, lr=1e-2, density=0.25, matrix_lr_scale=0.3, refresh_interval=10)
sequences = (torch.arange(24) + 37 * torch.arange(640)[:, None]).remainder(128)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(sequences), batch_size=8, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

losses = []
for (tokens,) in loader:
    with accelerator.accumulate(model):
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.item())
accelerator.save_state(options.save)
accelerator.wait_for_everyone()
accelerator.load_state(options.save)
accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
