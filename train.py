"""Fine-tune RWKV-6 and RWKV-7 models: flags -> model -> profile -> data -> objective -> trainer.

    python train.py --load_model base.pth --train_data_file chats.jsonl --sft 1 \\
        --layer_profile layerprofile/lora.json --proj_dir out/run
"""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.flags import DataFlags, IterateFlags, PairFlags
from losses.flags import ChunkFlags, DistillationFlags, SFTFlags
from losses.objectives import check_distillation, chosen_objective, make_objective
from losses.preference_flags import PREFERENCE_FLAGS, PREFERENCES, REFERENCED
from peft.flags import PeftFlags, StateFlags
from rwkv import cli, upstream_flags
from rwkv.errors import InputError
from rwkv.flags import Settings, parse
from rwkv.training.flags import EvaluationFlags, ModelFlags, OptimizerFlags, TrainerFlags

if TYPE_CHECKING:
    import torch

    from data.batch_plan import BatchPlan
    from data.pair_store import PairStore
    from data.teacher_store import TeacherStore
    from peft.plan import Plan
    from rwkv.config import RWKVConfig
    from rwkv.model import RWKV
    from rwkv.tokenizer import Tokenizer
    from rwkv.training.step_log import StepLog

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


class Device(NamedTuple):
    """Where the model lies and the dtype of its weights."""

    kind: str
    dtype: "torch.dtype"


class Batches(NamedTuple):
    """The plans of the training data and, if there is any, of the held-out data."""

    training: "BatchPlan"
    held_out: "BatchPlan | None"


class Steps(NamedTuple):
    """The run in optimizer steps.

    total: steps of the run.
    epochs: step -> number of the epoch that ends there and is saved.
    """

    total: int
    epochs: dict[int, int]


def main(argv: list[str] | None = None) -> int:
    """Train as the flags say; returns the exit status."""
    words, notes = upstream_flags.split(list(sys.argv[1:] if argv is None else argv))
    settings = parse(words, FLAGS, program="train.py", description=__doc__.splitlines()[0])
    check(settings)
    for note in notes:
        say(note)
    return iterate(settings) if settings[IterateFlags].iterate else train(settings)


def check(settings: Settings) -> None:
    """Stop at values that are wrong by themselves, before anything heavy is imported.

    Raises:
        InputError: the message names the flag and the mend.
    """
    if chosen_objective(settings) == "distillation":
        check_distillation(settings[DistillationFlags])
    trainer, model = settings[TrainerFlags], settings[ModelFlags]
    for name in ("micro_bsz", "accumulate_grad_batches", "devices", "num_nodes", "epoch_count"):
        if getattr(trainer, name) < 1:
            raise InputError(f"--{name} {getattr(trainer, name)}: must be at least 1")
    if model.load_model and not Path(model.load_model).exists():
        raise InputError(f"--load_model {model.load_model}: no such file; check the path")
    prompts = settings[EvaluationFlags].val_prompts
    if prompts and not Path(prompts).is_file():
        raise InputError(f"--val_prompts {prompts}: no such file; it has one prompt a line")
    if model.fla and model.kernel not in ("auto", "fla"):
        raise InputError(f"--fla 1: contradicts --kernel {model.kernel}; keep one of them")


def train(settings: Settings) -> int:
    """Prepare a run, print its plan and, unless it is a dry run, train."""
    from rwkv.tokenizer import load_tokenizer
    from rwkv.training.model import read_config

    model_flags, trainer = settings[ModelFlags], settings[TrainerFlags]
    device = choose_device(settings)
    vocab_size = model_flags.vocab_size
    if model_flags.load_model:
        vocab_size = read_config(model_flags).vocab_size
    tokenizer = load_tokenizer(settings[DataFlags].tokenizer or None, vocab_size)
    config = read_config(model_flags, tokenizer.vocab_size)
    layers = plan_layers(settings, config)

    batches = open_data(settings, tokenizer, layers)
    steps = count_steps(trainer, batches.training)
    for line in describe(settings, config, layers, batches.training, steps, device):
        say(line)
    if trainer.dry_run:
        return preview(settings, config, layers, batches.training, device)
    return fit(settings, config, batches, steps, device, tokenizer)


