"""Stores: how far codes are from the weight, what they occupy, and that nothing changes them."""

import itertools
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import LivingBytes
from torch.nn import functional as F

import peft.apply
import peft.store
import rwkv.checkpoint
from losses.sft import SFT
from peft import store_bnb, store_fpx, store_int8
from peft.apply import install, load_frozen, load_with_profile, random_with_profile
from peft.flags import QUANT_MODES, PeftFlags
from peft.plan import Plan
from peft.quantize import main
from peft.quantized import read_store
from peft.store import Store
from peft.store_bnb import _table
from peft.store_fp8 import native_gradient, native_product
from peft.store_fpx import BLOCK, FORMATS, SCALES, PackedFloatStore
from peft.store_rows import CODES, LARGEST, TINY, RowStore, rounded_rows
from peft.stores import STORES, make_store, store_class, stored_size
from rwkv import linear
from rwkv.batch import TokenBatch
from rwkv.checkpoint import (
    config_of,
    fingerprint,
    load_model,
    read_tensors,
    set_parameter,
    write_tensors,
)
from rwkv.config import LowRanks, RWKVConfig
from rwkv.errors import InputError
from rwkv.init import initialize
from rwkv.linear import SLICE, Linear
from rwkv.model import RWKV

OUT, IN = 96, 256
kinds = pytest.mark.parametrize("kind", STORES)

# relative error (root mean square) of 512 x 1024 Gaussian weights, measured, and bits a weight
ERROR = {
    "nf4": 0.0871,
    "nf4_double": 0.0871,
    "fp4": 0.1145,
    "fp4_double": 0.1145,
    "int8": 0.0079,
    "fp8": 0.0264,
    "fp6": 0.0436,
    "fp6_e2m3": 0.0234,
    "fp5": 0.0476,
}
BITS = {
    "nf4": 4.5,
    "nf4_double": 4.15,
    "fp4": 4.5,
    "fp4_double": 4.15,
    "int8": 8.1,
    "fp8": 8.1,
    "fp5": 5.3,
}
BITS |= {"fp6": 6.3, "fp6_e2m3": 6.3}


def weight(dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (OUT, IN)) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def test_every_storage_has_a_flag_and_measured_numbers():
    assert set(STORES) == set(QUANT_MODES) == set(ERROR) == set(BITS)


@kinds
def test_error_is_as_measured(kind):
    w = weight(shape=(512, 1024))
    error = relative(make_store(kind, w).dense(torch.float32), w)
    assert error == pytest.approx(ERROR[kind], rel=0.03)


@kinds
def test_bits_are_as_stated(kind):
    store = make_store(kind, weight(shape=(512, 1024)))
    assert store.bytes() * 8 / (512 * 1024) <= BITS[kind]


@kinds
@pytest.mark.parametrize("shape", [(OUT, IN), (12, 32), (7, 37)], ids=str)
def test_any_shape_is_stored_in_the_size_foretold(kind, shape):
    store = make_store(kind, weight(shape=shape))
    assert store.dense(torch.float32).shape == shape
    assert store.bytes() == stored_size(kind, *shape)


