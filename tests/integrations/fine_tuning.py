"""One small training, by each library and by a plain loop around ``initialize``; run in pools of ranks."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DummyOptim, DummyScheduler
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Subset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from narrowgauge.engine import initialize
from narrowgauge.engine.errors import ConfigError
from narrowgauge.integrations.accelerate import cpu_ranks, prepare_accelerator
from narrowgauge.integrations.lightning import NarrowgaugeStrategy
from narrowgauge.integrations.transformers import prepare_trainer
from narrowgauge.optimizers import Grass
from tests.support.chat import save_tokenizer
from tests.support.zero import full_weights

STEPS, BATCH, ACCUMULATION, WARMUP = 5, 8, 2, 1
LR, DECAY, CLIP = 1e-2, 0.1, 0.2
# Above the noise of gradients whose true value is zero.
EPSILON = 1e-3
SHAPE = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
# Of LoRA's, those whose columns Grass chooses from.
FACTORS = ["*.lora_A.default"]
PARAMS: dict[str, dict[str, Any]] = {
    "Grass": {"density": 0.25, "refresh_interval": 2, "matrix_lr_scale": 0.5},
    "GaLore": {"density": 0.25, "refresh_interval": 2, "matrix_lr_scale": 0.5},
    "Frugal": {"density": 0.25, "refresh_interval": 2},
    "Apollo": {"rank": 4, "refresh_interval": 2},
    "Lamb": {},
    "Lars": {},
}


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sample ``i``: 12 tokens, a function of ``i``."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(SHAPE.vocab_size, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens.clone()}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(SHAPE)


def adapted() -> PeftModel:
    """With LoRA's factors beside each layer of the attention."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    found = get_peft_model(model(), config)
    assert isinstance(found, PeftModel)
    return found


def block(name: str) -> dict[str, Any]:
    """As people write it for the Trainer: what it knows is left to it."""
    return {"type": name, "params": {"lr": "auto", "weight_decay": "auto", **PARAMS[name]}}


def deepspeed_file(stage: int, name: str | None = "Grass") -> dict[str, Any]:
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        **dict.fromkeys(auto, "auto"),
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": "auto",
            "stage3_param_persistence_threshold": 500,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        **({"optimizer": block(name)} if name is not None else {}),
    }


def arguments(
    folder: Path,
    file: dict[str, Any] | None = None,
    kind: type[TrainingArguments] = TrainingArguments,
    **more: Any,
) -> Any:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // ACCUMULATION // ranks,
        "gradient_accumulation_steps": ACCUMULATION,
        "learning_rate": LR,
        "weight_decay": DECAY,
        "adam_epsilon": EPSILON,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "linear",
        "warmup_steps": WARMUP,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
    }
    _forget_deepspeed()
    if file is None:
        chosen["use_cpu"] = True
    else:
        chosen |= {"deepspeed": file, "accelerator_config": cpu_ranks()}
    return kind(**{**chosen, **more})


def _forget_deepspeed() -> None:
    """What an earlier call has left in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def trained_by_trainer(
    folder: Path,
    *,
    stage: int | None,
    name: str = "Grass",
    resume: str | None = None,
    offload: dict[str, Any] | None = None,
    adapters: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Train, save the model in ``folder/final``; without a stage alone or under DistributedDataParallel."""
    file = deepspeed_file(stage, name) if stage is not None else None
    if file is not None and adapters:
        file["optimizer"]["params"]["target_modules"] = FACTORS
    args = arguments(folder, file, **more)
    trainer = Trainer(
        model=adapted() if adapters else model(), args=args, train_dataset=Samples(), eval_dataset=Samples()
    )
    assert trainer.is_deepspeed_enabled == (stage is not None)
    prepare_trainer(trainer, optimizer=block(name) if stage is None else None, activation_offload=offload)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    used = trainer.narrowgauge.activation_offload  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "steps": trainer.state.global_step,
        "best": trainer.state.best_model_checkpoint,
        "losses": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "written": used.stats().written if used is not None else 0,
    }


