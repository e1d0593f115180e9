"""Merge an adapter into its base's tensors, and measure how far the result is from both."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft.adapter import AdapterLinear
from peft.adapter_file import AdapterKind, read_adapter, stated_layers
from peft.plan import PREFIX, STATE
from peft.registry import make_adapter
from peft.stores import STORES, make_store
from rwkv.checkpoint import TensorFile, check_finite, config_of, fill, fingerprint, set_parameter
from rwkv.errors import InputError, RunError
from rwkv.linear import Linear, Matrix
from rwkv.model import RWKV
from rwkv.tokenizer import load_tokenizer

# What both models read, where their vocabulary says which tokenizer is theirs.
TEXT = """The ferry leaves at 7:40 and again at noon, unless the wind comes from the north. Who
misses both may walk: it is 11 km along the shore, past two farms and a small church whose door is
never locked.

User: How long does the walk take?
Assistant: Between two and three hours. Take 1.5 litres of water with you, and set out before 3."""
TOKENS = 96  # random ones, for models whose vocabulary says nothing


@dataclass(frozen=True)
class Pair:
    """A base model's file and an adapter's that belongs to it.

    kinds: the adapter of each adapted layer.
    whole: keys of tensors that replace the base's; a tuned state and a prefix are none of them.
    storage: layers to take quantized and back, as the training saw them.
    """

    base: TensorFile
    adapter: TensorFile
    kinds: Mapping[str, AdapterKind]
    whole: tuple[str, ...]
    storage: Mapping[str, str]


@dataclass(frozen=True)
class Difference:
    """How far two models' logits are apart over some tokens.

    largest, mean: absolute difference of the logits.
    kl: mean Kullback-Leibler divergence of the merged model from the adapted one, nats a token.
    agreement: share of tokens with the same most likely successor.
    """

    largest: float
    mean: float
    kl: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"logits differ by {self.largest:.2e} at most and {self.mean:.2e} on average, "
            f"KL {self.kl:.2e} nats a token, top-1 agreement {self.agreement:.1%}"
        )


def open_pair(
    base: TensorFile,
    path: Path,
    *,
    alpha: float | None = None,
    other_base: bool | None = None,
    as_trained: bool = False,
) -> Pair:
    """Read an adapter file and check it against its base.

    Args:
        base: the model's file.
        path: the adapter's; see peft.adapter_file.read_adapter.
        alpha: for adapter files that do not state it.
        other_base: allow a base that the adapter was not trained on; None where the command has no
            --other_base.
        as_trained: merge into the weights as the training saw them, quantized and back, where it
            ran over quantized ones; else into the base's own.

    Raises:
        InputError: the adapter does not fit the base.
    """
    adapter, kinds, metadata = read_adapter(path, alpha=alpha)
    if "base" in metadata and not other_base and metadata["base"] != fingerprint(base):
        raise InputError(
            f"{path}: was trained on the base {metadata['base']}, {base.path} is "
            f"{fingerprint(base)}; name the base it was trained on"
            f"{'' if other_base is None else ', or add --other_base'}"
        )
    whole = tuple(
        name
        for name in adapter
        if name.rpartition(".")[0] not in kinds
        and not name.endswith(f".{STATE}")
        and name != PREFIX
    )
    for name in adapter:
        check_finite(adapter.path, name, adapter[name])
    for name in (*whole, *(f"{layer}.weight" for layer in kinds)):
        if name not in base:
            raise InputError(f"{path}: changes {name}, which {base.path} lacks; name its own base")
        if name in whole and _squeezed(adapter.shapes[name]) != _squeezed(base.shapes[name]):
            raise InputError(
                f"{path}: {name} is {list(adapter.shapes[name])}, in {base.path} it is "
                f"{list(base.shapes[name])}; name the base it was trained on"
            )
    return Pair(base, adapter, kinds, whole, _storage(path, metadata, base) if as_trained else {})


def _storage(path: Path, metadata: Mapping[str, Any], base: TensorFile) -> dict[str, str]:
    """How the training stored the base's layers, as an adapter's .json says.

    Raises:
        InputError: it does not say so, says what cannot be, or PiSSA stored another weight.
    """
    storage, beside = metadata.get("storage"), path.with_suffix(".json")
    if storage is None:
        raise InputError(f"{path}: does not say how the base was stored; drop --as_trained")
    if not isinstance(storage, dict):
        raise InputError(f"{beside}: says nothing usable of the storage; restore it")
    stated = stated_layers(path, metadata)
    for layer, kind in storage.items():
        if str(kind) not in STORES:
            raise InputError(
                f"{beside}: {layer} was stored as {kind!r}, known are {', '.join(STORES)}; "
                "restore it, or drop --as_trained"
            )
        if len(base.shapes.get(f"{layer}.weight", ())) != 2:
            raise InputError(
                f"{beside}: says that {layer} was stored as {kind}, and {base.path} has no such "
                "layer; restore it, or drop --as_trained"
            )
        if stated.get(layer, {}).get("trained_as") == "pissa":
            raise InputError(
                f"{path}: {layer}: PiSSA stored another weight than the base's; drop --as_trained"
            )
    return storage


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def merge(pair: Pair) -> dict[str, Tensor]:
    """The base's tensors with the adapter's changes, in the base's dtypes, in its order.

    Raises:
        InputError: an adapter's shapes do not fit the weight.
    """
    merged = dict(pair.base)
    for name, value in changes(pair):
        merged[name] = value.to(merged[name].dtype)
    return merged


@torch.no_grad()
def changes(pair: Pair) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of the base that the adapter changes and what it becomes, in float32.

    Raises:
        InputError: an adapter's shapes do not fit the weight.
    """
    for layer in pair.kinds.keys() | pair.storage.keys():
        key = f"{layer}.weight"
        yield key, _linear(pair, layer, pair.base[key].float()).merged_weight()
    for name in pair.whole:
        yield name, pair.adapter[name].float().reshape(pair.base.shapes[name])