@kinds
@pytest.mark.parametrize("shape", [(OUT, IN), (50, 64), (33, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_those_of_the_dense_weight(kind, shape, dtype):
    """Also where scales are shared between rows: 256 of nf4_double's, 64 weights of 40 columns."""
    store = make_store(kind, weight(dtype, shape))
    index = torch.randint(shape[0], (2, 5), generator=torch.Generator().manual_seed(1))
    for some in (index, index[:1, :1]):
        rows = store.rows(some)
        assert rows.dtype == dtype and torch.equal(rows, store.dense(dtype)[some])


@kinds
@pytest.mark.parametrize("shape", [(OUT, IN), (7, 37), (5, 192)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_have_the_bits_of_the_whole(kind, shape, dtype, monkeypatch):
    """Of codes, scales and the dense weight; a slice of 128 is less than a row, or some."""
    w = weight(dtype, shape)
    whole = make_store(kind, w)
    dense = {some: whole.dense(some) for some in (torch.float32, torch.bfloat16, torch.float16)}
    for module in (store_bnb, store_fpx, linear):
        monkeypatch.setattr(module, "SLICE", 128)
    parts = make_store(kind, w).tensors()
    assert parts.keys() == whole.tensors().keys()
    assert all(torch.equal(parts[name], value) for name, value in whole.tensors().items())
    for some, value in dense.items():
        assert torch.equal(whole.dense(some), value)
        slices = list(whole.slices(some))
        assert torch.equal(torch.cat(slices), value)
        assert (len(slices) == 1) == bool(shape[1] % whole.GROUP)


@kinds
def test_storing_and_unpacking_take_a_few_bytes_for_each_weight_of_a_slice(kind):
    """Of 4 slices, beside the weight and its codes; the dense weight is all there at once."""
    w = weight(torch.bfloat16, (1024, 4096))
    given = torch.nn.ParameterList([torch.nn.Parameter(w, requires_grad=False)])
    make_store(kind, w[:64])  # tables that are made once
    with LivingBytes(given) as living:
        store = make_store(kind, w)
        assert living.most - store.bytes() < 22 * SLICE
    for dtype in (torch.bfloat16, torch.float32):
        with LivingBytes(store) as living:
            store.dense(dtype)
            assert living.most - w.numel() * dtype.itemsize < 14 * SLICE


def layer_over(store) -> Linear:
    layer = Linear(IN, OUT)
    layer.store_as(store)
    return layer


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_product_and_gradient_are_those_of_the_dense_weight(kind, dtype):
    store = make_store(kind, weight(dtype))
    x = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outs = layer_over(store)(leaves[0]), F.linear(leaves[1], store.dense(dtype))
    for out in outs:
        out.square().sum().backward()
    assert relative(outs[0], outs[1]) < 1e-6 and relative(leaves[0].grad, leaves[1].grad) < 1e-6


@kinds
def test_the_product_keeps_nothing_for_the_backward_pass(kind):
    store, kept = make_store(kind, weight()), []
    x = torch.randn(4, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer_over(store)(x)
    assert not kept


@kinds
@pytest.mark.parametrize(
    "cast",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.cpu()],
    ids=["bfloat16", "half", "double", "cpu"],
)
def test_a_cast_of_the_model_leaves_the_codes_alone(kind, cast):
    layer = Linear(IN, OUT)
    layer.store_as(make_store(kind, weight()))
    before = {name: part.clone() for name, part in layer.store.tensors().items()}
    cast(torch.nn.Sequential(layer))
    after = layer.store.tensors()
    assert all(torch.equal(part, before[name]) for name, part in after.items())
    assert [part.dtype for part in after.values()] == [part.dtype for part in before.values()]


@kinds
def test_zeros_stay_zeros(kind):
    assert make_store(kind, torch.zeros(8, 64)).dense(torch.float32).abs().max() == 0


@kinds
def test_a_store_is_restored_bit_for_bit(kind):
    store = make_store(kind, weight(torch.bfloat16))
    again = store_class(kind).restored(kind, store.tensors(), shape=store.shape, dtype=store.dtype)
    assert torch.equal(again.dense(torch.float32), store.dense(torch.float32))
    assert (again.shape, again.dtype, again.bytes()) == (store.shape, store.dtype, store.bytes())


@pytest.mark.parametrize("shape", [(32, 32), (16, 96), (8, 224), (3, 22), (7, 37)], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_blocks_of_4_bits_run_on_from_row_to_row(kind, shape):
    """Each code looked up and multiplied by hand; bitsandbytes 0.50's CPU kernel counts by rows."""
    w = weight(shape=shape) * torch.logspace(-2, 2, shape[0]).unsqueeze(1)
    store = make_store(kind, w)
    codes = torch.stack([store.codes >> 4, store.codes & 15], dim=-1).flatten()[: w.numel()].long()
    scale = store.scale.repeat_interleave(64)[: w.numel()]
    by_hand = _table(kind, w.device)[codes] * scale
    torch.testing.assert_close(store.dense(torch.float32).flatten(), by_hand, rtol=1e-6, atol=0)


def test_int8_error_bound():
    """Half a step of 1/127 of the row's largest."""
    w = weight()
    error = (make_store("int8", w).dense(torch.float32) - w).abs()
    assert (error <= w.abs().amax(dim=1, keepdim=True) / 254 * 1.001).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_values_of_a_format_are_kept_exactly(kind):
    """Every code over one block: sign, exponent and mantissa written out; bias 2^(E-1) - 1."""
    exponent_bits, mantissa_bits = FORMATS[kind]
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    values = [
        (m / steps) * 2.0 ** (1 - bias) if e == 0 else (1 + m / steps) * 2.0 ** (e - bias)
        for e in range(2**exponent_bits)
        for m in range(steps)
    ]
    block = torch.tensor([sign * v for v in values for sign in (1, -1)])
    block = F.pad(block, (0, 64 - len(block))).view(1, 64)
    assert torch.equal(make_store(kind, block).dense(torch.float32), block)
    assert {"fp6": 28.0, "fp6_e2m3": 7.5, "fp5": 7.0}[kind] == max(values)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_weight_goes_to_the_nearest_value(kind):
    w = weight(shape=(4, 64))
    store = make_store(kind, w)
    assert isinstance(store, PackedFloatStore)
    grid = store._grid()
    grid = torch.cat([-grid, grid]) * store.scale.float().unsqueeze(1)  # [blocks, values]
    nearest = (w.unsqueeze(-1) - grid.unsqueeze(1)).abs().amin(dim=-1)
    torch.testing.assert_close((w - store.dense(torch.float32)).abs(), nearest)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_block_has_the_best_of_the_scales_that_are_tried(kind):
    """Each scale of SCALES by itself, the nearest value written out."""
    w = weight(shape=(16, 64))
    store = make_store(kind, w)
    assert isinstance(store, PackedFloatStore)
    grid, least = store._grid(), w.abs().amax(dim=1, keepdim=True) / store._grid()[-1]
    errors = []
    for factor in SCALES[kind]:
        scaled = torch.cat([-grid, grid]) * (least * factor).bfloat16().float()  # [blocks, values]
        nearest = (w.unsqueeze(-1) - scaled.unsqueeze(1)).abs().amin(dim=-1)
        errors.append(nearest.square().sum(dim=1))
    got = (w - store.dense(torch.float32)).square().sum(dim=1)
    best = torch.stack(errors).min(dim=0)
    torch.testing.assert_close(got, best.values, rtol=1e-3, atol=0)  # chosen on float16
    assert SCALES[kind][0] == 1 and len(best.indices.unique()) > 2


def test_native_fp8_products_are_near_the_dense_ones():
    """Both factors have 3 bits of mantissa; torch runs the same products on a CPU."""
    store = make_store("fp8", weight() * torch.logspace(-2, 0, OUT).unsqueeze(1))
    draw = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, 5, IN, generator=draw), torch.randn(2, 5, OUT, generator=draw)
    dense = store.dense(torch.float32)
    assert relative(native_product(x, store.codes, store.scale), F.linear(x, dense)) < 4e-2
    assert relative(native_gradient(grad, store.codes, store.scale), grad @ dense) < 4e-2


def multiplied(left, row_scale, right, column_scale, dtype, into=None) -> torch.Tensor:
    """The formula of peft.int8_triton.product, on any device."""
    out = left.double() @ right.double().T * row_scale
    out = out if column_scale is None else out * column_scale.view(1, -1)
    return out.to(dtype) if into is None else into.add_(out)


@pytest.mark.parametrize("adds", [False, True], ids=["new", "added"])
def test_products_of_whole_numbers_are_those_of_both_roundings(adds, monkeypatch):
    """x, and the gradient times the rows' scales, rounded a token at a time."""
    kernels = SimpleNamespace(product=multiplied)
    monkeypatch.setattr(store_int8, "product_kernels", lambda x, codes: kernels)
    store = make_store("int8", weight() * torch.logspace(-2, 0, OUT).unsqueeze(1))
    draw = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, 5, IN, generator=draw), torch.randn(2, 5, OUT, generator=draw)
    codes, scale = rounded_rows("int8", x.view(10, IN))
    into = torch.ones(2, 5, OUT) if adds else None
    want = codes.double() * scale @ store.dense(torch.float64).T
    assert relative(store.forward_product(x, into).view(10, OUT), want + adds) < 1e-6
    codes, scale = rounded_rows("int8", grad.view(10, OUT), store.scale.T)
    into = torch.ones(2, 5, IN) if adds else None
    want = codes.double() * scale @ store.codes.double()
    assert relative(store.backward_product(grad, into).view(10, IN), want + adds) < 1e-6


def kernel_device() -> str:
    """Where the Triton kernel runs; on a CPU it is interpreted, which cuts bfloat16 off."""
    if torch.cuda.is_available():
        return "cuda"
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("runs in another process, with TRITON_INTERPRET=1")
    return "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run as they are")
def test_kernels_in_the_interpreter():
    """The interpreter must be chosen before triton is imported: in a process of its own."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is that process")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", "the_kernel", "-p", "no:cacheprovider"],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-4000:]


@pytest.mark.parametrize("shape", [(7, 37), (16, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_the_kernel_unpacks_what_torch_unpacks(kind, dtype, shape):
    device = kernel_device()
    from peft import fpx_triton

    store = make_store(kind, weight(shape=shape))
    want, store = store.dense(dtype), store.to(device)
    planes = (store.low, store.high, store.scale)
    got = fpx_triton.unpack(
        *planes, total=shape[0] * shape[1], one=store._one(), bits=FORMATS[kind], block=BLOCK,
        dtype=dtype,
    )  # fmt: skip
    atol = 2**-7 * want.abs().max().item() if (device, dtype) == ("cpu", torch.bfloat16) else 0
    torch.testing.assert_close(got.cpu().view(shape), want, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(7, 37), (16, 256), (3, 4100)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CODES)
def test_the_kernel_multiplies_codes_with_their_scales(kind, dtype, shape):
    """Bit for bit; every code is there, from the smallest to the largest of both signs."""
    device = kernel_device()
    from peft import rows_triton

    codes = torch.arange(shape[0] * shape[1]).to(torch.uint8).view(shape)
    if kind == "fp8":
        codes[codes & 127 == 127] = 0  # what is no number
    codes = codes.view(CODES[kind])
    scale = torch.logspace(-4, -2, shape[0]).unsqueeze(1)
    keys = {"shape": shape, "dtype": dtype}
    store = store_class(kind).restored(kind, {"codes": codes, "scale": scale}, **keys)
    want = store.dense(dtype)
    got = rows_triton.unpack(codes.to(device), scale.to(device), dtype).cpu()
    atol = 2**-7 * want.abs().max().item() if (device, dtype) == ("cpu", torch.bfloat16) else 0
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("block", [64, 16], ids=["whole row", "row in blocks"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "with factors"])
@pytest.mark.parametrize("kind", CODES)
def test_the_kernel_rounds_rows_as_torch_does(kind, scaled, block):
    """In the interpreter without the rounding to e4m3, which it does in a way of its own."""
    device = kernel_device()
    from peft import rows_triton

    draw = torch.Generator().manual_seed(2)
    x = torch.randn(6, 37, generator=draw) * torch.logspace(-3, 3, 6).unsqueeze(1)
    x[3] = 0
    x[5] *= 2.0**-90
    x[4] = torch.arange(37) - 18.5  # int8's codes and what lies midway between two of them
    x[4, 0] = 127
    factor = torch.rand(1, 37, generator=draw) + 0.5 if scaled else None
    dtype = torch.float32 if (device, kind) == ("cpu", "fp8") else CODES[kind]
    codes, scale = rows_triton.round_rows(
        x.to(device), None if factor is None else factor.to(device),
        largest=LARGEST[kind], tiny=TINY, dtype=dtype, block=block,
    )  # fmt: skip
    want, want_scale = rounded_rows(kind, x, factor)
    assert torch.equal(scale.cpu(), want_scale)
    assert torch.equal(codes.cpu().to(CODES[kind]).float(), want.float())


def test_codes_between_two_whole_numbers_go_to_the_even_one():
    """The row's largest is 127, so that a value is its code before it is rounded."""
    codes, scale = rounded_rows("int8", torch.tensor([[127.0, 0.5, 1.5, -2.5, -126.6, 3.4]]))
    assert codes.tolist() == [[127, 0, 2, -2, -127, 3]] and scale.item() == pytest.approx(1.0)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "with factors"])
@pytest.mark.parametrize("kind", CODES)
def test_the_codes_of_small_rows_are_those_of_large_ones(kind, scaled):
    """Down to 2^-80, as gradients may be: the scales shrink alone; a row of zeros gives zeros."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(5, 37, generator=draw)
    x[3] = 0
    factor = torch.rand(1, 37, generator=draw) + 0.5 if scaled else None
    codes, scale = rounded_rows(kind, x, factor)
    assert not codes[3].float().any() and scale.isfinite().all()
    assert (codes.float().abs().amax(dim=1) == LARGEST[kind]).tolist() == [1, 1, 1, 0, 1]
    some = x.any(dim=1)
    for k in range(10, 81, 10):
        small, small_scale = rounded_rows(kind, x * 2.0**-k, factor)
        assert torch.equal(small.float(), codes.float())
        assert torch.equal(small_scale[some], scale[some] * 2.0**-k)


@pytest.mark.parametrize("kind", CODES)
def test_small_gradients_are_as_exact_as_large_ones(kind, monkeypatch):
    """At 2^-66, about 1e-20: the same bits but for the exponents."""
    kernels = SimpleNamespace(product=multiplied)
    monkeypatch.setattr(store_int8, "product_kernels", lambda x, codes: kernels)
    store = make_store(kind, weight())
    grad = torch.randn(5, OUT, generator=torch.Generator().manual_seed(1))

    def gradient(grad: torch.Tensor) -> torch.Tensor:
        if kind == "fp8":
            return native_gradient(grad, store.codes, store.scale)
        return store.backward_product(grad)

    large, small = gradient(grad), gradient(grad * 2.0**-66)
    assert relative(large, grad @ store.dense(torch.float32)) < 5e-2
    assert torch.equal(small.double(), large.double() * 2.0**-66)


@pytest.mark.parametrize("shape", [(5, 37), (70, 130)], ids=str)
def test_the_kernel_transposes(shape):
    device = kernel_device()
    from peft import rows_triton

    codes = torch.randint(256, shape, generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    got = rows_triton.transpose(codes.to(device).view(torch.float8_e4m3fn))
    assert got.is_contiguous() and torch.equal(got.view(torch.uint8).cpu(), codes.T)


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_unpacks_as_a_cpu_does(kind, dtype):
    store = make_store(kind, weight(dtype))
    assert torch.equal(
        make_store(kind, weight(dtype)).cuda().dense(dtype).cpu(), store.dense(dtype)
    )


@pytest.mark.gpu
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_stores_as_a_cpu_does(kind, dtype):
    """The same codes, but where two scales of a block err alike to the last bit of float32.

    fp4's borders are fractions like 5/6, on which 0.2% of bfloat16 weights lie; there both
    neighbours are equally near, and either is right. Of doubly quantized scales, which bitsandbytes
    rounds, some lie so too, each of which is that of 64 weights.
    """
    w = weight(dtype)
    here, there = (
        make_store(kind, w.to(device)).dense(torch.float32).cpu() for device in ("cpu", "cuda")
    )
    if kind in ("fp4", "fp4_double"):
        errors = [(made - w.float()).abs() for made in (here, there)]
        same = torch.isclose(*errors, rtol=0, atol=2e-6 * w.abs().max().item())
        assert same.float().mean() >= (0.99 if kind == "fp4_double" else 1.0)
        assert relative(*errors) < 2e-3
    elif kind in ("nf4", "nf4_double"):
        assert relative(there, here) < 2e-3
    else:
        assert torch.equal(there, here)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 96, 256), (300, 512, 80)], ids=str)
def test_a_gpu_multiplies_whole_numbers(shape):
    """As the formula, but for the last rounding; rows and columns that fill no tile."""
    if torch.cuda.get_device_capability()[0] != store_int8.HOPPER:
        pytest.skip("elsewhere the weight is unpacked")
    from peft import int8_triton

    draw = torch.Generator().manual_seed(4)
    M, N, K = shape
    left, row_scale = rounded_rows("int8", torch.randn(M, K, generator=draw).cuda())
    right, column_scale = rounded_rows("int8", torch.randn(N, K, generator=draw).cuda())
    before = torch.randn(M, N, generator=draw).cuda().bfloat16()
    for columns in (column_scale, None):
        parts = (left, row_scale, right, columns, torch.bfloat16)
        torch.testing.assert_close(int8_triton.product(*parts), multiplied(*parts))
        got, want = (run(*parts, before.clone()) for run in (int8_triton.product, multiplied))
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("adds", [False, True], ids=["new", "added"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [store_int8.LEAST_ROWS - 1, store_int8.LEAST_ROWS])
def test_few_tokens_meet_the_unpacked_int8_weight(rows, dtype, adds):
    """One more, and they are rounded where whole numbers are multiplied; eagerly and as a graph."""
    store = make_store("int8", weight().cuda())
    draw = torch.Generator().manual_seed(1)
    before = torch.randn(rows, OUT, generator=draw).to("cuda", dtype)
    x = torch.randn(rows, IN, generator=draw).to("cuda", dtype)
    hopper = torch.cuda.get_device_capability()[0] == store_int8.HOPPER
    left = x.double()
    if hopper and rows >= store_int8.LEAST_ROWS:
        codes, scale = rounded_rows("int8", x)
        left = codes.double() * scale
    want = left @ store.dense(torch.float32).double().T + (before.double() if adds else 0)
    out = store.forward_product(x, before.clone() if adds else None)
    assert out.dtype == dtype
    assert relative(out, want) < {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    graph, into = torch.cuda.CUDAGraph(), before.clone() if adds else None
    with torch.cuda.graph(graph):
        captured = store.forward_product(x, into)
    if into is not None:
        into.copy_(before)
    graph.replay()
    assert torch.equal(captured, out)


@pytest.mark.gpu
@kinds
def test_products_on_a_gpu_are_near_the_dense_ones(kind):
    """Only fp8 (3 bits of mantissa) and int8 round the activations and gradients as well."""
    store = make_store(kind, weight(torch.bfloat16).cuda())
    x = torch.randn(64, IN, generator=torch.Generator().manual_seed(1)).cuda().bfloat16()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outs = layer_over(store)(leaves[0]), F.linear(leaves[1], store.dense(torch.bfloat16))
    grad = torch.randn_like(outs[0])
    for out in outs:
        out.backward(grad)
    bound = {"fp8": 4e-2, "int8": 1.5e-2}.get(kind, 1e-6)
    assert relative(outs[0], outs[1]) < bound and relative(leaves[0].grad, leaves[1].grad) < bound


def test_missing_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RuntimeError, match="need bitsandbytes .*pip install bitsandbytes, or cho"):
        make_store("nf4", weight())


class OnGpu(torch.Tensor):
    """A tensor in the CPU's memory that says it lies on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp6", "fp6_e2m3", "fp5"])
def test_missing_triton_is_said_once_on_a_gpu(kind, monkeypatch, capsys):
    for module in ("triton", "peft.rows_triton", "peft.fpx_triton"):
        monkeypatch.setitem(sys.modules, module, None)
    peft.store._imported.cache_clear()
    store = make_store(kind, weight())
    want = store.dense(torch.bfloat16)
    assert capsys.readouterr().err == ""  # plain torch is a CPU's way
    for name, part in store.tensors().items():
        setattr(store, name, part.as_subclass(OnGpu))
    for _ in range(2):
        assert torch.equal(store.dense(torch.bfloat16).as_subclass(torch.Tensor), want)
    said = capsys.readouterr().err.splitlines()
    peft.store._imported.cache_clear()
    assert len(said) == 1 and said[0].startswith(f"{kind}: runs slower without its Triton kernels")
    assert said[0].endswith("; pip install triton")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    config = RWKVConfig(
        version=7, n_layer=2, n_embd=64, dim_ffn=256, vocab_size=64, head_size=16,
        ranks=LowRanks(8, 8, 8, 8),
    )  # fmt: skip
    model = RWKV(config)
    initialize(model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("model") / "model.pth"
    write_tensors(path, model.state_dict())
    return path


def stores_of(model: RWKV) -> dict[str, Store]:
    return {n: m.store for n, m in model.named_modules() if getattr(m, "store", None) is not None}


def profile(tmp_path, **keys) -> str:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"rules": [{"match": "blocks.*", **keys}]}))
    return str(path)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantized_file_holds_the_codes_that_training_makes(kind, dtype, model_file, tmp_path):
    """Of a bfloat16 file, which training in either dtype reads as it is."""
    narrow, output = tmp_path / "narrow.pth", tmp_path / "small.pth"
    write_tensors(narrow, {n: t.bfloat16() for n, t in read_tensors(model_file).items()})
    command = ["--load_model", str(narrow), "--quant_mode", kind, "--output", str(output)]
    assert main(command) == 0
    layer_profile = profile(tmp_path, mode="lora", rank=8)
    flags = PeftFlags(layer_profile=layer_profile, quant=True, quant_mode=kind)
    made, _ = load_with_profile(narrow, flags, dtype=dtype)
    read, plan = load_with_profile(output, PeftFlags(layer_profile=layer_profile), dtype=dtype)
    assert len(stores_of(made)) == 12 and plan.plans["blocks.0.att.key"].quant == kind
    for name, store in stores_of(made).items():
        again = stores_of(read)[name].tensors()
        assert all(
            torch.equal(part, again[part_name]) for part_name, part in store.tensors().items()
        )
    for name, parameter in made.named_parameters():
        if not name.endswith("lora_A"):
            assert torch.equal(parameter, read.get_parameter(name))


