"""Adapters' kernels of one pass against torch: on a GPU, and in Triton's interpreter."""

import os

import pytest
import torch
from helpers import assert_close, pass_in_the_interpreter

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in another process")
pytestmark = pytest.mark.gpu if ON_GPU else []


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="runs the others where there is no GPU")
def test_in_the_interpreter():
    pass_in_the_interpreter(__file__)


@kernels
@pytest.mark.parametrize("T, N, R", [(1, 16, 16), (130, 200, 64), (256, 128, 32), (3, 384, 128)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("where", ["in place", "in a new tensor", "to nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_added(T, N, R, transposed, activated, where, dtype):
    from rwkv.ops.low_rank import plus_product

    g = torch.Generator().manual_seed(0)
    device = "cuda" if ON_GPU else "cpu"

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    some, low = draw(T, N), draw(T, R)
    factor = draw(N, R).T if transposed else draw(R, N)
    before, kept = (None if where == "to nothing" else some), some.clone()
    want = low.double() @ factor.double() + (0 if before is None else some.double())
    want = want.relu().square() if activated else want
    into = some if where == "in place" else None
    out = plus_product(before, low, factor, out=into, activated=activated)
    assert_close("out", out, want, 1e-6 if dtype == torch.float32 else 4e-3)
    assert out is into or torch.equal(some, kept)


@kernels
def test_a_stream_that_is_not_contiguous_is_added_to():
    from rwkv.ops.low_rank import plus_product

    g = torch.Generator().manual_seed(0)
    wide, low, factor = (torch.randn(shape, generator=g) for shape in ((7, 128), (7, 16), (16, 64)))
    device = "cuda" if ON_GPU else "cpu"
    before, low, factor = (x.to(device) for x in (wide[:, ::2], low, factor))
    out = plus_product(before, low, factor)
    torch.testing.assert_close(out, before + low @ factor, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="float64, which needs no kernel")
@pytest.mark.parametrize("used", ["product", "x", "both"])
@pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
def test_the_thin_product_and_what_is_read_behind_it_have_their_gradients(used, trains):
    from rwkv.ops.low_rank import low_rank

    g = torch.Generator().manual_seed(0)
    x, factor = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((2, 3, 8), (8, 4)))
    leaves = [x.requires_grad_(), *([factor.requires_grad_()] if trains else [])]

    def parts(low: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        return {"product": [low], "x": [x], "both": [low, x]}[used]

    def gradients(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        total = sum((out * torch.arange(out.numel()).view_as(out)).sum() for out in outputs)
        return torch.autograd.grad(total, leaves, materialize_grads=True)

    got, want = parts(*low_rank(x, factor)), parts(x @ factor, x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(got), gradients(want))


@kernels
@pytest.mark.parametrize("rank", [16, 24], ids=["kernel", "no kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_gradients_of_x_are_added_in_one_pass(rank, dtype):
    """That of x itself is not contiguous, the factor is transposed."""
    from rwkv.ops.low_rank import low_rank

    x, factor, flow = (
        channels(*shape, dtype, seed).requires_grad_()
        for seed, shape in enumerate([(14, 64), (64, rank), (64, 14)])
    )
    x = x.detach().view(2, 7, 64).requires_grad_()
    low, again = low_rank(x, factor)
    grads = channels(14, rank, dtype, 3).view(2, 7, rank), flow.detach().T.view(2, 7, 64)
    got = torch.autograd.grad((low, again), (x, factor), grads)
    rows, behind = (grad.double().flatten(0, 1) for grad in grads)
    allowed = 1e-5 if dtype == torch.float32 else 5e-3
    want = behind + rows @ factor.double().T
    assert_close("x", got[0].flatten(0, 1), want, allowed)
    assert_close("factor", got[1], x.double().flatten(0, 1).T @ rows, allowed)


BLOCKS = [(1, 32, 8), (13, 192, 64), (9, 1088, 64), (8, 640, 128), (17, 768, 256), (5, 144, 48)]
blocks = pytest.mark.parametrize("n, C, R", BLOCKS)
pairs = pytest.mark.parametrize(
    "wide, narrow",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)


def channels(n: int, C: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    x = torch.randn(n, C, generator=torch.Generator().manual_seed(seed))
    return x.to("cuda" if ON_GPU else "cpu", dtype)


@kernels
@blocks
@pairs
def test_a_sum_is_added_to_every_block_as_torch_adds_it(n, C, R, wide, narrow):
    """One addition in float32 and one rounding, so every bit; 48 is no power of two."""
    from peft.bone import add_to_blocks

    out, total = channels(n, C, wide), channels(n, R, narrow, 1)
    want = out + total.repeat(1, C // R)
    add_to_blocks(out, total)
    torch.testing.assert_close(out, want, rtol=0, atol=0)


@kernels
@blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_blocks_are_summed_in_float32(n, C, R, dtype):
    from peft.bone import sum_of_blocks

    x = channels(n, C, dtype)
    want = x.double().unflatten(1, (-1, R)).sum(dim=1)
    got = sum_of_blocks(x, R)
    assert got.dtype == dtype and got.shape == (n, R)
    assert_close("sum", got, want, 1e-6 if dtype == torch.float32 else 4e-3)


@kernels
def test_rows_that_are_not_contiguous_are_summed_and_added_to():
    from peft.bone import add_to_blocks, sum_of_blocks

    x, total = channels(7, 128, torch.float32)[:, ::2], channels(7, 16, torch.float32, 1)
    want = x.unflatten(1, (-1, 16)).sum(dim=1)
    torch.testing.assert_close(sum_of_blocks(x, 16), want, rtol=1e-6, atol=1e-6)
    want = x + total.repeat(1, 4)
    add_to_blocks(x, total)
    torch.testing.assert_close(x, want, rtol=0, atol=0)


@kernels
@pytest.mark.skipif(not ON_GPU, reason="needs 10 GiB of a GPU")
def test_more_than_two_to_the_31_numbers():
    """An index of 32 bits would leave the last rows as they were or end elsewhere."""
    from peft.bone import add_to_blocks, sum_of_blocks

    n, C, R = 2**31 // 8192 + 8, 8192, 64
    out = torch.zeros(n, C, dtype=torch.bfloat16, device="cuda")
    total = torch.arange(R, device="cuda").expand(n, R).to(torch.bfloat16).contiguous()
    add_to_blocks(out, total)
    assert all(torch.equal(out[i].view(-1, R), total[:1].expand(C // R, R)) for i in (0, -9, -1))
    assert torch.equal(sum_of_blocks(out, R), total * (C // R))
