"""The smallest change of a run's flags that fits a given memory."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from peft.flags import QUANT_ALIASES
from peft.memory import Prediction, Step, in_words, predict
from peft.plan import ENDS, Plan, stored_bytes, trained_sizes
from rwkv.config import RWKVConfig
from rwkv.errors import InputError

LEAST = 2**20
UNITS = {"": 1, "B": 1, "MB": 2**20, "MIB": 2**20, "GB": 2**30, "GIB": 2**30, "G": 2**30}
CHUNKS = (2048, 1024, 512, 256)
STORAGES = ("fp8", "fp6", "fp5", "nf4")  # from the nearest to the weight to the smallest
LEAST_RANK = 8
OFFLOAD = "--grad_cp_offload 1"
RANK = "a rank of {}"  # no flag: the profile says it


class Choice(NamedTuple):
    """A run that differs from the asked one by `words`."""

    words: tuple[str, ...]
    plan: Plan
    step: Step


Change = Callable[[Choice], Iterator[Choice]]


def read_size(text: str) -> int:
    """Bytes from words such as 24GB; cards are sold in GiB that are called GB.

    Raises:
        InputError: it is no size, or one below 1 MiB, as of a number without its unit.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    size = int(float(found[1]) * UNITS.get(found[2].upper(), 0)) if found else 0
    if size < LEAST:
        raise InputError(f"--memory {text}: is no size; write 24GB, say")
    return size


def fewer_rows(run: Choice) -> Iterator[Choice]:
    """--micro_bsz halved again and again."""
    rows = run.step.rows // 2
    while rows:
        yield _changed(run, f"--micro_bsz {rows}", step=replace(run.step, rows=rows))
        rows //= 2


def recomputation(run: Choice) -> Iterator[Choice]:
    """--grad_cp selective, which costs less time than --grad_cp 1, and that."""
    if not run.step.grad_cp and run.step.stage != 3:
        yield _changed(run, "--grad_cp selective", step=replace(run.step, grad_cp="selective"))
    if run.step.grad_cp is not True:
        words = "--grad_cp 1" + (" --grad_cp_memory 0" if run.step.kept_limit else "")
        yield _changed(run, words, step=replace(run.step, grad_cp=True, kept_limit=0))


def host_memory(run: Choice) -> Iterator[Choice]:
    """--grad_cp_offload 1, of a GPU: a CPU's memory is the host's."""
    if not run.step.on_gpu:
        return
    if run.step.grad_cp is True and not run.step.chunk and not run.step.host_blocks:
        yield _changed(run, OFFLOAD, step=replace(run.step, host_blocks=True))


def chunks(run: Choice) -> Iterator[Choice]:
    """--infctx with chunks of fewer tokens, in place of --grad_cp_offload."""
    asked = run.step.host_blocks and OFFLOAD not in run.words
    step = replace(run.step, host_blocks=False)
    run = Choice(tuple(words for words in run.words if words != OFFLOAD), run.plan, step)
    for chunk in CHUNKS:
        if chunk < min(run.step.ctx_len, run.step.chunk or run.step.ctx_len):
            words = "--grad_cp_offload 0 " * asked + f"--infctx 1 --chunk_ctx {chunk}"
            yield _changed(run, words, step=replace(run.step, chunk=chunk))


def half_precision(run: Choice) -> Iterator[Choice]:
    """--precision bf16, where a run is in float32, as it is on a CPU."""
    if run.step.dtype == torch.float32:
        yield _changed(run, "--precision bf16", step=replace(run.step, dtype=torch.bfloat16))


def fewer_bits(run: Choice) -> Iterator[Choice]:
    """Layers whose storage the flags decide in a smaller one."""
    for kind in STORAGES:
        flags = replace(run.plan.flags, quant=True, quant_mode=kind)
        names = {n for n in run.plan.open_storage if flags.quant_head or n not in ENDS}
        plan = _stored(replace(run.plan, flags=flags), names, kind)
        if _weights(plan, run) < _weights(run.plan, run):
            yield _changed(run, f"--quant 1 --quant_mode {kind}", plan=plan)


def stored_ends(run: Choice) -> Iterator[Choice]:
    """--quant_head 1 beside --quant 1: the head and the embedding in few bits too."""
    flags = run.plan.flags
    if flags.quant and not flags.quant_head:
        kind = QUANT_ALIASES.get(flags.quant_mode, flags.quant_mode)
        plan = replace(run.plan, flags=replace(flags, quant_head=True))
        plan = _stored(plan, run.plan.open_storage & set(ENDS), kind)
        if _weights(plan, run) < _weights(run.plan, run):
            yield _changed(run, "--quant_head 1", plan=plan)