def test_a_layer_profile_is_not_written_over(model_file, tmp_path):
    """The metadata of mine.pth is mine.json."""
    there = tmp_path / "mine.json"
    there.write_text('{"rules": []}')
    command = ["--load_model", str(model_file), "--output", str(tmp_path / "mine.pth")]
    with pytest.raises(
        InputError, match="mine.pth: would write over mine.json, which describes no"
    ):
        main(command)
    assert there.read_text() == '{"rules": []}' and not (tmp_path / "mine.pth").exists()
    there.unlink()
    assert main(command) == main(command) == 0


def without(layer: str, part: str):
    """A change of a quantized file's tensors: one part is gone."""
    return lambda tensors, entries: tensors.pop(f"{layer}.store.{part}")


def shortened(layer: str, part: str):
    def change(tensors, entries):
        tensors[f"{layer}.store.{part}"] = tensors[f"{layer}.store.{part}"][:3].clone()

    return change


def said_to_be(layer: str, kind: str):
    return lambda tensors, entries: entries[layer].update(storage=kind)


LAYER = "blocks.1.ffn.key"


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("fp6", without(LAYER, "scale"), "holds high, low, not what fp6 has"),
        ("fp6", shortened(LAYER, "scale"), "bytes, not the .* that fp6 has"),
        ("fp5", said_to_be(LAYER, "fp6"), "bytes, not the .* that fp6 has"),
        ("int8", said_to_be(LAYER, "fp8"), "holds codes, scale, not what fp8 has"),
        ("nf4_double", without(LAYER, "second"), "not what nf4_double has"),
        ("nf4", said_to_be(LAYER, "fp4"), "holds other codes than those of fp4 that .*"),
        ("fp6", said_to_be(LAYER, "fp6_e2m3"), "other codes than those of fp6_e2m3 that .*"),
    ],
    ids=[
        "a part is gone",
        "a part is short",
        "other bits",
        "other codes",
        "a second scale is gone",
        "another format of 4 bits",
        "another format of 6 bits",
    ],
)
def test_a_quantized_file_that_lacks_something_is_named(
    kind, change, message, model_file, tmp_path
):
    output = tmp_path / "small.pth"
    main(["--load_model", str(model_file), "--quant_mode", kind, "--output", str(output)])
    tensors = torch.load(output, weights_only=True)
    metadata = json.loads(output.with_suffix(".json").read_text())
    change(tensors, metadata["quantized"])
    torch.save(tensors, output)
    output.with_suffix(".json").write_text(json.dumps(metadata))
    with pytest.raises(InputError, match=rf"small.pth: {LAYER} .*{message}; copy the file and"):
        load_with_profile(output, PeftFlags(layer_profile=profile(tmp_path, mode="lora", rank=8)))


