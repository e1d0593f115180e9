"""All gradients' norm and AdamW's step in one launch, beside torch's in float32.

Without a GPU they run in Triton's interpreter, which must be chosen before triton is imported; so
this file then runs itself in a process of its own (`test_in_the_interpreter`).
"""

import os

import pytest
import torch
from helpers import assert_close, pass_in_the_interpreter
from torch import Tensor

from rwkv.training.optimizer import FusedAdamW, MasterWeights, gradient_norm

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
BF16, FP32 = torch.bfloat16, torch.float32
EVEN = ((4096,), (64, 160), (16,))  # sizes and addresses of multiples of 16
ODD = ((5, 3), (4097,), (1,), (64, 160))

kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in another process")
pytestmark = pytest.mark.gpu if ON_GPU else []


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="runs the others where there is no GPU")
def test_in_the_interpreter():
    pass_in_the_interpreter(__file__)


def parameters(shapes: tuple, dtypes: tuple, draw: torch.Generator) -> list[Tensor]:
    return [
        torch.randn(shape, generator=draw).to(DEVICE, dtype).requires_grad_()
        for dtype in dtypes
        for shape in shapes
    ]


@kernels
@pytest.mark.parametrize("shapes", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("dtypes", [(BF16,), (FP32,), (BF16, FP32)], ids=str)
def test_the_norm_is_that_of_all_gradients(shapes, dtypes):
    draw = torch.Generator().manual_seed(0)
    params = parameters(shapes, dtypes, draw)
    assert gradient_norm(params) == 0
    for p in params[1:]:
        p.grad = torch.randn(p.shape, generator=draw).to(p)
    want = torch.stack([p.grad.double().square().sum() for p in params[1:]]).sum().sqrt()
    assert_close("norm", gradient_norm(params), want, 1e-6)
    apart = torch.zeros(2 * 33, device=DEVICE, dtype=dtypes[0])[1::2]  # not contiguous
    apart.copy_(torch.arange(33))
    other = apart.new_zeros(33).requires_grad_()
    other.grad = apart
    assert_close("norm", gradient_norm([other]), apart.double().norm(), 1e-6)
    params[1].grad[-1] = float("nan")
    assert gradient_norm(params).isnan()


@kernels
@pytest.mark.parametrize("limit", [None, 0.5], ids=["whole", "clipped"])
@pytest.mark.parametrize("shapes", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("dtypes", [(BF16,), (FP32,), (BF16, FP32)], ids=str)
def test_steps_are_torchs_in_float32(shapes, dtypes, limit):
    """Two groups, rates that change, and a parameter that has no gradient in every third step."""
    draw = torch.Generator().manual_seed(1)
    params = parameters(shapes, dtypes, draw)
    twins = [p.detach().double().requires_grad_() for p in params]
    keys = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}

    def groups(tensors: list[Tensor]) -> list[dict]:
        return [
            {"params": tensors[::2], "weight_decay": 0.1},
            {"params": tensors[1::2], "lr": 3e-2, "weight_decay": 0.0},
        ]

    ours = MasterWeights(groups(params), lambda some: FusedAdamW(some, **keys))
    exact = torch.optim.AdamW(groups(twins), **keys)
    for step in range(8):
        for optimizer in (ours, exact):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        for number, (p, twin) in enumerate(zip(params, twins, strict=True)):
            p.grad = torch.randn(p.shape, generator=draw).to(p)
            twin.grad = p.grad.double()
            if number == 1 and step % 3 == 1:
                p.grad = twin.grad = None
        if limit is not None:
            ours.clip(gradient_norm(params), limit)
            torch.nn.utils.clip_grad_norm_(twins, limit)
        ours.step()
        exact.step()
    for p, twin in zip(params, twins, strict=True):
        master = ours.master(p)
        assert_close("weight", master.detach(), twin.detach(), 1e-6)
        assert torch.equal(p, master.to(p.dtype))
        for mean in ("exp_avg", "exp_avg_sq"):
            got, want = ours.inner.state[master][mean], exact.state[twin][mean]
            assert_close(mean, got, want, 1e-6)
    assert ours.inner.state[ours.master(params[1])]["step"] == 5


@kernels
def test_a_gradient_of_another_layout_is_the_same():
    draw = torch.Generator().manual_seed(2)
    (some,) = parameters(((64, 160),), (BF16,), draw)
    other = some.detach().clone().requires_grad_()
    some.grad = torch.randn(160, 64, generator=draw).to(some).T
    other.grad = some.grad.contiguous()
    for p in (some, other):
        MasterWeights([{"params": [p]}], adamw).step()
    assert torch.equal(some, other)


def adamw(groups: list[dict]) -> FusedAdamW:
    return FusedAdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8)


@kernels
def test_a_loaded_state_goes_on():
    """Three steps, and two with the state handed on before the third; the same bits."""
    draw = torch.Generator().manual_seed(4)
    params = parameters(ODD, (BF16, FP32), draw)
    twins = [p.detach().clone().requires_grad_() for p in params]
    whole, first = (MasterWeights([{"params": some}], adamw) for some in (params, twins))
    for step in range(3):
        if step == 2:
            second = MasterWeights([{"params": twins}], adamw)
            for p in twins:
                second.master(p).data.copy_(first.master(p))
            second.inner.load_state_dict(first.inner.state_dict())
            first = second
        for p, twin in zip(params, twins, strict=True):
            p.grad = torch.randn(p.shape, generator=draw).to(p)
            twin.grad = p.grad.clone()
        whole.step()
        first.step()
    for p, twin in zip(params, twins, strict=True):
        assert torch.equal(p, twin)
