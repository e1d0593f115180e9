"""The int8 candidates: kernels beside their formulas, products beside those of the dense weight.

Without a GPU the kernels run in Triton's interpreter, in a process of its own
(`test_in_the_interpreter`).
"""

import os

import pytest
import torch
from helpers import pass_in_the_interpreter

from peft.store_int8 import Int8Store
from peft.store_rows import rounded_rows
from tests import bench_int8
from tests.bench_int8 import CANDIDATES, WholeNumbers, multiplies_whole_numbers, rescaled
from tests.bench_stores import relative

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"

kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in another process")
pytestmark = pytest.mark.gpu if ON_GPU else []
added = pytest.mark.parametrize("adds", [False, True], ids=["new", "added"])
scaled = pytest.mark.parametrize("scaled", [False, True], ids=["rows", "rows and columns"])


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="runs the others where there is no GPU")
def test_in_the_interpreter():
    pass_in_the_interpreter(__file__, "-k", "kernel")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def factors(M: int, N: int, K: int) -> tuple[torch.Tensor, ...]:
    """Codes [M, K] and [N, K], scales of rows and columns, and what is there before, [M, N]."""
    left = rounded_rows("int8", normal(M, K, seed=0))
    right = rounded_rows("int8", normal(N, K, seed=1) * 0.02)
    return *left, *right, normal(M, N, seed=2)


@kernels
@added
@scaled
def test_the_kernel_rescales_as_the_formula(scaled, adds):
    from tests import int8_triton

    left, row_scale, right, column_scale, before = factors(5, 70, 32)
    sums = (left.cpu().int() @ right.cpu().int().T).to(DEVICE)
    columns = column_scale if scaled else None
    want = rescaled(sums, row_scale, columns, torch.float32, before.clone() if adds else None)
    into = before.clone() if adds else None
    got = int8_triton.rescale(sums, row_scale, columns, torch.float32, into)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert not adds or got is into


@kernels
@added
@scaled
@pytest.mark.parametrize("shape", [(40, 48, 80), (130, 32, 64)], ids=str)
def test_the_kernel_multiplies_as_the_formula(shape, scaled, adds):
    """Sides that fill no tile, and several tiles."""
    from tests import int8_triton

    left, row_scale, right, column_scale, before = factors(*shape)
    sums = (left.cpu().int() @ right.cpu().int().T).to(DEVICE)
    columns = column_scale if scaled else None
    want = rescaled(sums, row_scale, columns, torch.float32, before.clone() if adds else None)
    into = before.clone() if adds else None
    got = int8_triton.product(
        left, row_scale, right, columns, torch.float32, into, tile=(64, 64, 32, 4, 3)
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert not adds or got is into


@added
def test_whole_numbers_give_the_product_of_both_roundings(adds):
    """x and the scaled gradient rounded a token at a time, multiplied in float64."""
    weight = normal(64, 32, seed=1) * torch.logspace(-2, 0, 64, device=DEVICE).unsqueeze(1)
    store = WholeNumbers("int8", weight)
    x, grad = normal(2, 20, 32, seed=2), normal(2, 20, 64, seed=3)
    assert multiplies_whole_numbers(x, store.codes)
    before = [torch.ones_like(grad), torch.ones_like(x)] if adds else [None, None]
    codes, scale = rounded_rows("int8", x.view(40, 32))
    want = codes.double() * scale @ store.dense(torch.float64).T
    got = store.forward_product(x, before[0])
    assert relative(got.view(40, 64), want + adds) < 1e-6
    codes, scale = rounded_rows("int8", grad.view(40, 64), store.scale.T)
    want = codes.double() * scale @ store.codes.double()
    got = store.backward_product(grad, before[1])
    assert relative(got.view(40, 32), want + adds) < 1e-6


@pytest.mark.parametrize("rows, out", [(16, 64), (40, 72)], ids=["few rows", "odd side"])
def test_what_the_products_do_not_take_is_dequantized(rows, out):
    weight, x = normal(out, 32, seed=1), normal(rows, 32, seed=2)
    store = WholeNumbers("int8", weight)
    assert not multiplies_whole_numbers(x, store.codes)
    assert torch.equal(store.forward_product(x), Int8Store("int8", weight).forward_product(x))


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_is_near_the_weight(name):
    weight, x, grad = (
        normal(*shape, seed=seed).bfloat16()
        for seed, shape in enumerate([(64, 256), (32, 256), (32, 64)])
    )
    store = CANDIDATES[name]("int8", weight)
    assert relative(store.dense(torch.bfloat16), weight) < 0.013
    assert relative(store.forward_product(x), x @ weight.T) < 0.016
    assert relative(store.backward_product(grad), grad @ weight) < 0.016


def test_the_command_measures_every_candidate(capsys):
    words = "--sides 32 64 --tokens 32 --layers 1 --channels 64 --vocabulary 64 --scored 8"
    assert bench_int8.main([*words.split(), "--context", "8"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name} " in out for name in CANDIDATES) and out.count("none, ") == 4