def test_another_files_json_is_named(model_file, tmp_path):
    """Both are of one model, and their codes occupy as much; without a fingerprint all is read."""
    for kind in ("nf4", "fp4"):
        output = str(tmp_path / f"{kind}.pth")
        main(["--load_model", str(model_file), "--quant_mode", kind, "--output", output])
    (tmp_path / "nf4.json").write_text((tmp_path / "fp4.json").read_text())
    with pytest.raises(InputError, match=r"nf4.pth: blocks.0.\S+ holds other codes than those of "):
        load_frozen(tmp_path / "nf4.pth")
    metadata = json.loads((tmp_path / "fp4.json").read_text())
    for entry in metadata["quantized"].values():
        del entry["codes"]
    (tmp_path / "fp4.json").write_text(json.dumps(metadata))
    assert len(stores_of(load_frozen(tmp_path / "fp4.pth"))) == 12


@pytest.mark.parametrize(
    "entry, message",
    [
        ([], r"LAYER is \[\], no object; put the file's own beside it, or quantize"),
        (
            {"dtype": "floatx"},
            "LAYER: dtype is 'floatx', not one of float32, bfloat16, float16; put",
        ),
        ({"dtype": None}, "LAYER: dtype is None, not one of"),
        ({"shape": [64]}, r"LAYER: shape is \[64\], not two sizes"),
        ({"shape": "64x64"}, "LAYER: shape is '64x64', not two sizes"),
        ({"shape": [64, 64.0]}, r"LAYER: shape is \[64, 64.0\], not two sizes"),
        (
            {"shape": [128, 128]},
            r"LAYER.weight is \[128, 128\], the other tensors ask for \[256, 64\]",
        ),
        ({"storage": ["nf4"]}, r"LAYER: storage is \['nf4'\], no word"),
    ],
)
def test_a_description_that_cannot_be_is_named(entry, message, model_file, tmp_path):
    output = tmp_path / "small.pth"
    main(["--load_model", str(model_file), "--output", str(output)])
    beside = output.with_suffix(".json")
    metadata = json.loads(beside.read_text())
    stored = metadata["quantized"]
    stored[LAYER] = stored[LAYER] | entry if isinstance(entry, dict) else entry
    beside.write_text(json.dumps(metadata))
    with pytest.raises(InputError, match="small.json: " + message.replace("LAYER", LAYER)):
        load_frozen(output)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda m: m["quantized"].pop(LAYER),
            f"does not describe {LAYER}, which small.pth holds in",
        ),
        (
            lambda m: m["quantized"].update(ear={}),
            "describes ear in few bits, and small.pth holds no",
        ),
        (lambda m: m.update(kind="adapter"), "is no description of a quantized model; put"),
        (lambda m: m.pop("base"), "does not name the model it was made from; put"),
    ],
    ids=["a layer less", "a layer more", "another kind", "no base"],
)
def test_another_files_description_is_named(change, message, model_file, tmp_path):
    output = tmp_path / "small.pth"
    main(["--load_model", str(model_file), "--output", str(output)])
    beside = output.with_suffix(".json")
    metadata = json.loads(beside.read_text())
    change(metadata)
    beside.write_text(json.dumps(metadata))
    with pytest.raises(InputError, match=f"small.json: {message}"):
        load_frozen(output)


