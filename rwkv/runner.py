"""What generate, chat and score share: the flags that name a model, and opening it.

A tuned state is a file of `blocks.N.att.time_state`, [H, N, N], values on rows and keys on columns
(RWKV-LM's kernels read it so in both versions; runners that keep keys on rows transpose it). It may
also have `blocks.N.shift_state`, [2, C]: what time mix and channel mix take for the token before.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rwkv.checkpoint import TensorFile
    from rwkv.model import RWKV
    from rwkv.tokenizer import Tokenizer

STORAGE_NEEDS = {"quant": "layer_profile", "quant_mode": "quant 1", "quant_head": "quant 1"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --load_model, --adapter, --alpha, --state, --tokenizer, --device, --dtype, --kernel."""
    group = parser.add_argument_group("model")
    group.add_argument("--load_model", type=Path, required=True, help="the model's file or folder")
    group.add_argument("--adapter", type=Path, help="an adapter file trained on it")
    group.add_argument(
        "--alpha", type=float, help="of LoRA and DoRA files that do not state it (RWKV-LM-RLHF's)"
    )
    group.add_argument("--state", type=Path, help="a tuned initial state")
    group.add_argument(
        "--tokenizer",
        default="",
        help="world, bytes, bytes:ENCODING or chars:CHARACTERS; if not given, by the vocabulary",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    group.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bf16 on a GPU, else fp32"
    )
    group.add_argument("--kernel", default="auto", help="backend of the wkv operator (auto)")


def add_template_arguments(parser: argparse.ArgumentParser, template: str, help: str) -> None:
    """Add --template, with its default and help, and --turn_end."""
    parser.add_argument("--template", default=template, help=help)
    parser.add_argument(
        "--turn_end", default="", help="what ends an answer: suffix, eot or both (the template's)"
    )


def add_storage_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --layer_profile, --quant, --quant_mode and --quant_head: the storage of a run."""
    from peft.flags import QUANT_ALIASES, QUANT_MODES

    group = parser.add_argument_group("storage, as of the run that takes the scores")
    group.add_argument("--layer_profile", default="", help="of the run; its adapters do nothing")
    group.add_argument("--quant", action="store_true", help="as for train.py")
    group.add_argument(
        "--quant_mode", choices=(*QUANT_MODES, *QUANT_ALIASES), help="as for train.py (nf4)"
    )
    group.add_argument("--quant_head", action="store_true", help="as for train.py")


def storage_of(model: "RWKV") -> dict[str, str]:
    """The word of each layer that a model keeps in fewer bits."""
    from rwkv.linear import Matrix

    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, Matrix))
    return {name: layer.store.kind for name, layer in layers if layer.store is not None}


def given_scales(options: argparse.Namespace) -> list[float]:
    """alpha / rank of each layer of the adapter's file that does not state it; see --alpha."""
    from peft.adapter_file import read_adapter
    from peft.registry import LOW_RANK

    if options.alpha is None:
        return []
    _, kinds, _ = read_adapter(options.adapter, alpha=options.alpha)
    return [kind.scale for kind in kinds.values() if kind.mode in LOW_RANK]


def open_model(options: argparse.Namespace, *, merged: bool = False) -> "tuple[RWKV, Tokenizer]":
    """The frozen model and tokenizer that the flags of `add_model_arguments` name.

    Args:
        options: the parsed flags, with those of `add_storage_arguments` or without. The model's
            file may be a quantized one.
        merged: put the adapter into the weights, which makes single tokens faster and changes the
            numbers by the rounding of the weights' dtype; else it stays beside them, as it was
            trained. Quantized weights are left as they are.

    Raises:
        InputError: a file is wrong, does not fit the model, or the device is not there.
    """
    import torch

    from peft.apply import load_frozen
    from peft.flags import PeftFlags
    from rwkv.checkpoint import config_of, read_tensors
    from rwkv.ops import wkv6, wkv7
    from rwkv.tokenizer import load_tokenizer

    if options.kernel not in ("auto", *wkv6.BACKENDS, *wkv7.BACKENDS):
        known = dict.fromkeys(("auto", *wkv7.BACKENDS, *wkv6.BACKENDS))
        raise InputError(f"--kernel {options.kernel}: no such backend; choose {', '.join(known)}")
    if options.alpha is not None and not options.adapter:
        raise InputError(f"--alpha {options.alpha:g}: has no effect without --adapter; drop it")
    device = named_device(options.device)
    name = DTYPES.get(options.dtype, "float32" if device.type == "cpu" else "bfloat16")
    dtype = getattr(torch, name)
    config = config_of(read_tensors(options.load_model))
    tokenizer = load_tokenizer(options.tokenizer or None, config.vocab_size)
    storage = None
    for name, switch in STORAGE_NEEDS.items():
        if getattr(options, name, None) and not getattr(options, switch.split()[0]):
            raise InputError(f"--{name}: has no effect without --{switch}; add it, or drop it")
    if getattr(options, "layer_profile", ""):
        storage = PeftFlags(
            layer_profile=options.layer_profile,
            quant=options.quant,
            quant_mode=options.quant_mode or "nf4",
            quant_head=options.quant_head,
        )
    model = load_frozen(
        options.load_model, device=device, dtype=dtype, backend=options.kernel, storage=storage
    )
    if options.adapter:
        put_adapter(model, options.load_model, options.adapter, options.alpha, merged=merged)
    if options.state:
        load_state(model, read_tensors(options.state))
    return model, tokenizer


