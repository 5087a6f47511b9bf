"""Hugging Face's Trainer with Grass: one call, alone, on several process ranks, or with a DeepSpeed file.

python examples/with_trainer.py
torchrun --nproc_per_node 8 examples/with_trainer.py --deepspeed examples/trainer.json
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from narrowgauge.integrations.accelerate import cpu_ranks
from narrowgauge.integrations.transformers import prepare_trainer

parser = argparse.ArgumentParser()
parser.add_argument("--deepspeed", help="a DeepSpeed file; it names the optimizer")
parser.add_argument("--output_dir", default="runs/with_trainer")
parser.add_argument("--resume_from_checkpoint")
options = parser.parse_args()


class Counting(torch.utils.data.Dataset):
    """Sequences that count upwards, so that there is something to learn."""

    def __len__(self) -> int:
        return 640

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(24) + 37 * index).remainder(128)
        return {"input_ids": tokens, "labels": tokens}


args = TrainingArguments(
    options.output_dir,
    deepspeed=options.deepspeed,
    learning_rate=1e-2,
    weight_decay=0.01,
    per_device_train_batch_size=8,
    max_steps=30,
    lr_scheduler_type="cosine",
    warmup_steps=3,
    logging_steps=5,
    save_steps=20,
    eval_strategy="steps",
    eval_steps=30,
    report_to=[],
    disable_tqdm=True,
    # Only for CPUs, where Accelerate has to be told of several process ranks.
    use_cpu=not torch.cuda.is_available() and options.deepspeed is None,
    accelerator_config=cpu_ranks() if options.deepspeed else None,
)
torch.manual_seed(0)
shape = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
trainer = Trainer(
    model=LlamaForCausalLM(shape),
    args=args,
    train_dataset=Counting(),
    eval_dataset=torch.utils.data.Subset(Counting(), range(16)),
)
in_code = {"type": "Grass", "params": {"density": 0.25, "matrix_lr_scale": 0.3, "refresh_interval": 10}}
prepare_trainer(trainer, optimizer=None if options.deepspeed else in_code)
trainer.train(resume_from_checkpoint=options.resume_from_checkpoint)
trainer.save_model()
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, the model is in {args.output_dir}")
