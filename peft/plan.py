"""From a profile and flags to what happens to every layer of one model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from peft.flags import QUANT_ALIASES, PeftFlags
from peft.layer_profile import ADAPTER_MODES, LayerPlan, Rule, plans_of, read_profile
from peft.registry import ADAPTERS, LOW_RANK
from rwkv.errors import InputError
from rwkv.linear import Embedding, Linear

ENDS = ("emb", "head")  # stored in few bits only where it is said
STATE = "time_state"
PREFIX = "prefix"
STORED = ("linear", "embedding")  # kinds of layers that may be stored in few bits


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    kind: linear, embedding, small (norms and all other parameters), or state (the place of a
        tuned state, whether there is one or not).
    parameters: shape of each parameter by its full name.
    """

    kind: str
    parameters: dict[str, tuple[int, ...]]

    @property
    def shape(self) -> tuple[int, int]:
        """Of a linear layer's or an embedding's weight, [out, in]."""
        (shape,) = self.parameters.values()
        return shape[0], shape[1]


@dataclass(frozen=True)
class Plan:
    """What happens to every layer of a model.

    layers: the model's layers, by name, as they were before.
    plans: the plan of each, with nothing left to flags: mode is an adapter only for linear
        layers, quant is "none" or, for these and the embedding, a key of STORES.
    flags: what else the user chose.
    open_storage: layers whose storage the flags decide; that of ENDS is up to --quant_head too.
    beside: small layers that train because adapters do.
    notes: a line for each thing that was asked for and cannot be.
    """

    layers: dict[str, Layer]
    plans: dict[str, LayerPlan]
    flags: PeftFlags
    open_storage: frozenset[str] = frozenset()
    beside: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    def trains(self, name: str) -> bool:
        """Whether the layer's own parameters (not an adapter's) train."""
        return self.plans[name].mode == "full" or self.layers[name].kind == "state"


def model_layers(model: nn.Module) -> dict[str, Layer]:
    """The layers of a model without adapters, in the model's order; it may be on meta."""
    layers: dict[str, Layer] = {}
    for module_name, module in model.named_modules():
        direct = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        whole = isinstance(module, Linear | Embedding | nn.LayerNorm | nn.GroupNorm)
        if whole:
            kind = {Linear: "linear", Embedding: "embedding"}.get(type(module), "small")
            named = {f"{module_name}.{name}": shape for name, shape in direct.items()}
            layers[module_name] = Layer(kind, named)
            continue
        for name, shape in direct.items():
            if name != STATE:
                full = f"{module_name}.{name}"
                layers[full] = Layer("small", {full: shape})
        if module_name.endswith(".att"):
            layers[f"{module_name}.{STATE}"] = Layer("state", {})
    return layers


def make_plan(
    model: nn.Module, flags: PeftFlags, quantized: Mapping[str, str] | None = None
) -> Plan:
    """Read the profile for this model; without one every layer trains in full.

    Args:
        model: without adapters; parameters may be on the meta device.
        flags: the profile's path, and what holds where it says nothing.
        quantized: storage of the layers that the model's file holds in fewer bits already; it
            outweighs profile and flags.

    Raises:
        InputError: the profile does not suit the model; the message names file, rule and layer.
    """
    layers = model_layers(model)
    rules: list[Rule] = []
    if flags.layer_profile:
        rules = read_profile(flags.layer_profile, list(layers))
        plans = plans_of(rules, list(layers))
    else:
        plans = dict.fromkeys(layers, LayerPlan(mode="full", rule="without --layer_profile"))
    resolved = {name: _resolve(name, layers[name], plans[name], flags) for name in layers}
    open_storage = frozenset(
        name
        for name, layer in layers.items()
        if layer.kind in STORED
        and plans[name].quant is None
        and resolved[name].mode != "full"
        and name not in (quantized or {})
    )
    beside = frozenset(
        name
        for name, layer in layers.items()
        if layer.kind == "small" and resolved[name].mode == "full" and plans[name].mode != "full"
    )
    for name, kind in (quantized or {}).items():
        mode = resolved[name].mode
        if mode in ("full", "pissa"):
            raise InputError(
                f"{resolved[name].rule}: {name} cannot be {mode!r}: the model file holds it as "
                f"{kind}; choose freeze or another adapter, or load the model it was made from"
            )
        resolved[name] = replace(resolved[name], quant=kind)
    plan = Plan(layers, resolved, flags, open_storage, beside)
    return replace(plan, notes=tuple(_unheard(plan, rules, plans, quantized or {})))