def put_adapter(
    model: "RWKV", base: Path, adapter: Path, alpha: float | None = None, *, merged: bool
) -> None:
    """Put an adapter, and its tuned state if it has one, into a loaded model.

    Args:
        model: of the file `base`.
        adapter: its file.
        alpha: for files that do not state it.
        merged: as for `open_model`.

    Raises:
        InputError: the adapter's file is wrong or does not belong to the base's.
    """
    from peft.merging import attach, changes, open_pair
    from rwkv.checkpoint import read_tensors, set_parameter

    pair = open_pair(read_tensors(base), adapter, alpha=alpha)
    if merged and not pair.base.quantized:
        for name, value in changes(pair):
            old = model.get_parameter(name)
            set_parameter(model, name, value.reshape(old.shape).to(old))
    else:
        attach(pair, model)
        model.requires_grad_(False).eval()
    load_start(model, pair.adapter)


def load_start(model: "RWKV", adapter: "TensorFile") -> bool:
    """Give a model the state that texts start from in an adapter file, or the one behind its
    prefix; whether it has either.

    Raises:
        InputError: the state or the prefix does not fit the model.
    """
    import torch

    from rwkv.state import state_tensors

    found = any(name.endswith(".time_state") for name in adapter)
    if found:
        load_state(model, adapter)
    if "prefix" not in adapter:
        return found
    length, width = adapter.shapes["prefix"]
    if width != model.config.n_embd:
        raise InputError(
            f"{adapter.path}: prefix is {[length, width]}, the model's embeddings have "
            f"{model.config.n_embd} channels; name the base it was trained on"
        )
    prefix = adapter["prefix"].to(model.ln_out.weight)
    model.prefix = torch.nn.Parameter(prefix, requires_grad=False)
    with torch.no_grad():
        start = state_tensors(model.initial_state(1))
    model.prefix = None  # read once, here
    _start_from(model, start)
    return True


def load_state(model: "RWKV", tensors: "TensorFile") -> None:
    """Give each layer the state that texts start from; other tensors of the file are left alone.

    Raises:
        InputError: the file has no state, or one of another shape or number of layers.
    """
    config = model.config
    expected = {
        "att.time_state": (config.n_head, config.head_size, config.head_size),
        "shift_state": (2, config.n_embd),
    }
    state: dict[str, Tensor] = {}
    for part, shape in expected.items():
        wanted = [f"blocks.{layer}.{part}" for layer in range(config.n_layer)]
        found = [name for name in tensors.shapes if name.endswith(f".{part}")]
        if not found and part == "shift_state":
            continue
        if not found:
            raise InputError(f"{tensors.path}: holds no time_state; name a file of a tuned state")
        if sorted(found) != sorted(wanted):
            raise InputError(
                f"{tensors.path}: has the states of {len(found)} layers, the model has "
                f"{config.n_layer}; name a state tuned on this model"
            )
        for name in wanted:
            if tensors.shapes[name] != shape:
                raise InputError(
                    f"{tensors.path}: {name} is {list(tensors.shapes[name])}, the model asks for "
                    f"{list(shape)}; name a state tuned on this model"
                )
            state[name] = tensors[name]
    _start_from(model, state)


def _start_from(model: "RWKV", state: "Mapping[str, Tensor]") -> None:
    import torch

    device = model.device
    for name, tensor in state.items():
        owner, _, part = name.rpartition(".")
        value = tensor.to(device, torch.float32, copy=True)
        setattr(model.get_submodule(owner), part, torch.nn.Parameter(value, requires_grad=False))


def named_device(name: str) -> "torch.device":
    """The device of --device: auto, cpu, cuda or cuda:N.

    Raises:
        InputError: there is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: no such device; choose auto, cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: torch sees {torch.cuda.device_count()} GPUs; use --device cpu"
        )
    return device
