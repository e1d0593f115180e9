"""Merge an adapter into its base's tensors, and measure how far the result is from both."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft.adapter import AdapterLinear
from peft.adapter_file import AdapterKind, read_adapter
from peft.plan import STATE
from peft.registry import make_adapter
from rwkv.checkpoint import TensorFile, config_of, fill, fingerprint, set_parameter
from rwkv.errors import InputError
from rwkv.linear import Linear
from rwkv.model import RWKV

TOKENS = 96  # of the fixed text that both models read


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


def merge(
    base: TensorFile, adapter: Path, *, alpha: float | None = None, other_base: bool = False
) -> dict[str, Tensor]:
    """The base's tensors with the adapter's changes, in the base's dtypes, in its order.

    Args:
        base: the model's file.
        adapter: an adapter file; see peft.adapter_file.read_adapter.
        alpha: for adapter files that do not state it.
        other_base: allow a base that the adapter was not trained on.

    Raises:
        InputError: the adapter does not fit the base.
    """
    tensors, kinds, metadata = read_adapter(adapter, alpha=alpha)
    if metadata and not other_base and metadata.get("base") != fingerprint(base):
        raise InputError(
            f"{adapter}: was trained on the base {metadata.get('base')}, {base.path} is "
            f"{fingerprint(base)}; name the base it was trained on, or add --other_base"
        )
    merged = dict(base)
    for layer, kind in kinds.items():
        merged[f"{layer}.weight"] = _merged_layer(base, tensors, layer, kind, adapter)
    for name in _whole(tensors, kinds):
        merged[name] = _replaced(base, tensors, name, adapter)
    return merged


def _whole(tensors: TensorFile, kinds: Mapping[str, AdapterKind]) -> list[str]:
    """The keys of tensors that replace the base's; a tuned state is none of them."""
    return [
        name
        for name in tensors
        if name.rpartition(".")[0] not in kinds and not name.endswith(f".{STATE}")
    ]


def _merged_layer(
    base: TensorFile, tensors: TensorFile, layer: str, kind: AdapterKind, adapter: Path
) -> Tensor:
    key = f"{layer}.weight"
    if key not in base:
        raise InputError(f"{adapter}: adapts {layer}, which {base.path} lacks; name its own base")
    weight = base[key]
    with torch.device("meta"):
        linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight.float(), requires_grad=False)
    with torch.no_grad():
        return _adapted(linear, tensors, layer, kind).merged_weight().to(weight.dtype)


def _adapted(linear: Linear, tensors: TensorFile, layer: str, kind: AdapterKind) -> AdapterLinear:
    """The layer with the file's adapter over it, in the layer's dtype."""
    try:
        built = make_adapter(kind.mode, linear, rank=kind.rank, scale=kind.scale)
    except InputError as error:
        raise InputError(f"{tensors.path}: {layer}: {error}") from None
    for part in built.PARTS:
        found, expected = tensors.shapes[f"{layer}.{part}"], tuple(getattr(built, part).shape)
        if found != expected:
            raise InputError(
                f"{tensors.path}: {layer}.{part} is {list(found)}, over a "
                f"[{linear.out_features}, {linear.in_features}] weight it would be "
                f"{list(expected)}; name the base it was trained on"
            )
    built.load({part: tensors[f"{layer}.{part}"] for part in built.PARTS})
    return built


def _replaced(base: TensorFile, tensors: TensorFile, name: str, adapter: Path) -> Tensor:
    if name not in base:
        raise InputError(f"{adapter}: holds {name}, which {base.path} lacks; name its own base")
    old, new = base[name], tensors[name]
    if old.squeeze().shape != new.squeeze().shape:
        raise InputError(
            f"{adapter}: {name} is {list(new.shape)}, in {base.path} it is {list(old.shape)}; "
            "name the base it was trained on"
        )
    return new.reshape(old.shape).to(old.dtype)


def adapted_model(base: TensorFile, adapter: Path, *, alpha: float | None, device: str) -> RWKV:
    """The base with the adapter beside it, in float32, to compare a merged model with."""
    with torch.device("meta"):
        model = RWKV(config_of(base))
    fill(model, base, device=device, dtype=torch.float32)
    tensors, kinds, _ = read_adapter(adapter, alpha=alpha)
    for layer, kind in kinds.items():
        linear = model.get_submodule(layer)
        assert isinstance(linear, Linear)
        model.set_submodule(layer, _adapted(linear, tensors, layer, kind))
    for name in _whole(tensors, kinds):
        shape = model.get_parameter(name).shape
        set_parameter(model, name, tensors[name].to(device, torch.float32).reshape(shape))
    return model


def compare(
    base: TensorFile,
    adapter: Path,
    merged: Mapping[str, Tensor],
    *,
    alpha: float | None = None,
    device: str = "cpu",
) -> Difference:
    """Let base with adapter, then the merged weights, read the same tokens in float32.

    One model is in memory at a time.
    """
    config = config_of(base)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (1, TOKENS), generator=draw).to(device)

    def logits(model: RWKV) -> Tensor:
        with torch.no_grad():
            return model.logits(model(tokens)[0])[0].cpu()

    adapted = logits(adapted_model(base, adapter, alpha=alpha, device=device))
    with torch.device("meta"):
        model = RWKV(config)
    for name, parameter in list(model.named_parameters()):
        value = merged[name].to(device, torch.float32).reshape(parameter.shape)
        set_parameter(model, name, value)
    after = logits(model)
    gap = (after - adapted).abs()
    kl = F.kl_div(
        after.log_softmax(-1), adapted.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    agreement = (after.argmax(-1) == adapted.argmax(-1)).float().mean()
    return Difference(gap.max().item(), gap.mean().item(), kl.item(), agreement.item())
