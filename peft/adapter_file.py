"""Adapter files: the tensors that trained, under RWKV-LM-RLHF's names, and what they are.

The tensors alone do not say alpha, so a `.json` beside the file holds the kind, rank and alpha of
each layer and which base the adapter belongs to. Files of RWKV-LM-RLHF lack it: their kind and
rank are read from the shapes, alpha has to be given.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft.adapter import AdapterLinear
from peft.layer_profile import LayerPlan
from peft.lora import LoraLinear, lora_scale
from peft.plan import PREFIX, STATE, Plan, trained_sizes
from peft.registry import ADAPTERS, LOW_RANK
from rwkv.checkpoint import TensorFile, check_finite, config_of, read_metadata, read_tensors
from rwkv.errors import InputError
from rwkv.model import RWKV
from rwkv.names import ROOT

PARTS = frozenset(part for cls in ADAPTERS.values() for part in cls.PARTS)
FOREIGN = {  # fragments of RWKV-LM-RLHF's names that this project does not train
    "expert": "mixture-of-experts adapters",
    "router": "mixture-of-experts adapters",
    "moe_info": "mixture-of-experts adapters",
    "init_lora": "the first values of PiSSA in a file of their own",
    "time_offset": "offsets behind the wkv operator",
}


@dataclass(frozen=True)
class AdapterKind:
    """The adapter of one layer in a file: `scale` is alpha / rank, 1 where there is none."""

    mode: str
    rank: int
    scale: float = 1.0


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All that trains, as an adapter file holds it: `blocks.0.att.key.lora_A`, `blocks.0.ln1.bias`.

    Trained layers are whole tensors under their own names, and so is a tuned state.
    """
    adapters = {n: m for n, m in model.named_modules() if isinstance(m, AdapterLinear)}
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner, _, part = name.rpartition(".")
        if owner in adapters and part in adapters[owner].PARTS:
            tensors[name] = adapters[owner].exported()[part].detach()
        else:
            tensors[name] = parameter.detach()
    return tensors


def adapter_metadata(
    model: nn.Module, plan: Plan, *, base: str, flags: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What the `.json` beside a file of trained tensors says: an adapter, or a whole model.

    Args:
        model: with its adapters.
        plan: as `apply_profile` gave it.
        base: fingerprint of the base model's file.
        flags: every flag of the run.
    """
    whole = all(p.requires_grad for p in model.parameters())
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, AdapterLinear):
            exported = {part: list(t.shape) for part, t in module.exported().items()}
            layers[name] = _layer_metadata(module, exported, plan.plans[name])
    return {
        "kind": "model" if whole and not layers else "adapter",
        "project": project_version(),
        "base": base,
        "profile": plan.flags.layer_profile,
        "layers": layers,
        "storage": {n: mine.quant for n, mine in plan.plans.items() if mine.quant != "none"},
        "flags": dict(flags or {}),
    }


def _layer_metadata(
    module: AdapterLinear, shapes: dict[str, list[int]], plan: LayerPlan
) -> dict[str, Any]:
    mode = "lora" if module.MODE == "pissa" else module.MODE
    entry: dict[str, Any] = {"mode": mode, "trained_as": module.MODE}
    if isinstance(module, LoraLinear):
        entry["rank"] = shapes["lora_A"][0]
        entry["alpha"] = module.scale * entry["rank"]
    else:
        entry["rank"] = plan.rank
    if module.MODE == "bone":
        entry["variant"] = "row"
    return entry


def project_version() -> str:
    """The version that pyproject.toml states."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def read_adapter(
    path: Path | str, *, alpha: float | None = None
) -> tuple[TensorFile, dict[str, AdapterKind], dict[str, Any]]:
    """Open an adapter file.

    Args:
        path: a .pth or .safetensors file, ours or RWKV-LM-RLHF's.
        alpha: for files that do not state it; ours do, and it must be None for them.

    Returns:
        its tensors, the adapter of each adapted layer by the layer's name, and its metadata,
        empty for a file of RWKV-LM-RLHF.

    Raises:
        InputError: it is no adapter file or a whole model, holds what this project lacks, or alpha
            is missing or has no effect.
    """
    if alpha is not None and not alpha > 0:
        raise InputError(f"--alpha {alpha:g}: must be above 0; take that of the training")
    tensors, metadata = read_tensors(path), read_metadata(path)
    _check_own(path, tensors)
    if _is_model(tensors, metadata):
        raise _whole_model(path)
    for name in tensors:
        for fragment, meaning in FOREIGN.items():
            if fragment in name:
                raise InputError(f"{path}: {name}: {meaning} are not supported; merge it upstream")
    if metadata and metadata.get("kind") not in ("adapter", "model"):
        raise InputError(
            f"{path}: its .json says it is {metadata.get('kind')!r}, not an adapter; "
            "name the adapter's file"
        )
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensors.shapes.items():
        layer, _, part = name.rpartition(".")
        if part in PARTS:
            shapes.setdefault(layer, {})[part] = shape
            if f"{layer}.weight" in tensors:
                raise InputError(
                    f"{path}: holds an adapter for {layer} and its whole weight; "
                    "one of them must go"
                )
    stated = stated_layers(path, metadata)
    missing = sorted(stated.keys() - shapes.keys())
    if missing:
        raise InputError(
            f"{path}: lacks the adapter of {missing[0]}, which its .json names"
            f"{' with others' if len(missing) > 1 else ''}; copy both files again"
        )
    if alpha is not None:
        scaled = [layer for layer, parts in shapes.items() if "lora_A" in parts]
        if all("alpha" in stated.get(layer, {}) for layer in scaled):
            why = "the .json beside it states it" if scaled else "it holds no LoRA or DoRA"
            raise InputError(f"--alpha {alpha:g}: has no effect on {path}, for {why}; drop it")
    kinds = {
        layer: _kind(f"{path}: {layer}", parts, stated.get(layer), alpha)
        for layer, parts in shapes.items()
    }
    return tensors, kinds, metadata


