"""Train: the model, the objective and the batches handed to Lightning, and what watches them."""

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from data.batch_plan import BatchPlan
from data.datasets import make_loader
from data.flags import DataFlags, IterateFlags
from losses.flags import ChunkFlags, DistillationFlags, SFTFlags
from losses.objectives import chosen_objective, make_objective
from losses.preference_flags import PREFERENCE_FLAGS, REFERENCED
from peft.adapter import adapters_off
from peft.adapter_file import adapter_metadata, trained_tensors
from peft.flags import StateFlags
from peft.groups import parameter_groups
from peft.plan import trained_count
from rwkv.cli import say
from rwkv.errors import RunError
from rwkv.files import claimed
from rwkv.flags import Settings
from rwkv.generate import generate
from rwkv.model import RWKV
from rwkv.plain_text import read_text
from rwkv.run.graphs import uses_graphs
from rwkv.run.models import build, building_place, load_teacher
from rwkv.run.overview import Run, Steps, counts_in_words
from rwkv.sampling_flags import Sampling
from rwkv.templates import prompt_tokens
from rwkv.tokenizer import Tokenizer
from rwkv.training import resume
from rwkv.training.evaluation import Evaluation
from rwkv.training.flags import EvaluationFlags, OptimizerFlags, TrainerFlags
from rwkv.training.graphed import GraphedSteps
from rwkv.training.launch import all_ranks, is_child, starts_itself
from rwkv.training.lit import LitModel, quiet_lightning
from rwkv.training.run_folder import newest
from rwkv.training.saving import Saving
from rwkv.training.schedule import Schedule
from rwkv.training.step_log import RunLog, StepLog, draw_loss
from rwkv.training.stopping import Stopping
from rwkv.training.strategy import make_strategy, take_device


def fit(run: Run) -> int:
    """Train; returns 0, or 128 plus the number of the signal that stopped the run.

    A signal within the last step stops only what would follow: the next of --iterate's rounds.
    """
    quiet_lightning()
    flags, device = run.settings[TrainerFlags], run.device
    folder = Path(flags.proj_dir)
    point = newest(folder)
    strategy = make_strategy(flags, device.dtype, trained_count(run.layers))
    alone = claimed(folder) if starts_itself() else contextlib.nullcontext()
    with alone, all_ranks(flags.devices, flags.num_nodes, folder):
        take_device(flags, device.kind)
        return fit_ranks(run, strategy, point)


def fit_ranks(run: Run, strategy: Any, point: Path | None) -> int:
    """What every rank does of `fit`, from the resume point on if there is one."""
    settings, config, _, batches, steps, device, tokenizer = run
    flags, data = settings[TrainerFlags], settings[DataFlags]
    optimizer, evaluation = settings[OptimizerFlags], settings[EvaluationFlags]
    folder, plan = Path(flags.proj_dir), batches.training
    objective: Any = make_objective(settings, load_teacher(settings, config, device))
    pl.seed_everything(flags.random_seed, workers=True, verbose=False)  # new adapters are random
    model, layers, base = build(settings, config, building_place(settings, config, device))
    if chosen_objective(settings) in REFERENCED and plan.pieces.store.reference is None:
        objective = replace(objective, reference=adapters_off)
    same = {
        "base model": base,
        "data": plan.pieces.store.fingerprint,
        "rows of a step": plan.rows_per_step,
        "ctx_len": data.ctx_len,
        "packing": data.packing,
        "pieces": counts_in_words(plan.pieces.report),
        "random_seed": flags.random_seed,
        "steps": steps.total,
        "trained parameters": trained_count(layers),
        "tuned state": settings[StateFlags].state,
        "prefix": settings[StateFlags].prefix_tuning and settings[StateFlags].prefix_token_len,
        "precision": str(device.dtype).removeprefix("torch."),
        **computed_by(settings),
        **{name: mine.in_words() for name, mine in layers.plans.items()},
    }
    first = 0
    if point is not None:
        first = resume.check_same_run(point, same)
        if first >= steps.total:
            say(f"{folder}: this run is done ({first} steps)")
            return 0

    accumulate = flags.accumulate_grad_batches
    micro_batches = first * accumulate, steps.total * accumulate
    lit = LitModel(
        model,
        objective,
        parameter_groups(model, layers, optimizer),
        optimizer,
        strategy=flags.strategy,
        loader=lambda rank: make_loader(plan, rank, *micro_batches, data.num_workers),
        first_step=first,
        graphs=GraphedSteps(model, objective) if uses_graphs(run) else None,
    )
    loggers = make_loggers(settings, folder)
    log = StepLog(
        RunLog(folder),
        Schedule(optimizer.lr_schedule, steps.total, optimizer.warmup_steps),
        every=evaluation.log_every,
        step_tokens=plan.rows_per_step * plan.pieces.room,
        loggers=loggers,
        behind=int(device.kind == "cuda"),
    )
    saving = Saving(
        folder,
        epochs=steps.epochs,
        every=flags.resume_every,
        tensors=lambda: trained_tensors(model),
        metadata=adapter_metadata(model, layers, base=base, flags=settings.as_flags()),
        run=same,
        step_log=log,
    )
    stopping = Stopping(log)
    callbacks: list[Any] = [stopping, log]
    if batches.held_out is not None:
        callbacks.append(
            make_evaluation(settings, objective, batches.held_out, steps, log, tokenizer)
        )
    callbacks.append(saving)
    if point is not None:
        callbacks.insert(1, resume.Resume(point))
    trainer = pl.Trainer(
        accelerator="cuda" if device.kind == "cuda" else "cpu",
        devices=flags.devices,
        num_nodes=flags.num_nodes,
        strategy=strategy,
        precision="32-true",
        max_steps=steps.total - first,
        max_epochs=1,
        accumulate_grad_batches=flags.accumulate_grad_batches,
        gradient_clip_val=optimizer.gradient_clip_val or None,
        use_distributed_sampler=False,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    if trainer.is_global_zero:
        resume.prepare_folder(folder)
    pl.seed_everything(flags.random_seed + trainer.global_rank, workers=True, verbose=False)
    try:
        with stopping:
            trainer.fit(lit)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            "a process that prepares batches was killed, as a host short of memory does; go on "
            "with the same flags, --resume 1 and --num_workers 0"
        ) from error
    done, number = lit.steps_done, log.stopped_by or log.stop_requested
    stopped = bool(number) and (done < steps.total or bool(settings[IterateFlags].iterate))
    status = 128 + number if stopped else 0
    if not trainer.is_global_zero:
        return 0 if is_child() else status  # the process that started it speaks for all
    picture = folder / "loss.png"
    written = saving.written + [picture] * draw_loss(folder / "train_log.jsonl", picture)
    if done < steps.total:
        say(f"stopped at step {done} of {steps.total}; go on with the same flags and --resume 1")
    else:
        say(f"done: {done} steps; written: {', '.join(map(str, written))}")
    return status