def test_a_quantized_file_belongs_to_its_model(model_file, tmp_path):
    output = tmp_path / "small.safetensors"
    main(["--load_model", str(model_file), "--quant_head", "--output", str(output)])
    small = read_tensors(output)
    assert fingerprint(small) == fingerprint(read_tensors(model_file))
    assert config_of(small) == config_of(read_tensors(model_file))
    assert "head" in small.quantized and read_store(small, "head").kind == "nf4"


def test_a_quantized_file_is_not_read_as_a_model(model_file, tmp_path):
    output = tmp_path / "small.pth"
    main(["--load_model", str(model_file), "--output", str(output)])
    with pytest.raises(InputError, match="att.receptance.weight is quantized; such a file is for"):
        load_model(output)
    with pytest.raises(InputError, match=r"small.pth: is quantized already; name the model it was"):
        main(["--load_model", str(output), "--output", str(tmp_path / "again.pth")])
    with pytest.raises(InputError, match=r"without --layer_profile: blocks.0.\S+ cannot be 'full'"):
        load_with_profile(output, PeftFlags())
    output.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"is a quantized model without its small\.json; put"):
        read_tensors(output)


class Viewed(RowStore):
    """Products are views, as where a kernel sees rows of all texts as one matrix."""

    def forward_product(self, x, into=None):
        return super().forward_product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def test_logits_may_be_written_over_behind_any_store():
    layer = layer_over(Viewed("int8", weight()))
    x = torch.randn(2, 3, IN, requires_grad=True)
    out = layer(x)
    out.mul_(2.0)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    want = 2.0 * layer.dense_weight().sum(dim=0)
    torch.testing.assert_close(gradient, want.expand_as(gradient))


