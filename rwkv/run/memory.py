"""A run's memory before it begins: predicted, what would fit, and measured over two steps."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from data.flags import DataFlags
from losses.flags import ChunkFlags, DistillationFlags
from losses.objectives import chosen_objective
from losses.preference_flags import PREFERENCES, REFERENCED
from peft.flags import PeftFlags, StateFlags
from rwkv.cli import say
from rwkv.errors import InputError, RunError
from rwkv.flags import Settings
from rwkv.training.flags import ModelFlags, OptimizerFlags, TrainerFlags

if TYPE_CHECKING:
    import torch

    from data.batch_plan import BatchPlan
    from peft.memory import Prediction, Step
    from peft.plan import Plan
    from rwkv.config import RWKVConfig
    from rwkv.run.overview import Run
    from rwkv.training.measure import Measured


def preview(run: "Run") -> int:
    """End a dry run with the memory that the run would take; returns the exit status."""
    from losses.objectives import make_objective
    from rwkv.run.models import is_for_gpu, load_teacher

    settings, config, layers = run.settings, run.config, run.layers
    on_gpu = is_for_gpu(settings, run.device)
    step = step_of(settings, run.device.dtype, run.batches.training, on_gpu=on_gpu)
    step = replace(step, kernel=kernel_of(run))
    for line in describe_memory(settings, config, layers, step):
        say(line)
    if settings[TrainerFlags].dry_run == "verify":
        objective = make_objective(settings, load_teacher(settings, config, run.device))
        for line in verify(settings, config, layers, step, run.batches.training, objective):
            say(line)
    return 0


def kernel_of(run: "Run") -> str:
    """The backend of wkv; where the run is planned for another machine, the one asked for."""
    from rwkv.run.kernel import wkv_choice
    from rwkv.run.models import is_for_gpu

    asked = run.settings[ModelFlags].backend
    if is_for_gpu(run.settings, run.device) and run.device.kind != "cuda":
        return asked
    try:
        return wkv_choice(run).name
    except RunError:
        return asked


def step_of(
    settings: Settings, dtype: "torch.dtype", batches: "BatchPlan", *, on_gpu: bool
) -> "Step":
    """What the flags and the data say of a step's memory.

    Args:
        settings: of the run.
        dtype: of the model.
        batches: of the training data.
        on_gpu: whether the run, or the one that a dry run plans for, has a GPU.
    """
    from peft.memory import Step

    trainer, chunks = settings[TrainerFlags], settings[ChunkFlags]
    distillation = settings[DistillationFlags]
    pieces, pairs = batches.pieces, {}
    if chosen_objective(settings) in PREFERENCES:
        pairs = {"answers": pieces.most_answers, "prompts": pieces.prompt_share}
    taught = distillation.distillation and distillation.teacher_model
    return Step(
        rows=trainer.micro_bsz,
        ctx_len=pieces.room,
        texts=batches.most_texts,
        dtype=dtype,
        on_gpu=on_gpu,
        fused=on_gpu,
        chunk=chunks.chunk_ctx if chunks.infctx else 0,
        packed=settings[DataFlags].packing,
        **pairs,
        host_states=chunks.infctx and chunks.chunk_offload,
        grad_cp=trainer.grad_cp,
        kept_limit=int(trainer.grad_cp_memory * 2**30),
        host_blocks=trainer.grad_cp_offload,
        accumulate=trainer.accumulate_grad_batches,
        tuned_state=settings[StateFlags].state,
        given_states=settings[StateFlags].prefix_tuning,
        prefix=settings[StateFlags].prefix_tuning,
        beside=distillation.kd_loss if taught else "",
        teacher=teacher_bytes(distillation.teacher_model, dtype) if taught else 0,
        optim=settings[OptimizerFlags].optim,
        strategy=trainer.strategy,
        world=trainer.devices * trainer.num_nodes,
    )


def teacher_bytes(path: str, dtype: "torch.dtype") -> int:
    """What a teacher's weights occupy; those that its file holds in few bits stay so."""
    from peft.stores import stored_size
    from rwkv.checkpoint import read_tensors

    tensors, total = read_tensors(path), 0
    for name, shape in tensors.shapes.items():
        stored = tensors.quantized.get(name.removesuffix(".weight"))
        if stored is None:
            total += math.prod(shape) * dtype.itemsize
        else:
            total += stored_size(stored["storage"], *shape)
    return total


def describe_memory(
    settings: Settings, config: "RWKVConfig", layers: "Plan", step: "Step"
) -> Iterable[str]:
    """The prediction as a table, and with --memory what would fit."""
    from peft.memory import predict, table
    from peft.memory_fit import read_size, what_fits

    yield from table(predict(config, layers, step))
    memory = settings[TrainerFlags].memory
    if memory:
        yield f"--memory {memory}: {what_fits(config, layers, step, read_size(memory))}"