def smaller_optimizer(run: Choice) -> Iterator[Choice]:
    """--optim AdamW8bit, which DeepSpeed has not."""
    if run.step.optim.lower() in ("", "adamw") and not run.step.stage:
        yield _changed(run, "--optim AdamW8bit", step=replace(run.step, optim="AdamW8bit"))


def adapters_alone(run: Choice) -> Iterator[Choice]:
    """--limited_lora 1: no small layers beside the adapters."""
    plans = {
        name: replace(mine, mode="freeze") if name in run.plan.beside else mine
        for name, mine in run.plan.plans.items()
    }
    if plans != run.plan.plans:
        yield _changed(run, "--limited_lora 1", plan=replace(run.plan, plans=plans))


def lower_rank(run: Choice) -> Iterator[Choice]:
    """Adapters of half the rank, and half of that."""
    most = max(mine.rank for mine in run.plan.plans.values())
    while most >= 2 * LEAST_RANK:
        most //= 2
        plans = {
            name: replace(mine, rank=min(mine.rank, most)) for name, mine in run.plan.plans.items()
        }
        plan = replace(run.plan, plans=plans)
        with contextlib.suppress(InputError):  # Bone's ranks divide both sides of a weight
            for name in plan.layers:
                trained_sizes(plan, name)
            yield _changed(run, RANK.format(most), plan=plan)


CHANGES: tuple[Change, ...] = (
    fewer_rows,
    recomputation,
    host_memory,
    chunks,
    half_precision,
    fewer_bits,
    stored_ends,
    smaller_optimizer,
    adapters_alone,
    lower_rank,
)


def what_fits(config: RWKVConfig, plan: Plan, step: Step, memory: int) -> str:
    """One line: that the run fits, or the first change, two or more of them, with which it would.

    Args:
        config, plan, step: of the run.
        memory: bytes of the device.
    """
    asked = in_words(memory)
    run = Choice((), plan, step)
    found = _predicted(config, run)
    if found.needed <= memory:
        return f"fits {asked}: needs {in_words(found.needed)}"
    for change in CHANGES:
        for other in change(run):
            if _predicted(config, other).needed <= memory:
                return f"does not fit {asked}; {_told(config, other)}"
    for number, change in enumerate(CHANGES):
        for first in change(run):
            for second in CHANGES[number + 1 :]:
                for other in second(first):
                    if _predicted(config, other).needed <= memory:
                        return f"does not fit {asked}; {_told(config, other)}"
    for change in CHANGES:
        for other in list(change(run)):
            if _predicted(config, other).needed < _predicted(config, run).needed:
                run = other
            if _predicted(config, run).needed <= memory:
                return f"does not fit {asked}; {_told(config, run)}"
    least = _predicted(config, run).needed
    mend = "spread it with --devices and --strategy deepspeed_stage_3"
    if not step.on_gpu:
        mend = "take a smaller model, or a GPU"
    return (
        f"does not fit {asked} by any of these changes: {_written(run)} would need "
        f"{in_words(least)}; {mend}"
    )


def _changed(
    run: Choice, words: str, *, plan: Plan | None = None, step: Step | None = None
) -> Choice:
    return Choice((*run.words, words), plan or run.plan, step or run.step)


def _stored(plan: Plan, names: Iterable[str], kind: str) -> Plan:
    """The plan with these layers in another storage."""
    plans = plan.plans | {name: replace(plan.plans[name], quant=kind) for name in names}
    return replace(plan, plans=plans)


def _weights(plan: Plan, run: Choice) -> int:
    """Bytes of all weights in the run's dtype."""
    return sum(stored_bytes(plan, run.step.dtype).values())


def _written(run: Choice) -> str:
    """What differs: flags as on a command line, and what is no flag."""
    flags = [words for words in run.words if words.startswith("--")]
    others = [words for words in run.words if not words.startswith("--")]
    return " and ".join([" ".join(flags), *others] if flags else others)


def _predicted(config: RWKVConfig, run: Choice) -> Prediction:
    return predict(config, run.plan, run.step)


def _told(config: RWKVConfig, run: Choice) -> str:
    needed = _predicted(config, run).needed
    return f"fits with {_written(run)}: {in_words(needed)}"
