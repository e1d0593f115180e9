"""HF peft's adapter folders: adapter_config.json and adapter_model.safetensors.

Source: HF peft 0.21, src/peft/tuners/{lora,miss} and utils/save_and_load.py for the names.
"""

import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from peft.adapter_file import AdapterKind, project_version, read_adapter
from rwkv.checkpoint import TensorFile, read_tensors
from rwkv.errors import InputError
from rwkv.files import replacing

PREFIX = "base_model.model."
CARD = "README.md"  # the model card, which people write
FILES = ("adapter_config.json", "adapter_model.safetensors", CARD)  # of such a folder
LAYERS = {  # our names of RWKV-7's linear layers, and those of its HF models
    "att.receptance": "attn.r_proj",
    "att.key": "attn.k_proj",
    "att.value": "attn.v_proj",
    "att.output": "attn.o_proj",
    "ffn.key": "ffn.key",
    "ffn.value": "ffn.value",
}
PARTS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_M": "lora_magnitude_vector",
    "miss": "miss_block",
}
MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # first values taken out of the base
CANNOT = {
    "bone": "is Bone, whose blocks HF peft lays out otherwise",
    "dora_column": "is DoRA with a norm a column, HF peft's has one a row",
}


def hf_name(layer: str) -> str | None:
    """`blocks.3.att.key` -> `model.layers.3.attn.k_proj`; None for layers HF models lack."""
    if layer == "head":
        return "lm_head"
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
    if match is None or match[2] not in LAYERS:
        return None
    return f"model.layers.{match[1]}.{LAYERS[match[2]]}"


def our_name(module: str) -> str | None:
    """The inverse of hf_name."""
    if module == "lm_head":
        return "head"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    back = {theirs: ours for ours, theirs in LAYERS.items()}
    if match is None or match[2] not in back:
        return None
    return f"blocks.{match[1]}.{back[match[2]]}"