@pytest.mark.parametrize("mode", ["freeze", "lora", "bone", "dora"])
def test_a_gradient_of_logits_is_not_rounded_to_whole_numbers(mode, tmp_path, monkeypatch):
    """Where the GPU multiplies those: small probabilities, of which there are many, would be 0."""
    path = tmp_path / "profile.json"
    rule = {"match": "*", "mode": mode, "quant": "int8"} | ({"rank": 8} if mode != "freeze" else {})
    path.write_text(json.dumps({"rules": [rule]}))
    config = RWKVConfig(
        version=7, n_layer=1, n_embd=64, dim_ffn=256, vocab_size=512, head_size=64,
        ranks=LowRanks(8, 8, 8, 8),
    )  # fmt: skip
    model, _ = random_with_profile(config, PeftFlags(layer_profile=str(path)))
    asked = []
    monkeypatch.setattr(
        store_int8, "product_kernels", lambda x, codes: asked.append(tuple(codes.shape))
    )
    x = torch.randn(1, 40, 64, requires_grad=True)
    model.head(model.blocks[0].att.key(x)).square().sum().backward()
    lengths = int(mode == "dora")  # of V's rows, a product more of each layer
    assert asked.count((512, 64)) == 1 + lengths and asked.count((64, 64)) == 2 + lengths


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind, mode",
    [
        *itertools.product(STORES, ("freeze", "lora")),
        *itertools.product(("fp8", "int8"), ("bone", "dora", "miss", "pissa")),
    ],
)
def test_a_loss_over_a_stored_head(kind, mode, tmp_path):
    """Its logits are written over where they lie."""
    path = tmp_path / "profile.json"
    rule = {"match": "*", "mode": mode, "quant": kind}
    rule |= {"rank": 16} if mode != "freeze" else {}
    rules = [rule, {"match": "blocks.*.ln*", "mode": "full"}]
    path.write_text(json.dumps({"rules": rules}))
    config = RWKVConfig(
        version=7, n_layer=1, n_embd=128, dim_ffn=512, vocab_size=512, head_size=64,
        ranks=LowRanks(32, 32, 32, 32),
    )  # fmt: skip
    model, _ = random_with_profile(
        config, PeftFlags(layer_profile=str(path)), device="cuda", dtype=torch.bfloat16
    )
    tokens = torch.randint(512, (2, 65), device="cuda")
    mask = torch.ones(2, 64, dtype=torch.bool, device="cuda")
    batch = TokenBatch(tokens[:, :-1], tokens[:, 1:], mask, None, mask.sum())
    loss, _ = SFT()(model, batch)
    loss.backward()
    with torch.no_grad():
        logits = model.logits(model(batch.inputs)[0]).float()
        want = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    assert loss.item() == pytest.approx(want.item(), rel=2e-3)
    assert model.blocks[0].ln1.weight.grad.norm() > 0


