"""Where the fused kernels of a block run, and what their launches share.

Between its matrix products a block reads and writes whole activations, and on a GPU that is what
its time goes to. Each fusion is one function (`norm_mix`, `wkv7_inputs`, `head_output`,
`activation`) with two implementations: the formulas in plain torch, which are the reference and
run everywhere, and a Triton kernel each way, where `uses_kernels` says so.

The kernels compute in float32, whatever the tensors are. They are deterministic: the gradient of
a parameter is summed over the rows of each program and then over the programs, without atomics.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float32)


def uses_kernels(x: Tensor, *parameters: Tensor) -> bool:
    """Whether a fusion runs as a kernel: not on a CPU, for other dtypes or without Triton.

    Args:
        x: an activation.
        parameters: of the modules that the kernel stands for; under ZeRO-3 those of a module that
            is not running are empty.
    """
    return (
        x.dtype in DTYPES
        and x.numel() > 0
        and has_kernels(x.device)
        and all(parameter.numel() > 0 for parameter in parameters)
    )


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton is there and compiles for the device, or interprets."""
    try:
        import triton
    except ImportError:
        return False
    if triton.knobs.runtime.interpret:
        return True
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def rows_a_program(rows: int, device: torch.device, programs: int, most: int | None = None) -> int:
    """How many consecutive rows a program handles.

    Args:
        rows: of the activation.
        device: on which the kernel runs.
        programs: how many for each multiprocessor there should be at least, if rows suffice.
        most: rows a program may handle; None where partial sums should be few.
    """
    count = -(-rows // (programs * _processors(device)))
    return max(1, count if most is None else min(count, most))


def sums_of_programs(
    partial: Tensor, parameters: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of parameters from each program's share.

    Args:
        partial: float32, [programs, parameters that are wanted, channels].
        parameters: all of them, of any shape with that many channels.
        wanted: which of them have a gradient.

    Returns:
        for each of `parameters` its gradient, or None.
    """
    if not any(wanted):
        return [None] * len(parameters)
    dtypes = {p.dtype for p, want in zip(parameters, wanted, strict=True) if want}
    total = partial.sum(dim=0)
    if len(dtypes) == 1:
        total = total.to(dtypes.pop())
    rows = iter(total)
    return [
        next(rows).to(p.dtype).view_as(p) if want else None
        for p, want in zip(parameters, wanted, strict=True)
    ]


def flags(wanted: Sequence[bool]) -> int:
    """A number whose bit i says whether i is wanted: a kernel is compiled for each."""
    return sum(1 << i for i, want in enumerate(wanted) if want)