def to_folder(
    path: Path,
    folder: Path,
    *,
    alpha: float | None = None,
    base_name: str | None = None,
    drop_whole: bool = False,
) -> int:
    """Write an adapter file as HF peft's folder; returns the number of layers.

    Args:
        path: the adapter file.
        folder: replaced if it exists, and holds nothing else; its README.md stays.
        alpha: for files that do not state it.
        base_name: the base model's name, for the configuration.
        drop_whole: leave out tensors that trained whole.

    Raises:
        InputError: HF peft has no place for what the file holds, or `folder` holds other things.
    """
    others = sorted(p.name for p in folder.glob("*") if p.name not in FILES)
    if others:
        raise InputError(
            f"{folder}: holds {others[0]}, which is not of HF peft's folder; choose another one"
        )
    tensors, kinds, _ = read_adapter(path, alpha=alpha)
    modes = {kind.mode for kind in kinds.values()}
    for layer, kind in kinds.items():
        if kind.mode in CANNOT:
            raise InputError(f"{path}: {layer} {CANNOT[kind.mode]}; merge it with peft.merge")
        if hf_name(layer) is None:
            raise InputError(
                f"{path}: {layer} has no name in HF's RWKV-7 models; merge it with peft.merge"
            )
    whole = [name for name in tensors if name.rpartition(".")[0] not in kinds]
    if whole and not drop_whole:
        raise InputError(
            f"{path}: {len(whole)} tensors trained whole, such as {whole[0]}, and HF peft's folder "
            "has no place for them; merge, train with --limited_lora 1, or add --drop_whole"
        )
    if len(modes) != 1:
        raise InputError(
            f"{path}: holds {' and '.join(sorted(modes)) or 'no adapter'}; "
            "HF peft's folder holds one kind"
        )
    out = {}
    for layer in kinds:
        for part, theirs in PARTS.items():
            if f"{layer}.{part}" in tensors:
                value = tensors[f"{layer}.{part}"].contiguous()
                out[f"{PREFIX}{hf_name(layer)}.{theirs}"] = (
                    value.squeeze(1) if part == "lora_M" else value
                )
    named = {str(hf_name(layer)): kind for layer, kind in kinds.items()}
    from safetensors.torch import save_file

    with replacing(folder) as part_folder:
        part_folder.mkdir()
        if (folder / CARD).exists():
            shutil.copy2(folder / CARD, part_folder)
        save_file(out, part_folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = json.dumps(_config(named, modes.pop(), base_name), indent=1)
        (part_folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
    return len(kinds)


def _config(named: dict[str, AdapterKind], mode: str, base_name: str | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(named),
        "task_type": "CAUSAL_LM",
    }
    ranks = Counter(kind.rank for kind in named.values())
    rank = ranks.most_common(1)[0][0]
    if mode == "miss":
        if len(ranks) > 1:
            raise InputError(
                "miss: the file has several ranks, HF peft's folder holds one; train with one rank"
            )
        return config | {"peft_type": "MISS", "r": rank, "init_weights": True}
    alphas = {name: kind.scale * kind.rank for name, kind in named.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return config | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(n): k.rank for n, k in named.items() if k.rank != rank},
        "alpha_pattern": {re.escape(n): a for n, a in alphas.items() if a != alpha},
        "lora_dropout": 0.0,
        "use_dora": mode == "dora",
        "use_rslora": False,
    }


def from_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read HF peft's folder as an adapter file's tensors and metadata.

    Raises:
        InputError: it is no such folder, or holds what this project has no place for.
    """
    config = _read_config(folder)
    mode = _mode(folder, config)
    tensors = read_tensors(folder / "adapter_model.safetensors")
    endings = {theirs: part for part, theirs in PARTS.items()}
    out: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    for name in tensors:
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+?)\.(lora_.+|miss_block)", name)
        part = endings.get(found[2]) if found else None
        layer = our_name(found[1]) if found else None
        if found is None or part is None or layer is None:
            raise InputError(
                f"{folder}: {name} is no adapter of a linear layer of RWKV-7; "
                "train it without modules_to_save, biases and embeddings"
            )
        value = tensors[name]
        out[f"{layer}.{part}"] = value.unsqueeze(1) if part == "lora_M" else value
        if part in ("lora_A", "miss"):
            entry = {"mode": mode, "trained_as": mode, "rank": value.shape[0]}
            if part == "lora_A":
                entry["alpha"] = _alpha(config, found[1], value.shape[0])
            layers[layer] = entry
    _check_parts(tensors, out, layers)
    metadata = {"kind": "adapter", "project": project_version(), "layers": layers}
    return out, metadata | {"source": str(folder)}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: lacks adapter_config.json; name HF peft's folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error}); copy the folder again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: is no JSON object; copy the folder again")
    return config


def _mode(folder: Path, config: dict[str, Any]) -> str:
    kind = config.get("peft_type")
    start = config.get("init_lora_weights", True)
    if kind == "LORA" and isinstance(start, str) and start.startswith(MOVED):
        raise InputError(
            f"{folder}: was begun with init_lora_weights {start!r}, so it lies over a base that HF "
            "peft changed; save it as plain LoRA (path_initial_model_for_weight_conversion) first"
        )
    if kind == "MISS" and config.get("init_weights", True) is True:
        return "miss"
    if kind == "LORA" and not config.get("modules_to_save"):
        _check_alpha(folder, config)
        return "dora" if config.get("use_dora") else "lora"
    variant = f" ({config['init_weights']!r})" if kind == "MISS" else ""
    raise InputError(
        f"{folder}: holds {kind}{variant}, possibly with modules_to_save; "
        "plain LORA (with or without DoRA) and plain MISS can be converted"
    )


def _check_alpha(folder: Path, config: dict[str, Any]) -> None:
    """Raise an InputError unless the configuration says every module's alpha."""
    patterns = config.get("alpha_pattern") or {}
    try:
        float(config["lora_alpha"])
        for pattern, value in patterns.items():
            re.compile(pattern)
            float(value)
    except (KeyError, TypeError, ValueError, AttributeError, re.error):
        raise InputError(
            f"{folder}: adapter_config.json has lora_alpha {config.get('lora_alpha')!r} and "
            f"alpha_pattern {patterns!r}, not numbers; copy the folder again"
        ) from None


def _alpha(config: dict[str, Any], module: str, rank: int) -> float:
    """The alpha for which alpha / rank is the module's scale."""
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _check_parts(
    tensors: TensorFile, out: dict[str, Tensor], layers: dict[str, dict[str, Any]]
) -> None:
    for layer, entry in layers.items():
        needed = {"lora": ("lora_A", "lora_B"), "dora": ("lora_A", "lora_B", "lora_M")}
        for part in needed.get(entry["mode"], ("miss",)):
            if f"{layer}.{part}" not in out:
                raise InputError(f"{tensors.path}: lacks {PARTS[part]} of {layer}; copy it again")