def attach(pair: Pair, model: RWKV) -> None:
    """Put the adapter's layers into its base's model, which may be stored in few bits.

    Of a layer that trained as a whole the adapter's weight takes the place of what is stored.

    Raises:
        InputError: an adapter's shapes do not fit the weight.
    """
    for layer in pair.kinds:
        linear = model.get_submodule(layer)
        assert isinstance(linear, Linear)
        model.set_submodule(layer, _adapted(pair, layer, linear))
    for name in pair.whole:
        value, owner = pair.adapter[name], model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, Matrix) and owner.store is not None:
            value = value.to(model.device, owner.store.dtype)
            owner.weight, owner.store = nn.Parameter(value, requires_grad=False), None
            continue
        old = model.get_parameter(name)
        set_parameter(model, name, value.reshape(old.shape).to(old))


def _linear(pair: Pair, layer: str, weight: Tensor) -> Linear:
    """A layer over `weight`, with the pair's store and adapter for it."""
    with torch.device("meta"):
        linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer in pair.storage:
        linear.store_as(make_store(pair.storage[layer], weight))
    return _adapted(pair, layer, linear) if layer in pair.kinds else linear


def _adapted(pair: Pair, layer: str, linear: Linear) -> AdapterLinear:
    kind, path = pair.kinds[layer], pair.adapter.path
    try:
        built = make_adapter(kind.mode, linear, rank=kind.rank, scale=kind.scale, of_file=True)
    except InputError as error:
        raise InputError(f"{path}: {layer}: {error}") from None
    for part in built.PARTS:
        found = pair.adapter.shapes[f"{layer}.{part}"]
        expected = tuple(getattr(built, part).shape)
        if found != expected:
            raise InputError(
                f"{path}: {layer}.{part} is {list(found)}, over a "
                f"[{linear.out_features}, {linear.in_features}] weight it would be "
                f"{list(expected)}; name the base it was trained on"
            )
    built.load({part: pair.adapter[f"{layer}.{part}"] for part in built.PARTS})
    return built


def compare(
    pair: Pair,
    merged: Mapping[str, Tensor],
    *,
    device: str = "cpu",
    storage: Mapping[str, str] | None = None,
) -> Difference:
    """Let base with adapter, then the merged weights, read the same text in float32.

    One model is in memory at a time.

    Args:
        pair, merged: as `merge` takes and gives them.
        device: where both run.
        storage: layers of the merged model to be stored in fewer bits, and their storages.
    """
    tokens = fixed_text(config_of(pair.base).vocab_size).to(device)
    before = _logits(_adapted_model(pair, device), tokens)
    model = _merged_model(pair, merged, device)
    _store(model, storage or {})
    after = _logits(model, tokens)
    gap = (after - before).abs()
    kl = F.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    agreement = (after.argmax(-1) == before.argmax(-1)).float().mean()
    return Difference(gap.max().item(), gap.mean().item(), kl.item(), agreement.item())


def fixed_text(vocab_size: int) -> Tensor:
    """The tokens that models of this vocabulary are compared on, [1, T]."""
    try:
        return torch.tensor([load_tokenizer(None, vocab_size).encode(TEXT)])
    except (InputError, RunError):  # no tokenizer is known, or its package is missing
        draw = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (1, TOKENS), generator=draw)


@torch.no_grad()
def _logits(model: RWKV, tokens: Tensor) -> Tensor:
    """[T, V]."""
    return model.logits(model(tokens)[0])[0].cpu()


def _adapted_model(pair: Pair, device: str) -> RWKV:
    with torch.device("meta"):
        model = RWKV(config_of(pair.base))
    fill(model, pair.base, device=device, dtype=torch.float32)
    _store(model, pair.storage)
    attach(pair, model)
    return model


def _store(model: RWKV, storage: Mapping[str, str]) -> None:
    for layer, kind in storage.items():
        matrix = model.get_submodule(layer)
        assert isinstance(matrix, Matrix) and matrix.weight is not None
        matrix.store_as(make_store(kind, matrix.weight))


def _merged_model(pair: Pair, merged: Mapping[str, Tensor], device: str) -> RWKV:
    with torch.device("meta"):
        model = RWKV(config_of(pair.base))
    for name, parameter in list(model.named_parameters()):
        value = merged[name].to(device, torch.float32).reshape(parameter.shape)
        set_parameter(model, name, value)
    return model