def _check_own(path: Path | str, tensors: TensorFile) -> None:
    """Stop at an adapter of HF peft."""
    if any(name.startswith("base_model.model.") for name in tensors):
        folder = path if Path(path).is_dir() else Path(path).parent
        raise InputError(
            f"{path}: is HF peft's adapter; name what python -m peft.convert --adapter {folder} "
            "--output ADAPTER.pth makes of it"
        )


def has_start(tensors: Iterable[str]) -> bool:
    """Whether a file's tensors, by name, are a tuned state or a prefix among others."""
    return any(name == PREFIX or name.endswith(f".{STATE}") for name in tensors)


def _is_model(tensors: TensorFile, metadata: Mapping[str, Any]) -> bool:
    """Whether a file is a whole model, with nothing that would be lost at --load_model."""
    if has_start(tensors):
        return False
    if "kind" in metadata:
        return metadata["kind"] in ("model", "quantized")
    try:
        config = config_of(tensors)
    except InputError:
        return False
    with torch.device("meta"):
        return {name for name, _ in RWKV(config).named_parameters()} <= tensors.keys()


def _whole_model(path: Path | str) -> InputError:
    return InputError(f"{path}: is a whole model, no adapter; it is a base, as at --load_model")


def stated_layers(path: Path | str, metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What an adapter's .json says of each layer; empty for a file of RWKV-LM-RLHF.

    Raises:
        InputError: it is not what this project writes.
    """
    layers = metadata.get("layers", {})
    entries = list(layers.values()) if isinstance(layers, dict) else [None]
    if not all(isinstance(entry, dict) and _is_whole(entry) for entry in entries):
        beside = Path(path).with_suffix(".json")
        raise InputError(f"{beside}: says nothing usable of the layers; restore it or remove it")
    return layers


def _is_whole(entry: dict[str, Any]) -> bool:
    """Whether the .json says of a layer what `load_adapter` needs."""
    scaled = entry.get("mode") not in ("bone", "miss")
    return not scaled or all(isinstance(entry.get(key), (int, float)) for key in ("alpha", "rank"))


def _kind(
    where: str,
    shapes: dict[str, tuple[int, ...]],
    stated: dict[str, Any] | None,
    alpha: float | None,
) -> AdapterKind:
    """Kind and rank from the shapes, alpha from the metadata or the caller."""
    found = {
        frozenset({"lora_A", "lora_B"}): "lora",
        frozenset({"lora_A", "lora_B", "lora_M"}): "dora",
        frozenset({"bone"}): "bone",
        frozenset({"miss"}): "miss",
    }
    mode = found.get(frozenset(shapes))
    if mode is None:
        raise InputError(f"{where}: holds {', '.join(sorted(shapes))} alone; copy the file again")
    if mode in ("bone", "miss"):
        return AdapterKind(mode, shapes[mode][1 if mode == "bone" else 0])
    if mode == "dora" and shapes["lora_M"][0] == 1:
        mode = "dora_column"
    rank = shapes["lora_A"][0]
    if shapes["lora_B"][1:] != (rank,):
        raise InputError(
            f"{where}: lora_A is {list(shapes['lora_A'])} and lora_B {list(shapes['lora_B'])}, "
            "which are of different ranks; copy the file again"
        )
    if not rank:
        raise InputError(f"{where}: lora_A is {list(shapes['lora_A'])}; copy the file again")
    if stated is not None and "alpha" in stated:
        alpha = float(stated["alpha"])
    if alpha is None:
        raise InputError(
            f"{where}: the file does not say its alpha; give it with --alpha, as in the profile "
            "it was trained with"
        )
    return AdapterKind(mode, rank, lora_scale(rank, alpha, rslora=False))


def load_adapter(model: nn.Module, path: Path | str, *, base: str | None = None) -> None:
    """Put an adapter file into a model whose profile made the same adapters.

    Args:
        model: after `apply_profile`.
        path: the adapter's file.
        base: fingerprint of the base model's file; None to skip the comparison.

    Raises:
        InputError: names, shapes, alpha or base differ, or a number is not finite. Nothing is
            changed then.
    """
    adapters = {n: m for n, m in model.named_modules() if isinstance(m, AdapterLinear)}
    scales = {n: m.scale for n, m in adapters.items() if isinstance(m, LoraLinear)}
    wanted = {name: tuple(tensor.shape) for name, tensor in trained_tensors(model).items()}
    tensors = check_adapter(path, wanted, scales, base=base)
    parts = {n: {part: tensors[f"{n}.{part}"] for part in m.PARTS} for n, m in adapters.items()}
    for layer, adapter in adapters.items():
        if reason := adapter.why_not(parts[layer]):
            raise InputError(f"{path}: {layer}: {reason}")
    whole = {name for name in wanted if name.rpartition(".")[0] not in adapters}
    with torch.no_grad():
        for name in whole:
            model.get_parameter(name).copy_(tensors[name])
    for layer, adapter in adapters.items():
        adapter.load(parts[layer])


def check_adapter(
    path: Path | str,
    wanted: Mapping[str, tuple[int, ...]],
    scales: Mapping[str, float],
    *,
    base: str | None = None,
) -> TensorFile:
    """Open an adapter file that a run goes on from, which needs no model for it.

    Args:
        path: the adapter's file.
        wanted: the shape of each tensor that the run would write; see `planned_shapes`.
        scales: alpha / rank of each layer that has one; see `planned_scales`.
        base: fingerprint of the base model's file; None to skip the comparison.

    Raises:
        InputError: names, shapes, alpha or base differ, or a number is not finite.
    """
    tensors = read_tensors(path)
    _check_own(path, tensors)
    metadata = read_metadata(path)
    if tensors.keys() != wanted.keys() and _is_model(tensors, metadata):
        raise _whole_model(path)  # which a run that trains all goes on from, and no other
    if base is not None and metadata.get("base", base) != base:
        raise InputError(
            f"{path}: belongs to the base {metadata['base']}, --load_model is {base}; "
            "load the base it was trained on"
        )
    _check_names(path, tensors, wanted)
    for name, shape in wanted.items():
        if tensors.shapes[name] != shape:
            raise InputError(
                f"{path}: {name} is {list(tensors.shapes[name])}, the profile makes it "
                f"{list(shape)}; set the rank (or mode) that the file was trained with"
            )
        check_finite(Path(path), name, tensors[name])
    for layer, stated in stated_layers(path, metadata).items():
        if layer not in scales:
            continue
        scale = stated["alpha"] / stated["rank"]
        if abs(scale - scales[layer]) > 1e-6 * scale:
            raise InputError(
                f"{path}: {layer}: was trained with alpha / rank {scale:g}, the profile says "
                f"{scales[layer]:g}; set the same alpha and --rslora"
            )
    return tensors


def planned_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that an adapter file of this plan holds, without a tuned start."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in plan.layers.items():
        mine = plan.plans[name]
        if mine.mode in ADAPTERS:
            parts = ADAPTERS[mine.mode].exported_sizes(*layer.shape, mine.rank)
            shapes |= {f"{name}.{part}": shape for part, shape in parts.items()}
        else:
            shapes |= trained_sizes(plan, name)
    return shapes


def planned_scales(plan: Plan) -> dict[str, float]:
    """The factor of each layer's update that has one."""
    return {
        name: lora_scale(mine.rank, mine.alpha or 0.0, rslora=plan.flags.rslora)
        for name, mine in plan.plans.items()
        if mine.mode in LOW_RANK
    }


def unstated_scales(path: Path | str, scales: Mapping[str, float]) -> list[float]:
    """Those of `planned_scales` that an adapter's file does not state, as RWKV-LM-RLHF's do not."""
    stated = stated_layers(path, read_metadata(path))
    return [scale for layer, scale in scales.items() if "alpha" not in stated.get(layer, {})]


def _check_names(path: Path | str, tensors: TensorFile, wanted: Mapping[str, Any]) -> None:
    missing, unexpected = (
        sorted(wanted.keys() - tensors.keys()),
        sorted(tensors.keys() - wanted.keys()),
    )
    if not missing and not unexpected:
        return
    problems = [
        f"{word} {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
        for word, names in (("lacks", missing), ("has unexpected", unexpected))
        if names
    ]
    hint = "" if any(name.endswith(STATE) for name in missing) else " and --limited_lora"
    raise InputError(f"{path}: {' and '.join(problems)}; use the profile{hint} it was trained with")