def train_by_loop(
    folder: Path, *, name: str = "Grass", bf16: bool = False, in_module: bool = False, adapters: bool = False
) -> None:
    """The same steps, in a loop of one's own, on one rank at ZeRO-1.

    Args:
        adapters: they are trained, and saved as peft does.
        in_module: the model is a part of another, so that its parameters, which choices are drawn by, have other names.
    """
    params = {"lr": LR, "weight_decay": DECAY, **PARAMS[name]}
    if name != "Lars":
        params["eps"] = EPSILON
    if adapters:
        params["target_modules"] = FACTORS
    whole = adapted() if adapters else Module(client=False) if in_module else model()
    engine, *_ = initialize(
        model=whole,
        config={
            "train_batch_size": BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": CLIP,
            "bf16": {"enabled": bf16},
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": name, "params": params},
        },
        lr_scheduler=lambda optimizer: get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS),
    )
    samples = Samples()
    for step in range(STEPS):
        tokens = torch.stack([samples[BATCH * step + number]["input_ids"] for number in range(BATCH)])
        for micro_batch in tokens.chunk(ACCUMULATION):
            engine.backward(engine(input_ids=micro_batch, labels=micro_batch).loss)
            engine.step()
    if adapters:
        engine.module.save_pretrained(str(folder))
        return
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        key.removeprefix("model." if in_module else ""): value.contiguous()
        for key, value in engine.module.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors")


def weights_in(folder: Path, name: str = "model.safetensors") -> dict[str, Tensor]:
    return load_file(folder / name)