def preview(
    settings: Settings, config: "RWKVConfig", layers: "Plan", batches: "BatchPlan", device: Device
) -> int:
    """End a dry run with the memory that the run would take."""
    from run.memory import describe_memory, step_of, verify

    step = step_of(settings, device.dtype)
    for line in describe_memory(settings, config, layers, step):
        say(line)
    if settings[TrainerFlags].dry_run == "verify":
        objective = make_objective(settings, load_teacher(settings, config, device))
        for line in verify(settings, config, layers, step, batches, objective):
            say(line)
    return 0


def iterate(settings: Settings) -> int:
    """Rounds of sampling, scoring and training; returns the exit status.

    Round N keeps its pairs and its run in --proj_dir/round-N. The same command goes on where an
    earlier one stopped, within a round and between rounds.
    """
    from dataclasses import replace

    flags, trainer = settings[IterateFlags], settings[TrainerFlags]
    if chosen_objective(settings) not in ("dpo", "orpo", "simpo"):
        raise InputError("--iterate: makes pairs; add --dpo 1, --orpo 1 or --simpo 1")
    if bool(flags.reward) == bool(flags.judge):
        raise InputError("--iterate: needs --reward or --judge, and not both")
    adapter = settings[PeftFlags].load_adapter
    for number in range(flags.iterate):
        folder = Path(trainer.proj_dir) / f"round-{number}"
        now = Settings(settings)
        now[PeftFlags] = replace(settings[PeftFlags], load_adapter=adapter)
        now[PairFlags] = replace(settings[PairFlags], rlhf_train_file=str(folder / "pairs.jsonl"))
        now[TrainerFlags] = replace(trainer, proj_dir=str(folder / "run"), resume=True)
        done = folder / "run" / f"rwkv-{trainer.epoch_begin + trainer.epoch_count - 1}.pth"
        if not done.exists():
            make_round(settings, now, number)
            status = train(now)
            if status or trainer.dry_run:
                return status
        adapter = str(done)
    return 0


def make_round(settings: Settings, now: Settings, number: int) -> None:
    """Write the pairs of a round, and for DPO their scores, by the model that it starts from."""
    from data.make_reference import score_folder
    from data.pair_records import PAIRS
    from data.reference_scores import Scorer, file_fingerprint
    from data.rounds import make_judge, make_reward, write_round
    from data.store_cache import open_store
    from peft.apply import load_frozen
    from rwkv.templates import load_template
    from rwkv.tokenizer import load_tokenizer
    from rwkv.training.model import read_config

    flags, data = settings[IterateFlags], settings[DataFlags]
    if not settings[ModelFlags].load_model:
        raise InputError("--iterate: needs --load_model, a model that can answer")
    device, adapter = choose_device(settings), now[PeftFlags].load_adapter
    config = read_config(settings[ModelFlags])
    tokenizer = load_tokenizer(data.tokenizer or None, config.vocab_size)
    template = load_template(data.template, tokenizer, data.turn_end or None)
    model, _, base = build(now, config, device)  # as the round trains it, stores and adapters
    model.requires_grad_(False).eval()
    pairs = Path(now[PairFlags].rlhf_train_file)
    if not pairs.exists():
        if flags.judge:
            judge = load_frozen(flags.judge, device=device.kind, dtype=device.dtype)
            reward = make_judge(judge, tokenizer, template)
        else:
            reward = make_reward(flags.reward)
        prompts = Path(settings[PairFlags].rlhf_train_file or data.train_data_file)
        seed = settings[TrainerFlags].random_seed + number
        made = write_round(pairs, prompts, model, tokenizer, template, flags, reward, seed)
        say(
            f"round {number}: {made.pairs:,} pairs from {made.prompts:,} prompts, "
            f"mean score {made.mean_score:.4f}"
        )
    if chosen_objective(settings) in REFERENCED:
        scorer = Scorer(base, file_fingerprint(adapter) if adapter else "")
        for folder in open_store(str(pairs), data, tokenizer, PAIRS).folders:
            score_folder(model, folder, scorer, 16384)