def computed_by(settings: Settings) -> dict[str, Any]:
    """The flags of objective, optimizer, adapters and order that a resumed run must share."""
    kinds = (SFTFlags, DistillationFlags, *PREFERENCE_FLAGS, OptimizerFlags)
    names = [field.name for kind in kinds for field in fields(kind)]
    names += ["rslora", "lora_plus_ratio", "layerwise_lr", "load_adapter", "svd_niter"]
    names.append("random_mode")
    values, chunks = settings.as_flags(), settings[ChunkFlags]
    truncated = chunks.infctx and chunks.chunk_grad == "truncated"
    return {name: values[name] for name in names if name != "teacher_model"} | {
        "gradient": f"cut after {chunks.chunk_ctx} tokens" if truncated else "of the whole text"
    }


def make_evaluation(
    settings: Settings,
    objective: Any,
    held_out: BatchPlan,
    steps: Steps,
    log: StepLog,
    tokenizer: Tokenizer,
) -> Any:
    """The callback that measures the held-out loss and shows samples."""
    every = settings[EvaluationFlags].val_every
    return Evaluation(
        batches=lambda rank: make_loader(held_out, rank, 0, held_out.steps_per_pass),
        objective=objective,
        sample=make_sampler(settings, tokenizer),
        steps=lambda step: step in steps.epochs or bool(every and step % every == 0),
        step_log=log,
    )


def make_loggers(settings: Settings, folder: Path) -> list[Any]:
    """Lightning's loggers beside train_log.jsonl: TensorBoard and Weights & Biases.

    Raises:
        RunError: TensorBoard's package is missing.
    """
    flags = settings[EvaluationFlags]
    loggers: list[Any] = []
    if flags.tensorboard:
        if not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
            raise RunError(
                "--tensorboard 1: needs the package tensorboard; pip install tensorboard"
            )
        from pytorch_lightning.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(folder, name=None, version="tensorboard"))
    if flags.wandb:
        if importlib.util.find_spec("wandb") is None:
            say(f"--wandb {flags.wandb}: wandb is not installed; logging goes on without it")
            return loggers
        from pytorch_lightning.loggers import WandbLogger

        loggers.append(
            WandbLogger(project=flags.wandb, save_dir=folder, config=settings.as_flags())
        )
    return loggers


def make_sampler(settings: Settings, tokenizer: Tokenizer) -> Callable[[RWKV], list[str]] | None:
    """What shows the model's answers to --val_prompts at each evaluation."""
    flags = settings[EvaluationFlags]
    if not flags.val_prompts:
        return None
    lines = read_text(Path(flags.val_prompts)).splitlines()
    prompts = [line for line in lines if line.strip()]
    tokens = [prompt_tokens(line, settings[DataFlags], tokenizer) for line in prompts]

    def sample(model: RWKV) -> list[str]:
        answers = generate(
            model,
            tokens,
            tokenizer=tokenizer,
            max_tokens=flags.val_tokens,
            stop=["\n\n"],
            sampling=Sampling(temperature=0.0),
        )
        return [
            f"  {prompt} -> {answer.text.strip()!r}"
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    return sample
