"""Quantized model files: some layers' weights as codes and scales, the rest as in the model.

A layer `X` is held as `X.store.codes`, `X.store.scale` and so on; the `.json` beside the file says
which storage, shape and dtype it has, and a fingerprint of its codes. rwkv.checkpoint knows the
sizes, this module the codes.
"""

from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft.adapter_file import project_version
from peft.plan import ENDS, STORED, model_layers
from peft.store import Store
from peft.stores import STORES, make_store, store_class, stored_size
from rwkv.checkpoint import PARTS, TensorFile, fingerprint
from rwkv.config import RWKVConfig
from rwkv.errors import InputError
from rwkv.model import RWKV


def read_store(tensors: TensorFile, layer: str) -> Store:
    """The store of one layer of a quantized file, bit for bit as it was written.

    Raises:
        InputError: the file is of a storage that this version does not know, or its .json is
            another's.
    """
    entry = tensors.quantized[layer]
    kind = entry["storage"]
    if kind not in STORES:
        raise InputError(
            f"{tensors.path}: {layer} is stored as {kind!r}, known are {', '.join(STORES)}; "
            "quantize the model again"
        )
    parts = tensors.parts(layer)
    _check_parts(tensors.path, layer, kind, parts, entry)
    return store_class(kind).restored(
        kind,
        parts,
        shape=tuple(entry["shape"]),
        dtype=getattr(torch, entry["dtype"]),
    )


def _check_parts(
    path: Path, layer: str, kind: str, parts: Mapping[str, Tensor], entry: Mapping[str, Any]
) -> None:
    """Raise an InputError unless these are the codes and scales that the entry describes."""
    expected = _dtypes(kind)
    size = sum(part.numel() * part.element_size() for part in parts.values())
    if {name: part.dtype for name, part in parts.items()} != expected:
        what = f"holds {', '.join(sorted(parts))}, not what {kind} has"
    elif size != (needed := stored_size(kind, *entry["shape"])):
        what = f"has {size:,} bytes, not the {needed:,} that {kind} has"
    elif entry.get("codes", "") not in ("", _fingerprint(kind, parts)):
        what = f"holds other codes than those of {kind} that its .json describes"
    else:
        return
    raise InputError(f"{path}: {layer} {what}; copy the file and its .json again")


def _fingerprint(kind: str, parts: Mapping[str, Tensor]) -> str:
    """A hash by which a layer's .json knows its codes: formats of as many bits look alike."""
    return fingerprint({f"{kind} {name}": part for name, part in parts.items()})


@cache
def _dtypes(kind: str) -> dict[str, torch.dtype]:
    """Of a store's parts, by name."""
    tiny = make_store(kind, torch.ones(64, 64))
    return {name: part.dtype for name, part in tiny.tensors().items()}


def layers_to_store(config: RWKVConfig, *, ends: bool) -> set[str]:
    """The names of a model's linear layers, with or without the head and the embedding."""
    with torch.device("meta"):
        layers = model_layers(RWKV(config))
    return {n for n, layer in layers.items() if layer.kind in STORED and (n not in ENDS or ends)}


def quantized_metadata(base: str, described: Mapping[str, Any]) -> dict[str, Any]:
    """What the `.json` beside a quantized file says.

    Args:
        base: fingerprint of the model that it was made from.
        described: as `quantize_tensors` gives it.
    """
    return {
        "kind": "quantized",
        "project": project_version(),
        "base": base,
        "quantized": dict(described),
    }


def quantize_tensors(
    tensors: Mapping[str, Tensor], layers: Collection[str], kind: str, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantize some layers of a model's tensors.

    Args:
        tensors: the model.
        layers: names of linear layers or the embedding.
        kind: a key of STORES.
        device: where to quantize; one layer is there at a time.

    Returns:
        the tensors of the quantized file, and its metadata's `quantized`.
    """
    written: dict[str, Tensor] = {}
    described: dict[str, Any] = {}
    for name in tensors:
        layer = name.removesuffix(".weight")
        if layer not in layers:
            written[name] = tensors[name]
            continue
        store = make_store(kind, tensors[name].to(device))
        parts = {part_name: part.cpu() for part_name, part in store.tensors().items()}
        described[layer] = {
            "storage": kind,
            "shape": list(store.shape),
            "dtype": str(store.dtype).removeprefix("torch."),
            "codes": _fingerprint(kind, parts),
        }
        written |= {f"{layer}{PARTS}{part_name}": part for part_name, part in parts.items()}
    return written, described