def verify(
    settings: Settings,
    config: "RWKVConfig",
    layers: "Plan",
    step: "Step",
    batches: "BatchPlan",
    objective: Any,
) -> Iterable[str]:
    """Run two steps on this machine's GPU; the prediction beside what was measured.

    Args:
        settings: of the run. Without --load_model the model is of random numbers.
        config, layers: the model and its plan.
        step: as `step_of` gives it.
        batches: of the training data.
        objective: of the run.

    Raises:
        RunError: there is no GPU.
        InputError: the run is spread over several processes.
    """
    import torch

    from data.datasets import make_loader
    from peft.adapter import adapters_off
    from peft.apply import load_with_profile, random_with_profile
    from peft.groups import parameter_groups
    from peft.memory import predict
    from peft.tuned_state import add_prefix, add_tuned_state
    from rwkv.training.measure import measure
    from rwkv.training.optimizer import make_optimizer
    from rwkv.training.strategy import grow_segments

    if not torch.cuda.is_available():
        raise RunError("--dry_run verify: measures a GPU, and torch finds none; use --dry_run 1")
    if step.world > 1 or step.stage:
        raise InputError(
            "--dry_run verify: measures one GPU without DeepSpeed; add --devices 1 --num_nodes 1 "
            "--strategy auto, or use --dry_run 1"
        )
    grow_segments()
    flags, peft, optimizer = settings[ModelFlags], settings[PeftFlags], settings[OptimizerFlags]

    def make() -> Any:
        where: dict[str, Any] = {"device": "cuda", "dtype": step.dtype, "backend": flags.backend}
        if flags.load_model:
            model, _ = load_with_profile(flags.load_model, peft, **where)
        else:
            model, _ = random_with_profile(config, peft, **where)
        if step.tuned_state:
            add_tuned_state(model)
        if step.prefix:
            add_prefix(model, settings[StateFlags].prefix_token_len)
        model.grad_cp, model.grad_cp_offload = step.grad_cp, step.host_blocks
        model.grad_cp_memory = step.kept_limit
        return model

    def optimize(model: Any) -> Any:
        groups = [
            {"params": list(group.params), "lr": group.lr_init, "weight_decay": group.weight_decay}
            for group in parameter_groups(model, layers, optimizer)
        ]
        return make_optimizer(groups, optimizer, strategy="auto", on_gpu=True)

    beside = torch.cuda.memory_allocated()  # a teacher
    loader = make_loader(batches, 0, 0, step.accumulate)
    moved = [
        batch._replace(**{n: t.cuda() for n, t in batch._asdict().items() if t is not None})
        for batch in loader
    ]
    if chosen_objective(settings) in REFERENCED and batches.pieces.store.reference is None:
        objective = replace(objective, reference=adapters_off)
    found = measure(make, optimize, objective, moved)
    found = found._replace(
        loading=found.loading + beside, model=found.model + beside, peak=found.peak + beside
    )
    yield from compared(predict(config, layers, step), found)


def compared(prediction: "Prediction", found: "Measured") -> Iterator[str]:
    """Prediction and measurement, part by part."""
    from peft.memory import GIB

    yield f"{'GiB':<32}{'predicted':>10}{'measured':>10}{'ratio':>8}"
    for name, predicted, measured in pairs(prediction, found):
        ratio = f"{predicted / measured:8.2f}" if measured else ""
        yield f"{name:<32}{predicted / GIB:10.2f}{measured / GIB:10.2f}{ratio}"
    moments = ", ".join(
        f"{name} {sum(more.values()) / GIB:.2f} ({_parts(more)})"
        for name, more in prediction.moments.items()
    )
    yield f"predicted over the rest: {moments}"


def _parts(more: dict[str, int]) -> str:
    from peft.memory import GIB

    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in more.items())


AFTER = ("optimizer step", "loading")  # the moments outside of forward and backward passes


def pairs(prediction: "Prediction", found: "Measured") -> Iterator[tuple[str, int, int]]:
    """(name, predicted, measured) of what can be measured by itself."""
    held = prediction.rest.get("optimizer", 0)
    moments = {name: sum(more.values()) for name, more in prediction.moments.items()}
    model = sum(prediction.rest.values()) - held
    gradients = prediction.moments["optimizer step"]["gradients"]
    yield "weights and adapters", model, found.model
    yield "at most while loading", model + moments["loading"], found.loading
    yield "optimizer", held, found.optimizer
    yield "gradients", gradients, found.gradients
    walking = max(size for name, size in moments.items() if name not in AFTER)
    yield "forward and backward", walking, found.walking
    yield "optimizer step", moments["optimizer step"], found.stepping
    yield "peak", prediction.peak, found.peak
    yield "reserved", prediction.reserved, found.reserved
