"""The flags of train.py, and which of them contradict each other."""

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from data.flags import DataFlags, IterateFlags, PairFlags
from losses.flags import ChunkFlags, DistillationFlags, SFTFlags
from losses.objectives import check_distillation, chosen_objective
from losses.preference_flags import PREFERENCE_FLAGS
from peft.flags import PeftFlags, StateFlags
from rwkv.errors import InputError
from rwkv.flags import Settings
from rwkv.training.flags import EvaluationFlags, ModelFlags, OptimizerFlags, TrainerFlags

FLAGS = (
    ModelFlags,
    SFTFlags,
    DistillationFlags,
    *PREFERENCE_FLAGS,
    DataFlags,
    PairFlags,
    IterateFlags,
    PeftFlags,
    StateFlags,
    TrainerFlags,
    OptimizerFlags,
    ChunkFlags,
    EvaluationFlags,
)


NEEDED_BY = {  # what switches them on, and the flags that say nothing without it
    "quant 1": ("quant_mode", "quant_head"),
    "infctx 1": ("chunk_ctx", "chunk_grad", "chunk_offload"),
    "prefix_tuning 1": ("prefix_token_len",),
    "distillation 1": ("teacher_model", "kd_loss", "jsd_beta", "temperature", "alpha", "top_k"),
    "dpo 1": ("dpo_beta", "dpo_alpha", "dpo_loss", "dpo_label_smoothing"),
    "orpo 1": ("orpo_alpha",),
    "simpo 1": ("simpo_beta", "simpo_gamma", "simpo_alpha"),
    "kto 1": ("kto_beta", "kto_desirable", "kto_undesirable", "kto_alpha"),
    "val_data_file or val_fraction": ("val_every", "val_prompts"),
    "val_prompts": ("val_tokens",),
    "layer_profile": ("quant", "limited_lora", "rslora", "lora_plus_ratio", "svd_niter"),
}

OF_A_GPU = ("gpu_memory", "grad_cp_offload", "chunk_offload")  # flags that say nothing on a CPU


def without_effect(settings: Settings, words: Sequence[str] = ()) -> list[str]:
    """A line for each flag that is set while the switch that it belongs to is off.

    Args:
        settings: the flags.
        words: of the command line, where one may have the value that it has if not given.
    """
    given = {word.removeprefix("--").partition("=")[0] for word in words if word[:2] == "--"}
    values, usual = settings.as_flags(), _usual()
    return [
        f"--{name} {_written(values[name])}: has no effect without --{' or --'.join(switches)}"
        for either, names in NEEDED_BY.items()
        for switches in [either.split(" or ")]
        for name in names
        if not any(values[switch.split()[0]] for switch in switches)
        and (values[name] != usual[name] or (name in given and values[name]))
    ]


def without_effect_on_cpu(settings: Settings) -> list[str]:
    """A line for each flag that is set and is about a GPU's memory."""
    values, usual = settings.as_flags(), _usual()
    return [
        f"--{name} {_written(values[name])}: has no effect on a CPU"
        for name in OF_A_GPU
        if values[name] != usual[name]
    ]


def _usual() -> dict[str, object]:
    """Every flag's default."""
    return {f.name: f.default for kind in FLAGS for f in fields(kind)}


def _written(value: object) -> object:
    """As on a command line."""
    return int(value) if isinstance(value, bool) else value


def check(settings: Settings) -> None:
    """Stop at values that are wrong by themselves, before anything heavy is imported.

    Raises:
        InputError: the message names the flag and the mend.
    """
    if chosen_objective(settings) == "distillation":
        check_distillation(settings[DistillationFlags])
    trainer, model, data = settings[TrainerFlags], settings[ModelFlags], settings[DataFlags]
    if not (model.load_model or model.n_layer):
        raise InputError("--load_model: name the model to train; or give --n_layer for a new one")
    for name, path in {
        "load_model": model.load_model,
        "load_adapter": settings[PeftFlags].load_adapter,
        "teacher_model": settings[DistillationFlags].teacher_model,
    }.items():
        if path and not Path(path).exists():
            raise InputError(f"--{name} {path}: no such file; check the path")
    for name, folder in (("proj_dir", trainer.proj_dir), ("cache_dir", data.cache_dir)):
        if not folder.strip():
            raise InputError(f"--{name}: names no folder; give one, or drop the flag")
    processes, started = trainer.devices * trainer.num_nodes, os.environ.get("WORLD_SIZE", "")
    if "TORCHELASTIC_RUN_ID" in os.environ and started != str(processes):
        raise InputError(
            f"--devices {trainer.devices} --num_nodes {trainer.num_nodes}: torchrun has started "
            f"{started} processes; let the flags and it name the same"
        )
    if trainer.memory and not trainer.dry_run:
        raise InputError(f"--memory {trainer.memory}: is for --dry_run 1; add it, or drop --memory")
    if trainer.memory:
        from peft.memory_fit import read_size

        read_size(trainer.memory)
    if data.val_data_file and data.val_fraction:
        raise InputError(
            f"--val_fraction {data.val_fraction}: contradicts --val_data_file; keep one of them"
        )
    for name in ("reward", "judge"):
        if getattr(settings[IterateFlags], name) and not settings[IterateFlags].iterate:
            raise InputError(f"--{name}: is for rounds of sampling; add --iterate N, or drop it")
    if trainer.grad_cp_offload and not trainer.grad_cp:
        raise InputError(
            "--grad_cp_offload 1: moves what --grad_cp keeps, and --grad_cp is 0; drop one of them"
        )
    if trainer.grad_cp_memory and trainer.grad_cp != "selective":
        raise InputError(
            f"--grad_cp_memory {trainer.grad_cp_memory:g}: is for --grad_cp selective; add it, or "
            "drop --grad_cp_memory"
        )
    if trainer.grad_cp_offload and settings[ChunkFlags].infctx:
        raise InputError(
            "--grad_cp_offload 1: --infctx 1 recomputes blocks of one chunk only; drop one of "
            "them, or use --chunk_offload 1 for the states between chunks"
        )
    optim = settings[OptimizerFlags].optim
    if trainer.strategy.startswith("deepspeed") and "8bit" in optim:
        raise InputError(
            f"--optim {optim}: its blocks do not fit the pieces of --strategy {trainer.strategy}; "
            "use --optim adamw, or --strategy ddp"
        )
    if trainer.strategy.endswith("offload") and optim == "lion":
        raise InputError(
            f"--optim lion: --strategy {trainer.strategy} steps AdamW in the host's memory; "
            "use --optim adamw, or a strategy without _offload"
        )
    prompts = settings[EvaluationFlags].val_prompts
    if prompts and not Path(prompts).is_file():
        raise InputError(f"--val_prompts {prompts}: no such file; it has one prompt a line")
    if model.fla and model.kernel not in ("auto", "fla"):
        raise InputError(f"--fla 1: contradicts --kernel {model.kernel}; keep one of them")