def plan_layers(settings: Settings, config: "RWKVConfig") -> "Plan":
    """What happens to every layer, from the sizes alone: wrong profiles stop here.

    Raises:
        InputError: the profile does not suit the model, or a learning rate is undefined.
    """
    import torch

    from peft.plan import make_plan
    from rwkv.checkpoint import read_tensors
    from rwkv.model import RWKV
    from rwkv.training.schedule import check_rates

    flags, optimizer = settings[PeftFlags], settings[OptimizerFlags]
    base = settings[ModelFlags].load_model
    stored = read_tensors(base).quantized if base else {}
    with torch.device("meta"):
        plan = make_plan(
            RWKV(config), flags, {layer: entry["storage"] for layer, entry in stored.items()}
        )
    check_rates(optimizer.lr_schedule, optimizer.lr_init, optimizer.lr_final, "--lr_final")
    for name, layer in plan.plans.items():
        if layer.mode != "freeze" and optimizer.lr_advanced:
            first = optimizer.lr_init if layer.lr_init is None else layer.lr_init
            last = optimizer.lr_final if layer.lr_final is None else layer.lr_final
            check_rates(optimizer.lr_schedule, first, last, f"{layer.rule}: {name}")
    return plan


def open_data(settings: Settings, tokenizer: "Tokenizer", layers: "Plan") -> Batches:
    """The batches of the run's objective, from its files."""
    from data.store_cache import open_store
    from data.token_store import split

    data, paths = settings[DataFlags], settings[DataFlags].train_data_file

    def open_files(paths: str) -> Any:
        if chosen_objective(settings) in PREFERENCES:
            return open_preferences(settings, paths, tokenizer, layers)
        if settings[DistillationFlags].reads_scores:
            return open_scores(settings, paths, tokenizer)
        return open_store(paths, data, tokenizer)

    if chosen_objective(settings) in PREFERENCES:
        paths = settings[PairFlags].rlhf_train_file or paths
    store, held_out = open_files(paths), None
    if data.val_data_file:
        held_out = open_files(data.val_data_file)
    elif data.val_fraction:
        store, held_out = split(store, data.val_fraction, settings[TrainerFlags].random_seed)
    return Batches(
        plan_batches(settings, store),
        None if held_out is None else plan_batches(settings, held_out, training=False),
    )


def open_preferences(
    settings: Settings, paths: str, tokenizer: "Tokenizer", layers: "Plan"
) -> "PairStore":
    """Preference records, with reference scores where the objective needs them.

    Raises:
        InputError: the files are wrong, or there is no reference to be had.
    """
    from data.open_pairs import open_pairs
    from data.reference_scores import Scorer, file_fingerprint
    from rwkv.checkpoint import fingerprint, read_tensors

    objective, adapter = chosen_objective(settings), settings[PeftFlags].load_adapter
    path, live, scorer = settings[ModelFlags].load_model, is_own_reference(settings, layers), None
    if objective == "kto" and not live:
        raise InputError(
            "--kto 1: compares with the model before training on answers that no file has scores "
            "of; use a profile like layerprofile/lora-adapters-only.json, without --load_adapter"
        )
    if objective in REFERENCED:
        base = fingerprint(read_tensors(path)) if path else "new"
        scorer = Scorer(base, file_fingerprint(adapter) if adapter else "")
    return open_pairs(
        paths,
        settings[DataFlags],
        tokenizer,
        longest=settings[PairFlags].rlhf_max_corpus_len,
        singles=objective == "kto",
        scorer=None if objective == "kto" else scorer,
        live=live,
    )


