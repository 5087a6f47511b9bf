"""TRL's SFTTrainer with Grass and activation offload, on prompts and completions.

python examples/with_sft_trainer.py
torchrun --nproc_per_node 8 examples/with_sft_trainer.py --deepspeed examples/trainer.json
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

from narrowgauge.integrations.accelerate import cpu_ranks
from narrowgauge.integrations.transformers import prepare_trainer

parser = argparse.ArgumentParser()
parser.add_argument("--deepspeed", help="a DeepSpeed file; it names the optimizer")
parser.add_argument("--output_dir", default="runs/with_sft_trainer")
options = parser.parse_args()

words = ["<pad>", "<eos>", "after", "comes", *map(str, range(50))]
splitter = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}))
splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
special = {"pad_token": "<pad>", "eos_token": "<eos>"}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, **special)
examples = [{"prompt": f"after {n} comes", "completion": f" {n + 1}"} for n in range(49)] * 16

args = SFTConfig(
    options.output_dir,
    deepspeed=options.deepspeed,
    learning_rate=1e-2,
    per_device_train_batch_size=16,
    max_steps=30,
    max_length=32,
    logging_steps=5,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    bf16=False,
    gradient_checkpointing=False,
    dataset_num_proc=None,
    # Only for CPUs, where Accelerate has to be told of several process ranks.
    use_cpu=not torch.cuda.is_available() and options.deepspeed is None,
    accelerator_config=cpu_ranks() if options.deepspeed else None,
)
torch.manual_seed(0)
shape = LlamaConfig(
    vocab_size=len(words),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=1,
)
trainer = SFTTrainer(
    model=LlamaForCausalLM(shape), args=args, train_dataset=Dataset.from_list(examples), processing_class=tokenizer
)
in_code = {"type": "Grass", "params": {"density": 0.25, "matrix_lr_scale": 0.3, "refresh_interval": 10}}
# TRL's loss at ZeRO-3 is the one that does not work with it; a DeepSpeed file may hold this block too.
offload = {"path": tempfile.gettempdir(), "keep_resident": 0.0, "min_tensor_bytes": 16384, "capacity_bytes": 1 << 28}
if options.deepspeed:
    prepare_trainer(trainer)
else:
    prepare_trainer(trainer, optimizer=in_code, activation_offload=offload)
trainer.train()
trainer.save_model()
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, the model is in {args.output_dir}")
