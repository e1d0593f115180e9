"""Shared by the tests: random operator inputs, an operator's gradients, and a relative error that
names what differs."""

import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rwkv.errors import RunError
from rwkv.ops.backends import choose_backend


def wkv7_inputs(
    *, B=2, T=32, H=2, N=16, dtype=torch.float32, device="cpu", seed=0
) -> dict[str, Tensor]:
    """Inputs shaped like a trained RWKV-7 layer's: w <= -0.5, |kk| = 1, iclr in (0, 1)."""
    g = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(B, T, H, N, generator=g, dtype=torch.float64)

    r, k, v = draw(), draw(), draw()
    w = -F.softplus(draw()) - 0.5
    kk, iclr = F.normalize(draw(), dim=-1), torch.sigmoid(draw())
    tensors = {"r": r, "w": w, "k": k, "v": v, "a": -kk, "b": kk * iclr}
    return {name: x.to(device, dtype) for name, x in tensors.items()}


def wkv6_inputs(
    *, B=2, T=32, H=2, N=16, dtype=torch.float32, device="cpu", seed=0
) -> dict[str, Tensor]:
    """Inputs shaped like a trained RWKV-6 layer's: w mostly from -6 to 1, without a bound."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tensors = {name: draw(B, T, H, N) for name in "rwkv"}
    tensors["w"] = 1.5 * tensors["w"] - 2
    tensors["u"] = draw(H, N)
    return {name: x.to(device, dtype) for name, x in tensors.items()}


def random_state(
    inputs: dict[str, Tensor], *, Q: int | None = None, scale: float = 1.0, seed: int = 1
) -> Tensor:
    """A state [Q, H, N, N] for the inputs, float32 (float64 if they are); Q = B if None."""
    v = inputs["v"]
    B, _, H, N = v.shape
    g = torch.Generator().manual_seed(seed)
    state = scale * torch.randn(Q or B, H, N, N, generator=g, dtype=torch.float64)
    return state.to(v.device, torch.promote_types(v.dtype, torch.float32))


def with_gradients(
    op: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    state: Tensor,
    flows: Sequence[Tensor] | None = None,
    **options,
) -> dict[str, Tensor]:
    """y and the last state of an operator, and the gradients (`d_NAME`) of all it was given.

    `flows` are what flows back into y and the last state; None for random ones, the same for equal
    shapes.
    """
    leaves = {
        name: x.detach().clone().requires_grad_() for name, x in (inputs | {"state": state}).items()
    }
    outputs = op(**leaves, **options)
    if flows is None:
        g = torch.Generator().manual_seed(2)
        flows = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in outputs]
    torch.autograd.backward(outputs, [g.to(x) for g, x in zip(flows, outputs, strict=True)])
    gradients = {f"d_{name}": leaf.grad for name, leaf in leaves.items()}
    return {"y": outputs[0].detach(), "last state": outputs[1].detach()} | gradients


def skip_unless_able(
    op: str, table: dict[str, str], backend: str, sample: Tensor, *, packed: bool = False
) -> None:
    """Skip the test, with the backend's own reason, where it cannot run such a call of `op`."""
    try:
        choose_backend(op, table, backend, sample, packed)
    except RunError as error:
        pytest.skip(str(error))


def pass_in_the_interpreter(file: str, *words: str) -> None:
    """Pass a file's tests, chosen by pytest's `words`, in a process whose Triton interprets."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-q", "-p", "no:cacheprovider", *words],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def assert_close(name: str, got: Tensor, want: Tensor, ratio: float) -> None:
    """Fail unless rms(got - want) <= ratio * rms(want)."""
    got, want = got.double().cpu(), want.double().cpu()
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, not {list(want.shape)}"
    assert got.isfinite().all(), (
        f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} values are not finite"
    )
    error = (
        (got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30)
    ).item()
    assert error <= ratio, f"{name}: relative error {error:.2e}, allowed {ratio:.0e}"


def assert_all_close(got: dict[str, Tensor], want: dict[str, Tensor], ratio: float) -> None:
    """assert_close for each of `want`."""
    for name, value in want.items():
        assert_close(name, got[name], value, ratio)


class LivingBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that still live."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.now, self.most, self.sizes = 0, 0, {}
        for tensor in (*model.parameters(), *model.buffers()):
            self.sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._drop, key)
        return out

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)
