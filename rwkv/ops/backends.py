"""Choose the implementation that runs an operator.

An operator owns a table {backend name: module path}, best first. A backend module offers

    why_not(sample, packed) -> str | None    why it cannot run this call
    why_slow(sample, packed) -> str | None   optional: why another backend should run it
    run(...)                                 the operator's own tensors, checked and of one dtype

where `sample` is one input, [B, T, H, N], of which only device, dtype and shape are read, and
`packed` says whether the call has cu_seqlens. `auto` takes the first backend that neither function
refuses, else the first that can run; a backend named by the caller is only asked `why_not`. A
module is imported when its turn comes, once, so what is listed behind the chosen one may be
missing from the machine.
"""

import importlib
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv.errors import InputError, RunError

TRACED_TOKENS = 4096  # of a text, where the real number is not known


class Choice(NamedTuple):
    """The backend of one call, and the reasons against those listed before it."""

    name: str
    module: ModuleType
    passed_over: dict[str, str]


def choose_backend(
    op: str, table: dict[str, str], wanted: str, sample: Tensor, packed: bool
) -> Choice:
    """Find the backend that runs this call of `op`.

    Args:
        op: the operator's name, for messages only.
        table: backend name -> module path, best first.
        wanted: a name from `table`, or "auto".
        sample: one input, [B, T, H, N].
        packed: whether the call has cu_seqlens.

    Raises:
        InputError: `wanted` is not in `table`.
        RunError: the wanted backend (or, under "auto", every one) cannot run this call;
            the message gives each backend's own reason.
    """
    if wanted != "auto" and wanted not in table:
        raise InputError(f"{op}: no backend {wanted!r}; choose one of auto, {', '.join(table)}")
    refusals: dict[str, str] = {}
    slow: Choice | None = None
    for name in table if wanted == "auto" else (wanted,):
        module = _load(table[name])
        if isinstance(module, str):
            refusals[name] = module
            continue
        reason = module.why_not(sample, packed)
        if reason is None and wanted == "auto" and hasattr(module, "why_slow"):
            reason = module.why_slow(sample, packed)
            if reason is not None and slow is None:
                slow = Choice(name, module, dict(refusals))
        if reason is None:
            return Choice(name, module, refusals)
        refusals[name] = reason
    if slow is not None:
        return slow
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise RunError(f"{op}: --kernel {wanted} cannot run here ({reasons}); use --kernel auto")


def choice_for(
    op: str,
    shape: tuple[int, int, int, int],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    packed: bool = False,
    backend: str = "auto",
) -> Choice:
    """The backend that will run `op`.

    Args:
        op: "wkv7" or "wkv6".
        shape: B, T, H and N of the calls to come.
        device, dtype: of the tensors to come.
        packed: whether the calls will have cu_seqlens.
        backend: as the operator's argument.

    Raises:
        InputError, RunError: as `choose_backend`.
    """
    table = importlib.import_module(f"rwkv.ops.{op}").BACKENDS
    sample = torch.empty((), device=device, dtype=dtype).expand(shape)
    return choose_backend(op, table, backend, sample, packed)


def describe_choice(op: str, choice: Choice) -> str:
    """Say in one line which backend runs `op`, and why each better one does not.

    Returns:
        such as "wkv7: torch (cuda: needs a GPU, the tensors are on cpu; triton: ...)".
    """
    reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.passed_over.items())
    return f"{op}: {choice.name}" + (f" ({reasons})" if reasons else "")


@torch.compiler.assume_constant_result
def _constant_path(
    op: str, wanted: str, device: str, dtype: torch.dtype, N: int, packed: bool
) -> str:
    shape = (1, TRACED_TOKENS, 1, N)
    choice = choice_for(op, shape, device=device, dtype=dtype, packed=packed, backend=wanted)
    return choice.module.__name__


def backend_module(
    op: str, table: dict[str, str], wanted: str, sample: Tensor, packed: bool
) -> ModuleType:
    """The module that runs a call, as `choose_backend`.

    A constant where torch.compile traces, to which lengths are symbols: chosen for long texts.
    """
    if torch.compiler.is_compiling():
        N = int(sample.shape[-1])
        path = _constant_path(op, wanted, sample.device.type, sample.dtype, N, packed)
        return _imported[path]
    return choose_backend(op, table, wanted, sample, packed).module


_imported: dict[str, ModuleType] = {}


@cache
def _load(path: str) -> ModuleType | str:
    """The module, or the reason why it cannot be imported; a failed search is not repeated."""
    try:
        _imported[path] = importlib.import_module(path)
    except ImportError as error:
        return f"cannot be imported ({error})"
    return _imported[path]