def _unheard(
    plan: Plan,
    rules: Sequence[Rule],
    plans: Mapping[str, LayerPlan],
    quantized: Mapping[str, str],
) -> Iterator[str]:
    """What rules and flags say without effect.

    Args:
        plan: what holds.
        rules, plans: of the profile.
        quantized: as for `make_plan`.

    Raises:
        InputError: a rule stores what cannot be stored, and nothing else.
    """
    names = list(plan.layers)
    for rule in rules:
        kind = rule.changes.get("quant")
        able = [name for name in names if plan.layers[name].kind in STORED] if kind else []
        hit = rule.hits(names)
        told = [name for name in able if name in hit]
        if kind not in (None, "none") and hit and not told:
            raise InputError(
                f"{rule.where}: quant {kind!r} is for linear layers and emb, {min(hit)} is none of "
                "them; drop 'quant'"
            )
        where = f"{rule.where}: quant {kind!r}"
        if kind != "none" and told and all(plan.plans[name].mode == "full" for name in told):
            yield f"{where}: has no effect, for {_some(told)} trains in full"
        yield from _held(where, [n for n in told if plans[n].quant == kind], str(kind), quantized)
    flags, modes = plan.flags, {mine.mode for mine in plan.plans.values()}
    if not flags.layer_profile:
        return
    for name, wanted, what in (
        ("limited_lora", ADAPTERS.keys(), "an adapter"),
        ("rslora", LOW_RANK, "LoRA"),
        ("lora_plus_ratio", LOW_RANK, "LoRA"),
        ("svd_niter", {"pissa"}, "PiSSA"),
    ):
        value = getattr(flags, name)
        if value != getattr(PeftFlags, name) and not modes & wanted:
            yield f"--{name} {value:g}: has no effect, for no layer has {what}"
    if not flags.quant:
        return
    kind = QUANT_ALIASES.get(flags.quant_mode, flags.quant_mode)
    open_to = [
        n for n in quantized if plans[n].quant is None and (n not in ENDS or flags.quant_head)
    ]
    yield from _held(f"--quant 1 --quant_mode {kind}", open_to, kind, quantized)
    if not quantized and not plan.open_storage:
        yield (
            "--quant 1: has no effect, for every linear layer trains in full or has its storage "
            "from a rule"
        )


def _held(
    where: str, names: Sequence[str], kind: str, quantized: Mapping[str, str]
) -> Iterator[str]:
    """A line for each other storage in which a model's file holds some of the layers."""
    for held in sorted({quantized[name] for name in names if name in quantized} - {kind}):
        those = [name for name in names if quantized.get(name) == held]
        yield f"{where}: has no effect on {_some(those)}, which the model's file holds as {held}"


def _some(names: Sequence[str]) -> str:
    """`head`, or `blocks.0.att.key and 11 more`."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _resolve(name: str, layer: Layer, plan: LayerPlan, flags: PeftFlags) -> LayerPlan:
    adapts = plan.mode in ADAPTER_MODES
    if layer.kind not in STORED:
        small = layer.kind == "small" and plan.train_small and not flags.limited_lora
        mode = "full" if plan.mode == "full" or (adapts and small) else "freeze"
        return replace(plan, mode=mode, rank=0, alpha=None, dropout=0.0, quant="none")
    if layer.kind == "embedding":
        adapts, plan = False, plan if plan.mode == "full" else replace(plan, mode="freeze")
    quant = plan.quant
    if quant is None:
        wanted = flags.quant and (flags.quant_head or name not in ENDS)
        quant = QUANT_ALIASES.get(flags.quant_mode, flags.quant_mode) if wanted else "none"
    if not adapts:
        quant = "none" if plan.mode == "full" else quant
        return replace(plan, rank=0, alpha=None, dropout=0.0, quant=quant)
    if not plan.rank:
        raise InputError(f"{plan.rule}: mode {plan.mode!r} needs a rank for {name}; add 'rank'")
    try:
        ADAPTERS[plan.mode].check_new(*layer.shape, plan.rank)
    except InputError as error:
        raise InputError(f"{plan.rule}: {name}: {error}") from None
    if plan.mode in ("bone", "miss"):
        return replace(plan, alpha=None, dropout=0.0, quant=quant)
    alpha = 2.0 * plan.rank if plan.alpha is None else plan.alpha
    return replace(plan, alpha=alpha, quant=quant)


def trained_sizes(plan: Plan, name: str) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter that trains in a layer, by its full name."""
    layer, mine = plan.layers[name], plan.plans[name]
    if mine.mode in ADAPTERS:
        parts = ADAPTERS[mine.mode].sizes(*layer.shape, mine.rank)
        return {f"{name}.{part}": shape for part, shape in parts.items()}
    return layer.parameters if plan.trains(name) else {}