def is_own_reference(settings: Settings, layers: "Plan") -> bool:
    """Whether the model with its adapters off is the model that the run starts from."""
    full = any(
        plan.mode == "full" and layers.layers[n].parameters for n, plan in layers.plans.items()
    )
    return not (full or settings[StateFlags].state or settings[PeftFlags].load_adapter)


def open_scores(settings: Settings, paths: str, tokenizer: "Tokenizer") -> "TeacherStore":
    """Records with a teacher's scores.

    Raises:
        InputError: the files are wrong, or lack what the divergence needs.
    """
    from data.teacher_store import Wanted, open_teacher
    from losses.distill import RENORMALIZED

    flags = settings[DistillationFlags]
    wanted = Wanted(flags.top_k, flags.temperature, flags.kd_loss not in RENORMALIZED)
    return open_teacher(paths, settings[DataFlags].cache_dir, tokenizer, wanted)


def load_teacher(settings: Settings, config: "RWKVConfig", device: Device) -> "RWKV | None":
    """The model of --teacher_model, frozen, or None without one.

    Raises:
        InputError: the file is wrong, or its vocabulary is not the student's.
    """
    from peft.apply import load_frozen

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


def plan_batches(settings: Settings, store: Any, *, training: bool = True) -> "BatchPlan":
    """The batches of a store; held-out ones keep their order and take one step each."""
    from data.batch_plan import BatchPlan

    trainer, data = settings[TrainerFlags], settings[DataFlags]
    return BatchPlan(
        store,
        ctx_len=data.ctx_len,
        micro_bsz=trainer.micro_bsz,
        accumulate=trainer.accumulate_grad_batches if training else 1,
        world=trainer.devices * trainer.num_nodes,
        seed=trainer.random_seed,
        packing=data.packing,
        shuffle=training and bool(data.random_mode),
        overlong=data.overlong,
    )


def choose_device(settings: Settings) -> Device:
    """The device and dtype of a run; a dry run is content with a CPU in a GPU's place."""
    from dataclasses import replace

    from rwkv.training.strategy import chosen_device, chosen_dtype

    flags = settings[TrainerFlags]
    if flags.dry_run:
        flags = replace(flags, accelerator="auto", devices=1)
    kind = chosen_device(flags)
    return Device(kind, chosen_dtype(flags, kind))