@kinds
def test_a_stored_embedding_reads_as_its_dense_rows(kind, model_file, tmp_path):
    """At load, from a file in few bits, and through training over it: to the bit."""
    path = profile(tmp_path, mode="lora", rank=8)
    flags = PeftFlags(layer_profile=path, quant=True, quant_mode=kind, quant_head=True)
    model, plan = load_with_profile(model_file, flags)
    assert plan.plans["emb"].quant == kind and model.emb.weight is None
    tokens = torch.arange(12).view(2, 6) % model.config.vocab_size
    plain = load_model(model_file)
    set_parameter(plain, "emb.weight", model.emb.dense_weight())
    assert torch.equal(model.emb(tokens), plain.emb(tokens))
    output = tmp_path / "small.pth"
    main(
        [
            "--load_model",
            str(model_file),
            "--quant_mode",
            kind,
            "--quant_head",
            "--output",
            str(output),
        ]
    )
    again, plan = load_with_profile(output, PeftFlags(layer_profile=path))
    assert plan.plans["emb"].quant == kind
    with torch.no_grad():
        got, want = (some.logits(some(tokens)[0]) for some in (again, model))
    assert torch.equal(got, want)
    model.logits(model(tokens)[0]).square().sum().backward()
    trained = dict(model.named_parameters())
    assert trained["blocks.0.ln0.weight"].grad is not None
    assert trained["blocks.0.att.key.lora_B"].grad is not None