def trained_by_accelerate(
    folder: Path, *, stage: int | None, client: bool = False, cpu_offload: bool = False, bf16: bool = False
) -> str:
    """A loop of one's own with Accelerate, saved and loaded in the middle.

    Args:
        client: the optimizer is made in code and passed to ``prepare``, else named in the DeepSpeed file.

    Returns:
        The type of the optimizer that has trained.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    options = {"lr": LR, "weight_decay": DECAY, "eps": EPSILON, **PARAMS["Grass"]}
    plugin = None
    _forget_deepspeed()
    if stage is not None:
        file = deepspeed_file(stage, None if client else "Grass")
        if not client:
            file["optimizer"]["params"]["eps"] = EPSILON
        if cpu_offload:
            file["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        cpu_ranks()
        plugin = DeepSpeedPlugin(hf_ds_config={**file, "gradient_clipping": CLIP})
    accelerator = prepare_accelerator(
        Accelerator(
            cpu=stage is None,
            mixed_precision="bf16" if bf16 else "no",
            deepspeed_plugin=plugin,
            gradient_accumulation_steps=ACCUMULATION,
            step_scheduler_with_optimizer=False,
        )
    )
    whole = model()
    loader = DataLoader(Samples(), batch_size=BATCH // ACCUMULATION // ranks)

    def schedule_of(optimizer: Any) -> Any:
        return get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)

    if client or stage is None:
        own = Grass(whole, **options)
        prepared = accelerator.prepare(whole, own, loader, schedule_of(own))
    else:
        dummy = DummyOptim(whole.parameters(), lr=LR, weight_decay=DECAY)  # pyright: ignore[reportArgumentType]
        schedule = DummyScheduler(dummy, lr_scheduler_callable=schedule_of)
        prepared = accelerator.prepare(whole, dummy, loader, schedule)
    engine, optimizer, batches, schedule = prepared
    for number, batch in enumerate(batches):
        with accelerator.accumulate(engine):
            accelerator.backward(engine(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(engine.parameters(), CLIP)
            optimizer.step()
            if accelerator.sync_gradients:
                schedule.step()
            optimizer.zero_grad()
        if number == ACCUMULATION * 3 - 1:
            accelerator.save_state(str(folder / "state"))
            accelerator.wait_for_everyone()
            accelerator.load_state(str(folder / "state"))
    weights: Any = accelerator.get_state_dict(engine)
    if accelerator.is_main_process:
        save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    found = getattr(engine, "own_optimizer", optimizer)
    return type(getattr(found, "optimizer", found)).__name__


def accelerate_refuses(launched: int) -> str:
    """What is said where the launcher started more ranks than Accelerate knows of."""
    _forget_deepspeed()
    accelerator = Accelerator(cpu=True)
    before = os.environ["WORLD_SIZE"]
    os.environ["WORLD_SIZE"] = str(launched)
    try:
        prepare_accelerator(accelerator)
    except ConfigError as error:
        return str(error)
    finally:
        os.environ["WORLD_SIZE"] = before
    return ""


class Module(LightningModule):
    """The same training in Lightning.

    Args:
        client: the module makes the optimizer, else the strategy's configuration names it.
    """

    def __init__(self, *, client: bool) -> None:
        super().__init__()
        self.model, self.client = model(), client

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        return self(**batch).loss

    def configure_optimizers(self) -> Any:
        assert self.client
        own = Grass(self, lr=LR, weight_decay=DECAY, eps=EPSILON, **PARAMS["Grass"])
        schedule = get_linear_schedule_with_warmup(own, WARMUP, STEPS)
        return {"optimizer": own, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained_by_lightning(folder: Path, *, stage: int, client: bool = True, save_at: int | None = None) -> None:
    """Train, saving after a step and going on in another Trainer if that is asked for."""
    steps, resume = save_at or STEPS, None
    while True:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        settings: dict[str, Any] = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 500}}
        if not client:
            params = {"lr": LR, "weight_decay": DECAY, "eps": EPSILON, **PARAMS["Grass"]}
            settings["optimizer"] = {"type": "Grass", "params": params}
        trainer = LightningTrainer(
            accelerator="cpu",
            devices=ranks,
            strategy=NarrowgaugeStrategy(config={**settings, "gradient_clipping": CLIP}),
            plugins=[TorchElasticEnvironment()],
            max_steps=steps,
            accumulate_grad_batches=ACCUMULATION,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            logger=False,
        )
        # Lightning goes on in the middle of an epoch, with the first batches of its data.
        start = BATCH * (save_at or 0) if resume is not None else 0
        rest = Subset(Samples(), [(start + number) % (STEPS * BATCH) for number in range(STEPS * BATCH)])
        order = DistributedSampler(rest, ranks, int(os.environ.get("RANK", "0")), shuffle=False)
        loader = DataLoader(rest, batch_size=BATCH // ACCUMULATION // ranks, sampler=order)
        module = Module(client=client)
        trainer.fit(module, loader, ckpt_path=resume)
        if steps == STEPS:
            break
        steps, resume = STEPS, str(folder / "saved.ckpt")
        trainer.save_checkpoint(resume)
    engine: Any = trainer.strategy.model
    found = full_weights(engine)
    if trainer.is_global_zero:
        weights = {key.removeprefix("model."): value.contiguous() for key, value in found.items()}
        save_file(weights, folder / "model.safetensors")


def steps_until_refusal(folder: Path, *, stage: int, file_optimizer: str | None) -> tuple[int, str]:
    """A Trainer that nobody has prepared: how many steps it makes, and what it says.

    Args:
        file_optimizer: named in the DeepSpeed file; without it a Grass is passed to the Trainer.
    """
    whole = model()
    own = Grass(whole, lr=LR, density=0.25) if file_optimizer is None else None
    args = arguments(folder, deepspeed_file(stage, file_optimizer))
    trainer = Trainer(model=whole, args=args, train_dataset=Samples(), optimizers=(own, None))
    try:
        trainer.train()
    except Exception as error:
        return trainer.state.global_step, str(error)
    return trainer.state.global_step, ""


def refusals_of_trainer(folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What ``prepare_trainer`` says in each case.

    Args:
        cases: ``arguments`` to change; ``stage``, ``optimizer`` and ``activation_offload`` to ask for; ``client``: a
            Grass is passed to the Trainer.
    """
    said = {}
    for case, asked in cases.items():
        file = deepspeed_file(asked["stage"], asked.get("in_file")) if "stage" in asked else None
        whole = model()
        own = Grass(whole, lr=LR, density=0.25) if asked.get("client") else None
        args = arguments(folder, file, **asked.get("arguments", {}))
        trainer = Trainer(model=whole, args=args, train_dataset=Samples(), optimizers=(own, None))
        blocks = {key: asked[key] for key in ("optimizer", "activation_offload") if key in asked}
        try:
            prepare_trainer(trainer, **blocks)
            said[case] = ""
        except ConfigError as error:
            said[case] = str(error)
    return said


def refusal_of_sft(folder: Path, *, stage: int) -> str:
    """What ``prepare_trainer`` says of TRL's loss with activation offload."""
    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    datasets.disable_progress_bars()
    args = arguments(folder, deepspeed_file(stage), SFTConfig, bf16=False, max_length=16)
    tokenizer = AutoTokenizer.from_pretrained(str(save_tokenizer(folder / "tokenizer")))
    records = datasets.Dataset.from_list([{"text": "the cat sat"}] * BATCH)
    shape = LlamaConfig(**{**SHAPE.to_diff_dict(), "vocab_size": len(tokenizer)})
    trainer = SFTTrainer(LlamaForCausalLM(shape), args, train_dataset=records, processing_class=tokenizer)
    try:
        prepare_trainer(trainer, activation_offload={"path": str(folder), "capacity_bytes": 1 << 24})
    except ConfigError as error:
        return str(error)
    return ""