def count_steps(flags: TrainerFlags, plan: "BatchPlan") -> Steps:
    """The optimizer steps of a run and where its epochs end.

    An epoch is --epoch_steps micro-batches of a device, rounded up to whole optimizer steps, or
    one pass over the data.
    """
    if flags.epoch_steps:
        ends = [
            -(-flags.epoch_steps * (epoch + 1) // plan.accumulate)
            for epoch in range(flags.epoch_count)
        ]
    else:
        ends = [plan.steps_per_pass * (epoch + 1) for epoch in range(flags.epoch_count)]
    every, last = max(flags.epoch_save, 1), flags.epoch_count - 1
    saved = [e for e in range(flags.epoch_count) if (e + 1) % every == 0 or e == last]
    return Steps(ends[-1], {ends[e]: flags.epoch_begin + e for e in saved})


def describe(
    settings: Settings,
    config: "RWKVConfig",
    layers: "Plan",
    plan: "BatchPlan",
    steps: Steps,
    device: Device,
) -> Iterable[str]:
    """The plan of a run: model, kernel, what trains, data and steps."""
    from peft.plan import describe as describe_layers
    from peft.tuned_state import describe_state
    from rwkv.ops.backends import describe_choice

    data, trainer = settings[DataFlags], settings[TrainerFlags]
    dtype = str(device.dtype).removeprefix("torch.")
    yield (
        f"model: {config.name}, head size {config.head_size}, vocabulary {config.vocab_size:,}, "
        f"{dtype} on {device.kind}"
    )
    yield describe_choice(
        f"wkv{config.version}",
        (1, plan.micro_bsz * data.ctx_len, config.n_head, config.head_size),
        device=device.kind,
        dtype=device.dtype,
        packed=plan.packing,
        backend=settings[ModelFlags].backend,
    )
    yield from describe_layers(layers, device.dtype)
    if settings[StateFlags].state:
        yield describe_state(config)
    report = ", ".join(f"{name} {count:,}" for name, count in plan.pieces.report.items() if count)
    yield f"data: {report}"
    yield (
        f"rows: {plan.rows_per_pass:,} of {plan.pieces.room:,} tokens, {plan.fill:.0%} full; "
        f"{plan.rows_per_step} a step"
    )
    yield (
        f"run: {steps.total:,} steps, {steps.total / plan.steps_per_pass:.2f} passes over the "
        f"data, strategy {trainer.strategy}, into {trainer.proj_dir}"
    )


def build(settings: Settings, config: "RWKVConfig", device: Device) -> tuple["RWKV", "Plan", str]:
    """The model with its stores and adapters in place, the plan, and the base's fingerprint."""
    from peft.adapter_file import load_adapter
    from peft.apply import load_with_profile, new_with_profile
    from peft.tuned_state import add_tuned_state
    from rwkv.checkpoint import fingerprint, read_tensors

    flags, peft = settings[ModelFlags], settings[PeftFlags]
    if flags.load_model:
        base = fingerprint(read_tensors(flags.load_model))
        model, plan = load_with_profile(
            flags.load_model, peft, device=device.kind, dtype=device.dtype, backend=flags.backend
        )
    else:
        seed = settings[TrainerFlags].random_seed
        base = f"new, seed {seed}"
        model, plan = new_with_profile(
            config, peft, device=device.kind, dtype=device.dtype, backend=flags.backend, seed=seed
        )
    if settings[StateFlags].state:
        add_tuned_state(model)
    if peft.load_adapter:
        load_adapter(model, peft.load_adapter, base=base)
    model.grad_cp = settings[TrainerFlags].grad_cp
    return model, plan, base


def fit(
    settings: Settings,
    config: "RWKVConfig",
    batches: Batches,
    steps: Steps,
    device: Device,
    tokenizer: "Tokenizer",
) -> int:
    """Train; returns 0, or 128 plus the number of the signal that stopped the run."""
    from dataclasses import replace

    import pytorch_lightning as pl

    from data.datasets import make_loader
    from peft.adapter import adapters_off
    from peft.adapter_file import adapter_metadata, trained_tensors
    from peft.groups import parameter_groups
    from peft.plan import trained_count
    from rwkv.training import resume
    from rwkv.training.lit import LitModel, quiet_lightning
    from rwkv.training.saving import Saving
    from rwkv.training.schedule import Schedule
    from rwkv.training.step_log import RunLog, StepLog, draw_loss
    from rwkv.training.strategy import make_strategy

    quiet_lightning()
    flags, data = settings[TrainerFlags], settings[DataFlags]
    optimizer, evaluation = settings[OptimizerFlags], settings[EvaluationFlags]
    folder, plan = Path(flags.proj_dir), batches.training
    point = resume.newest(folder)
    if point is not None and not flags.resume:
        raise InputError(
            f"--proj_dir {folder}: already holds a run ({point.name.replace('-', ' ')}); "
            "add --resume 1 to go on with it, or choose another folder"
        )
    strategy = make_strategy(flags, device.dtype, device.kind)
    objective: Any = make_objective(settings, load_teacher(settings, config, device))
    pl.seed_everything(flags.random_seed, workers=True, verbose=False)  # new adapters are random
    model, layers, base = build(settings, config, device)
    if chosen_objective(settings) in REFERENCED and plan.pieces.store.reference is None:
        objective = replace(objective, reference=adapters_off)
    run = {
        "base model": base,
        "data": plan.pieces.store.fingerprint,
        "rows of a step": plan.rows_per_step,
        "ctx_len": data.ctx_len,
        "packing": data.packing,
        "random_seed": flags.random_seed,
        "steps": steps.total,
        "trained parameters": trained_count(layers),
        "tuned state": settings[StateFlags].state,
    }
    first = 0
    if point is not None:
        first = resume.check_same_run(point, run)
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
    )
    loggers = make_loggers(settings, folder)
    log = StepLog(
        RunLog(folder),
        Schedule(optimizer.lr_schedule, steps.total, optimizer.warmup_steps),
        every=evaluation.log_every,
        step_tokens=plan.rows_per_step * plan.pieces.room,
        loggers=loggers,
    )
    saving = Saving(
        folder,
        epochs=steps.epochs,
        every=flags.resume_every,
        tensors=lambda: trained_tensors(model),
        metadata=adapter_metadata(model, layers, base=base, flags=settings.as_flags()),
        run=run,
        step_log=log,
    )
    callbacks: list[Any] = [log]
    if batches.held_out is not None:
        callbacks.append(
            make_evaluation(settings, objective, batches.held_out, steps, log, tokenizer)
        )
    callbacks.append(saving)
    if point is not None:
        callbacks.insert(0, resume.Resume(point))
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
        resume.clear_leftovers(folder)
    pl.seed_everything(flags.random_seed + trainer.global_rank, workers=True, verbose=False)
    trainer.fit(lit)
    if not trainer.is_global_zero:
        return 0
    picture = folder / "loss.png"
    written = saving.written + [picture] * draw_loss(folder / "train_log.jsonl", picture)
    done = lit.steps_done
    if saving.stopped_by is not None:
        say(f"stopped at step {done} of {steps.total}; go on with the same flags and --resume 1")
        return 128 + saving.stopped_by
    say(f"done: {done} steps; written: {', '.join(map(str, written))}")
    return 0


