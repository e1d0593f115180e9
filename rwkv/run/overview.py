"""What a run is going to do: its steps, and the lines printed before it begins."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from data.batch_plan import BatchPlan
from peft.flags import StateFlags
from peft.groups import unheard_rates
from peft.plan import Plan
from peft.plan import describe as describe_layers
from peft.tuned_state import describe_prefix, describe_state
from rwkv.config import RWKVConfig
from rwkv.errors import RunError
from rwkv.flags import Settings
from rwkv.ops.backends import describe_choice
from rwkv.run.batches import Batches
from rwkv.run.graphs import uses_graphs
from rwkv.run.kernel import wkv_choice
from rwkv.run.models import Device
from rwkv.tokenizer import Tokenizer
from rwkv.training.flags import OptimizerFlags, TrainerFlags


class Steps(NamedTuple):
    """The run in optimizer steps.

    total: steps of the run.
    epochs: step -> number of the epoch that ends there and is saved.
    """

    total: int
    epochs: dict[int, int]


def count_steps(flags: TrainerFlags, plan: BatchPlan) -> Steps:
    """The optimizer steps of a run and where its epochs end.

    An epoch is --epoch_steps micro-batches of a device, rounded up to whole optimizer steps, or
    one pass over the data. Of epochs that end with the same step the last is saved.
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


class Run(NamedTuple):
    """All that is known of a run before its model is loaded."""

    settings: Settings
    config: RWKVConfig
    layers: Plan
    batches: Batches
    steps: Steps
    device: Device
    tokenizer: Tokenizer


def describe(run: Run) -> Iterable[str]:
    """The plan of a run: model, kernel, what trains, data and steps.

    Raises:
        RunError: the kernel asked for cannot run here, and the run is no dry one.
    """
    settings, config, layers, batches, steps, device, _ = run
    plan = batches.training
    trainer = settings[TrainerFlags]
    dtype = str(device.dtype).removeprefix("torch.")
    yield (
        f"model: {config.name}, head size {config.head_size}, vocabulary {config.vocab_size:,}, "
        f"{dtype} on {device.kind}"
    )
    try:
        yield describe_choice(f"wkv{config.version}", wkv_choice(run))
    except RunError as error:
        if not trainer.dry_run:  # which may plan for another machine
            raise
        yield str(error)
    yield from describe_layers(layers, device.dtype)
    start = settings[StateFlags]
    tuned = start.state or bool(start.prefix_tuning)
    yield from unheard_rates(layers, settings[OptimizerFlags], tuned_state=tuned)
    if start.state:
        yield describe_state(config)
    if start.prefix_tuning:
        yield describe_prefix(config, start.prefix_token_len)
    yield f"data: {counts_in_words(plan.pieces.report)}"
    yield (
        f"rows: {plan.rows_per_pass:,} of {plan.pieces.room:,} tokens, {plan.fill:.0%} full; "
        f"{plan.rows_per_step} a step"
    )
    saved = -(-trainer.epoch_count // max(trainer.epoch_save, 1))
    if saved > len(steps.epochs):
        yield (
            f"--epoch_steps {trainer.epoch_steps}: epochs end within steps of "
            f"--accumulate_grad_batches {plan.accumulate}; of {saved} models {len(steps.epochs)} "
            "will be written, the last of each step"
        )
    if uses_graphs(run):
        yield "launches: a micro-batch is one CUDA graph (--cuda_graphs 0 for kernel by kernel)"
    warmup = settings[OptimizerFlags].warmup_steps
    if steps.total <= warmup:
        yield f"--warmup_steps {warmup}: the run ends within them, below --lr_init"
    yield (
        f"run: {steps.total:,} steps, {steps.total / plan.steps_per_pass:.2f} passes over the "
        f"data, strategy {trainer.strategy}, into {trainer.proj_dir}"
    )


def counts_in_words(report: Mapping[str, int]) -> str:
    """What was split, cut or left out, as `records 50, split 3`."""
    return ", ".join(f"{name} {count:,}" for name, count in report.items() if count)