def trained_count(plan: Plan) -> int:
    """How many numbers train, without a tuned state."""
    sizes = (shape for name in plan.layers for shape in trained_sizes(plan, name).values())
    return sum(torch.Size(shape).numel() for shape in sizes)


def stored_bytes(plan: Plan, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the model's weights by storage, adapters included under the dtype's name.

    Args:
        plan: the plan.
        dtype: of what is not quantized.
    """
    from peft.stores import stored_size

    plain = str(dtype).removeprefix("torch.")
    total: dict[str, int] = {}
    for name, layer in plan.layers.items():
        quant = plan.plans[name].quant or "none"
        numbers = [torch.Size(shape).numel() for shape in trained_sizes(plan, name).values()]
        if quant != "none":
            size = stored_size(quant, *layer.shape)
            total[quant] = total.get(quant, 0) + size
        elif not plan.trains(name):
            numbers += [torch.Size(shape).numel() for shape in layer.parameters.values()]
        total[plain] = total.get(plain, 0) + sum(numbers) * dtype.itemsize
    return total


def describe(plan: Plan, dtype: torch.dtype) -> list[str]:
    """The plan as a table: a line for each group of layers with one plan, the sums, the notes.

    Args:
        plan: the plan.
        dtype: of what is not quantized.
    """
    groups: dict[LayerPlan, list[str]] = {}
    for name in plan.layers:
        if plan.layers[name].kind != "state":
            groups.setdefault(_shown(plan, name), []).append(name)
    rows = [("mode", "rank", "alpha", "storage", "lr", "trained", "layers")]
    for shown, names in groups.items():
        count = sum(
            torch.Size(shape).numel()
            for name in names
            for shape in trained_sizes(plan, name).values()
        )
        trained = shown.mode != "freeze"
        rows.append(
            (
                shown.mode,
                str(shown.rank) if shown.rank else "-",
                f"{shown.alpha:g}" if shown.alpha is not None else "-",
                "-" if shown.quant == "none" else str(shown.quant),
                _rates(shown) if trained else "-",
                f"{count:,}" if count else "-",
                ", ".join(_folded(_gathered(plan, names))),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    sums = ", ".join(f"{k} {v / 1e6:,.1f} MB" for k, v in stored_bytes(plan, dtype).items())
    total = sum(
        torch.Size(shape).numel()
        for layer in plan.layers.values()
        for shape in layer.parameters.values()
    )
    return [
        *lines,
        f"{trained_count(plan):,} parameters train beside {total:,} of the base; {sums}",
        *plan.notes,
    ]


def _shown(plan: Plan, name: str) -> LayerPlan:
    """The part of a layer's plan that its line shows, so that equal lines are one."""
    mine = plan.plans[name]
    blank = LayerPlan(mode=mine.mode, rank=mine.rank, alpha=mine.alpha, quant=mine.quant)
    if mine.mode == "freeze":
        return blank
    return replace(blank, lr_init=mine.lr_init, lr_final=mine.lr_final)


def _rates(plan: LayerPlan) -> str:
    first, last = plan.lr_init, plan.lr_final
    if first is None and last is None:
        return "flags"
    return " to ".join("flags" if rate is None else f"{rate:g}" for rate in (first, last))


def _gathered(plan: Plan, names: list[str]) -> list[str]:
    """The names, with `small` for all the small layers of a block if they are all there."""
    small: dict[str, set[str]] = {}
    for name, layer in plan.layers.items():
        if layer.kind == "small" and name.startswith("blocks.") and not name.endswith(".ln0"):
            small.setdefault(".".join(name.split(".")[:2]), set()).add(name)
    whole = {block: members for block, members in small.items() if members <= set(names)}
    inside = {name for members in whole.values() for name in members}
    return [f"{block}.small" for block in whole] + [n for n in names if n not in inside]


def _folded(names: list[str]) -> Iterator[str]:
    """Layer names with the blocks they share: `blocks 0-11 att.key att.value`, `head`."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        if not name.startswith("blocks."):
            yield name
            continue
        _, block, rest = name.split(".", 2)
        blocks.setdefault(rest, []).append(int(block))
    same: dict[tuple[int, ...], list[str]] = {}
    for rest, numbers in blocks.items():
        same.setdefault(tuple(numbers), []).append(rest)
    for shared, rests in same.items():
        yield f"blocks {_ranges(shared)} {' '.join(rests)}"


def _ranges(numbers: tuple[int, ...]) -> str:
    """`0-11`, or `0,4-7`."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], n]
        else:
            parts.append([n])
    return ",".join("-".join(map(str, part)) for part in parts)