def test_an_embedding_that_trains_is_not_stored(model_file, tmp_path):
    path = tmp_path / "profile.json"
    rules = [{"match": "*", "mode": "freeze"}, {"match": "emb", "mode": "full", "quant": "nf4"}]
    path.write_text(json.dumps({"rules": rules}))
    flags = PeftFlags(layer_profile=str(path), quant=True, quant_head=True)
    model, plan = load_with_profile(model_file, flags)
    assert plan.plans["emb"].quant == "none" and plan.plans["head"].quant == "nf4"
    assert model.emb.weight is not None and model.emb.weight.requires_grad


def test_loading_holds_one_dense_layer_at_a_time(model_file, tmp_path, monkeypatch):
    """Each weight is stored before the next one is read."""
    most = 0

    def counting(model: RWKV, name: str, plan: Plan) -> None:
        nonlocal most
        layers = [m for m in model.blocks.modules() if isinstance(m, Linear)]
        dense = [m for m in layers if m.weight is not None and not m.weight.is_meta]
        most = max(most, len(dense))
        install(model, name, plan)

    monkeypatch.setattr(peft.apply, "install", counting)
    layer_profile = profile(tmp_path, mode="bone", rank=8, quant="int8")
    model, _ = load_with_profile(model_file, PeftFlags(layer_profile=layer_profile))
    assert most == 1 and len(stores_of(model)) == 12


@pytest.mark.parametrize("mode", ["lora", "pissa"])
def test_a_stored_weight_is_gone_before_the_next_is_read(mode, model_file, tmp_path, monkeypatch):
    stored, left = [], []

    def storing(kind: str, weight: torch.Tensor) -> Store:
        stored.append(weakref.ref(weight.untyped_storage()))
        return make_store(kind, weight)

    def reading(path: Path, name: str, tensor: torch.Tensor) -> None:
        left.extend(name for storage in stored if storage() is not None)

    monkeypatch.setattr(peft.apply, "make_store", storing)
    monkeypatch.setattr(rwkv.checkpoint, "check_weight", reading)
    layer_profile = profile(tmp_path, mode=mode, rank=8, quant="int8")
    load_with_profile(model_file, PeftFlags(layer_profile=layer_profile))
    assert len(stored) == 12 and not left
