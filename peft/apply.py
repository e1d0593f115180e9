"""Turn a model into what its plan says: stored weights, adapters, and what trains."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from peft.flags import PeftFlags
from peft.lora import lora_scale
from peft.plan import STATE, STORED, Plan, make_plan
from peft.quantized import read_store
from peft.registry import ADAPTERS, make_adapter
from peft.stores import make_store
from rwkv.checkpoint import TensorFile, config_of, fill, read_tensors, set_parameter
from rwkv.config import RWKVConfig
from rwkv.init import initialize
from rwkv.linear import Linear, Matrix
from rwkv.model import RWKV


def load_with_profile(
    path: Path | str,
    flags: PeftFlags,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[RWKV, Plan]:
    """Load a model and apply its profile layer by layer.

    A weight is quantized as soon as it is read, so memory never holds more than the finished
    model and one layer.

    Args:
        path, device, dtype, backend: as for rwkv.checkpoint.load_model; the file may be a
            quantized one.
        flags: as for make_plan.

    Raises:
        InputError: the file or the profile is wrong.
        RuntimeError: a package that a store needs is missing.
    """
    tensors = read_tensors(path)
    with torch.device("meta"):
        model = RWKV(config_of(tensors), backend)
    quantized = {layer: entry["storage"] for layer, entry in tensors.quantized.items()}
    plan = make_plan(model, flags, quantized)
    layer_of = {p: name for name, layer in plan.layers.items() for p in layer.parameters}

    def placed(parameter: str) -> None:
        name = layer_of[parameter]
        if name in quantized:
            _restore(model, name, tensors, device, dtype)
        install(model, name, plan)

    fill(model, tensors, device=device, dtype=dtype, placed=placed)
    mark_trained(model, plan)
    return model, plan


def new_with_profile(
    config: RWKVConfig,
    flags: PeftFlags,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    seed: int = 0,
) -> tuple[RWKV, Plan]:
    """A new model with BlinkDL's initialization and its profile, one block after the other.

    Memory never holds more than the finished model and one block in float32 on the CPU.

    Args:
        config: its sizes.
        flags: as for make_plan.
        device, dtype: of the parameters.
        backend: of the wkv operator.
        seed: of its matrices.

    Raises:
        InputError: the profile does not suit the model.
        RuntimeError: a package that a store needs is missing.
    """

    def fill(model: RWKV, placed: Callable[[str], None]) -> None:
        def moved(name: str) -> None:
            set_parameter(model, name, model.get_parameter(name).detach().to(device, dtype))
            placed(name)

        initialize(model, seed, placed=moved)

    return _filled(config, flags, backend, fill)


def random_with_profile(
    config: RWKVConfig,
    flags: PeftFlags,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    seed: int = 0,
    residual: float | None = None,
) -> tuple[RWKV, Plan]:
    """A model of random numbers to measure with, made in seconds at any size.

    Each layer is drawn on the device and stored before the next one is. A matrix hands on half of
    the size that it reads, times `residual` where its output is added to the residual stream.

    Args:
        residual: None for GPT-2's 1 / sqrt(2 n_layer), which keeps the stream of a deep model as
            large as that of a shallow one. How far an error of the weights spreads hangs on it.
        others: those of new_with_profile, and its errors.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), 2.3.
    """
    if residual is None:
        residual = (2 * config.n_layer) ** -0.5

    def fill(model: RWKV, placed: Callable[[str], None]) -> None:
        draw = torch.Generator(device).manual_seed(seed)
        for name, parameter in list(model.named_parameters()):
            value = torch.empty(parameter.shape, device=device, dtype=dtype)
            if ".ln" in name or name.startswith("ln"):
                value.fill_(float(name.endswith("weight")))
            else:  # a matrix hands on half of the size that it reads
                summed = value.shape[-1 if name.endswith(".weight") else -2]
                gain = residual if name.endswith(("att.output.weight", "ffn.value.weight")) else 1.0
                value.normal_(std=0.5 * gain / summed**0.5, generator=draw)
            set_parameter(model, name, value)
            del value  # else it is there beside the next one
            placed(name)

    return _filled(config, flags, backend, fill)


def _filled(
    config: RWKVConfig,
    flags: PeftFlags,
    backend: str,
    fill: Callable[[RWKV, Callable[[str], None]], None],
) -> tuple[RWKV, Plan]:
    """A model whose layers are stored and adapted as soon as `fill` has placed them."""
    with torch.device("meta"):
        model = RWKV(config, backend)
    plan = make_plan(model, flags)
    layer_of = {p: name for name, layer in plan.layers.items() for p in layer.parameters}
    fill(model, lambda parameter: install(model, layer_of[parameter], plan))
    mark_trained(model, plan)
    return model, plan


def load_frozen(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    storage: PeftFlags | None = None,
) -> RWKV:
    """Load a model that nothing trains; what a quantized file stores in few bits stays so.

    Args:
        path, device, dtype, backend: as for load_with_profile.
        storage: flags whose run stores more of it so, as that run does; None for none.

    Raises:
        InputError: the file is wrong, or the profile does not suit the model.
        RuntimeError: a package that a store needs is missing.
    """
    tensors = read_tensors(path)
    with torch.device("meta"):
        model = RWKV(config_of(tensors), backend)
    quantized = {layer: entry["storage"] for layer, entry in tensors.quantized.items()}
    plan = None if storage is None else make_plan(model, storage, quantized)

    def placed(parameter: str) -> None:
        name = parameter.removesuffix(".weight")
        if name in quantized:
            _restore(model, name, tensors, device, dtype)
        elif plan is not None and name in plan.layers and plan.layers[name].kind in STORED:
            _store(model, plan, name)

    fill(model, tensors, device=device, dtype=dtype, placed=placed)
    return model.requires_grad_(False).eval()


def _restore(
    model: RWKV,
    name: str,
    tensors: TensorFile,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> None:
    """Give a layer the store that a quantized file holds for it."""
    layer = model.get_submodule(name)
    assert isinstance(layer, Matrix)
    store = read_store(tensors, name).to(device)
    store.dtype = dtype or store.dtype
    layer.store_as(store)


def apply_profile(model: nn.Module, flags: PeftFlags) -> Plan:
    """Apply a profile to a model that is already filled, in place.

    Raises:
        InputError: the profile does not suit the model.
        RuntimeError: a package that a store needs is missing.
    """
    plan = make_plan(model, flags)
    for name in plan.layers:
        install(model, name, plan)
    mark_trained(model, plan)
    return plan


def install(model: nn.Module, name: str, plan: Plan) -> None:
    """Store one layer's weight and put its adapter in place; other layers stay as they are."""
    mine = plan.plans[name]
    if plan.layers[name].kind not in STORED or mine.mode == "full":
        return
    layer = model.get_submodule(name)
    layer.requires_grad_(False)
    late = mine.mode == "pissa"  # what it stores is the rest beside its first directions
    if not late:
        _store(model, plan, name)
    if mine.mode in ADAPTERS:
        assert isinstance(layer, Linear)
        layer = make_adapter(
            mine.mode,
            layer,
            rank=mine.rank,
            scale=lora_scale(mine.rank, mine.alpha or 0.0, rslora=plan.flags.rslora),
            dropout=mine.dropout,
            power=plan.flags.svd_niter,
        )
        model.set_submodule(name, layer)
    if late:
        _store(model, plan, name)


def _store(model: nn.Module, plan: Plan, name: str) -> None:
    layer, quant = model.get_submodule(name), plan.plans[name].quant
    assert isinstance(layer, Matrix)
    if quant is not None and quant != "none" and layer.weight is not None:
        layer.store_as(make_store(quant, layer.weight))


def mark_trained(model: nn.Module, plan: Plan) -> None:
    """Set requires_grad: adapters, full layers and a tuned state train, all else does not."""
    model.requires_grad_(False)
    for name, layer in plan.layers.items():
        mode = plan.plans[name].mode
        if mode in ADAPTERS:
            adapter = model.get_submodule(name)
            for part in ADAPTERS[mode].PARTS:
                getattr(adapter, part).requires_grad_(True)
        elif mode == "full":
            for full_name in layer.parameters:
                model.get_parameter(full_name).requires_grad_(True)
    for full_name, parameter in model.named_parameters():
        if full_name.endswith(f".{STATE}"):
            parameter.requires_grad_(True)
