"""The models of a run: what happens to each layer, the model itself, and a teacher."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from losses.flags import DistillationFlags
from peft.adapter_file import check_adapter, load_adapter, planned_scales, planned_shapes
from peft.apply import load_frozen, load_with_profile, new_with_profile
from peft.flags import PeftFlags, StateFlags
from peft.groups import nothing_trains
from peft.plan import PREFIX, STATE, Plan, make_plan, trained_count
from peft.stores import STORES, store_class
from peft.tuned_state import add_prefix, add_tuned_state, state_shape
from rwkv.checkpoint import check_complete, fingerprint, read_tensors
from rwkv.config import RWKVConfig
from rwkv.errors import InputError
from rwkv.flags import Settings
from rwkv.model import RWKV
from rwkv.training.flags import ModelFlags, OptimizerFlags, TrainerFlags
from rwkv.training.optimizer import check_optimizer
from rwkv.training.schedule import check_rates
from rwkv.training.strategy import chosen_device, chosen_dtype


class Device(NamedTuple):
    """Where the model lies and the dtype of its weights."""

    kind: str
    dtype: torch.dtype


def choose_device(settings: Settings) -> Device:
    """The device and dtype of a run; a dry run is content with a CPU in a GPU's place."""
    flags = settings[TrainerFlags]
    planned = flags.accelerator == "gpu" and bool(flags.dry_run)
    if flags.dry_run:
        flags = replace(flags, accelerator="auto", devices=1)
    kind = chosen_device(flags)
    return Device(kind, chosen_dtype(flags, "cuda" if planned else kind))


def is_for_gpu(settings: Settings, device: Device) -> bool:
    """Whether the run, or the one that a dry run plans for another machine, has a GPU."""
    return device.kind == "cuda" or settings[TrainerFlags].accelerator == "gpu"


def plan_layers(settings: Settings, config: RWKVConfig) -> Plan:
    """What happens to every layer, from the sizes alone: wrong profiles stop here.

    Raises:
        InputError: the file is not whole, the profile does not suit the model or leaves nothing to
            train, or a learning rate is undefined.
    """
    flags, optimizer, start = settings[PeftFlags], settings[OptimizerFlags], settings[StateFlags]
    base = settings[ModelFlags].load_model
    stored: dict[str, Any] = {}
    with torch.device("meta"):
        model = RWKV(config)
    if base:
        tensors = read_tensors(base)
        check_complete(tensors, dict(model.named_parameters()))
        stored = tensors.quantized
    plan = make_plan(model, flags, {layer: entry["storage"] for layer, entry in stored.items()})
    if not (trained_count(plan) or start.state or start.prefix_tuning):
        raise nothing_trains(plan)
    check_rates(optimizer.lr_schedule, optimizer.lr_init, optimizer.lr_final, "--lr_final")
    tuned = {name for name in plan.layers if plan.layers[name].kind == "state" and start.state}
    tuned |= {f"blocks.0.att.{STATE}"} if start.prefix_tuning else set()  # a prefix has its rates
    for name, layer in plan.plans.items():
        rates = [(layer.lr_init, layer.lr_final)] * (layer.mode != "freeze")
        rates += [(layer.state_lr_init, layer.state_lr_final)] * (name in tuned)
        for first, last in rates if optimizer.lr_advanced else []:
            first = optimizer.lr_init if first is None else first
            last = optimizer.lr_final if last is None else last
            check_rates(optimizer.lr_schedule, first, last, f"{layer.rule}: {name}")
    return plan


def check_packages(settings: Settings, plan: Plan) -> None:
    """Whether what the plan's storages, the teacher's and the optimizer need is installed.

    Raises:
        RunError: it is not.
    """
    check_optimizer(settings[OptimizerFlags])
    kinds = {mine.quant for mine in plan.plans.values()}
    teacher = settings[DistillationFlags].teacher_model
    if teacher:
        kinds |= {entry["storage"] for entry in read_tensors(teacher).quantized.values()}
    for kind in kinds & STORES.keys():
        store_class(str(kind)).check_package()


def check_start(settings: Settings, config: RWKVConfig, plan: Plan) -> None:
    """Whether --load_adapter suits the run, before the base is loaded.

    Raises:
        InputError: the file is damaged, or of another profile or base.
    """
    path, start = settings[PeftFlags].load_adapter, settings[StateFlags]
    if not path:
        return
    wanted = planned_shapes(plan)
    if start.state:
        for block in range(config.n_layer):
            wanted[f"blocks.{block}.att.{STATE}"] = state_shape(config)
    if start.prefix_tuning:
        wanted[PREFIX] = start.prefix_token_len, config.n_embd
    check_adapter(path, wanted, planned_scales(plan), base=base_of(settings))


def base_of(settings: Settings) -> str:
    """What tells the run's base from others: its file's fingerprint, or a new model's seed."""
    path = settings[ModelFlags].load_model
    if path:
        return fingerprint(read_tensors(path))
    return f"new, seed {settings[TrainerFlags].random_seed}"


def build(settings: Settings, config: RWKVConfig, device: Device) -> tuple[RWKV, Plan, str]:
    """The model with its stores and adapters in place, the plan, and the base's fingerprint."""
    flags, peft, base = settings[ModelFlags], settings[PeftFlags], base_of(settings)
    if flags.load_model:
        model, plan = load_with_profile(
            flags.load_model, peft, device=device.kind, dtype=device.dtype, backend=flags.backend
        )
    else:
        seed = settings[TrainerFlags].random_seed
        model, plan = new_with_profile(
            config, peft, device=device.kind, dtype=device.dtype, backend=flags.backend, seed=seed
        )
    start = settings[StateFlags]
    if start.state:
        add_tuned_state(model)
    if start.prefix_tuning:
        add_prefix(model, start.prefix_token_len)
    if peft.load_adapter:
        load_adapter(model, peft.load_adapter, base=base)
    trainer = settings[TrainerFlags]
    model.grad_cp, model.grad_cp_offload = trainer.grad_cp, trainer.grad_cp_offload
    model.grad_cp_memory = int(trainer.grad_cp_memory * 2**30)
    return model, plan, base


def building_place(settings: Settings, config: RWKVConfig, device: Device) -> Device:
    """Where the model is built: for ZeRO-3 in the host's memory, from where it is scattered.

    Quantized weights are not scattered, and quantizing needs the GPU's speed.
    """
    if not settings[TrainerFlags].strategy.startswith("deepspeed_stage_3"):
        return device
    plans = plan_layers(settings, config).plans.values()
    stored = any(plan.quant not in (None, "none") for plan in plans)
    return device if stored else device._replace(kind="cpu")


def load_teacher(settings: Settings, config: RWKVConfig, device: Device) -> RWKV | None:
    """The model of --teacher_model, frozen, or None without one.

    Raises:
        InputError: the file is wrong, or its vocabulary is not the student's.
    """
    path = settings[DistillationFlags].teacher_model
    if not path:
        return None
    backend = settings[ModelFlags].backend
    teacher = load_frozen(path, device=device.kind, dtype=device.dtype, backend=backend)
    if teacher.config.vocab_size != config.vocab_size:
        raise InputError(
            f"--teacher_model {path}: has a vocabulary of {teacher.config.vocab_size:,}, the "
            f"student's is {config.vocab_size:,}; distillation needs one vocabulary"
        )
    return teacher