def make_evaluation(
    settings: Settings,
    objective: Any,
    held_out: "BatchPlan",
    steps: Steps,
    log: "StepLog",
    tokenizer: "Tokenizer",
) -> Any:
    """The callback that measures the held-out loss and shows samples."""
    from data.datasets import make_loader
    from rwkv.training.evaluation import Evaluation

    every = settings[EvaluationFlags].val_every
    return Evaluation(
        batches=lambda rank: make_loader(held_out, rank, 0, held_out.steps_per_pass),
        objective=objective,
        sample=make_sampler(settings, tokenizer),
        steps=lambda step: step in steps.epochs or bool(every and step % every == 0),
        step_log=log,
    )


def make_loggers(settings: Settings, folder: Path) -> list[Any]:
    """Lightning's loggers beside train_log.jsonl: TensorBoard and Weights & Biases."""
    import importlib.util

    flags = settings[EvaluationFlags]
    loggers: list[Any] = []
    if flags.tensorboard:
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


def make_sampler(
    settings: Settings, tokenizer: "Tokenizer"
) -> Callable[["RWKV"], list[str]] | None:
    """What shows the model's answers to --val_prompts at each evaluation."""
    flags = settings[EvaluationFlags]
    if not flags.val_prompts:
        return None
    from rwkv.generate import generate
    from rwkv.sampling_flags import Sampling
    from rwkv.templates import prompt_tokens

    lines = Path(flags.val_prompts).read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line.strip()]
    tokens = [prompt_tokens(line, settings[DataFlags], tokenizer) for line in prompts]

    def sample(model: "RWKV") -> list[str]:
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


def say(text: str) -> None:
    """Report to the person who started the run; of several processes the first one speaks."""
    launched = {os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK")}
    if launched == {"0"}:
        print(text, file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    sys.exit(cli.run(main))
