"""The Triton backends against the references in float64.

On a GPU the kernels run as they are, at N = 64 and 128. Without one they run in Triton's
interpreter at N = 16; that must be chosen before triton is imported, so this file then runs itself
in a process of its own (`test_in_the_interpreter`) and skips everything else.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    assert_all_close,
    assert_close,
    pass_in_the_interpreter,
    random_state,
    with_gradients,
    wkv6_inputs,
    wkv7_inputs,
)

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
N = 64 if ON_GPU else 16
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32

# Largest relative error. float32: products in three tf32 terms. bfloat16: rounding the results
# alone gives 1.7e-3; measured on the regimes below are 2.5e-3 (y, dv) to 3.8e-3 (da, db) for wkv7,
# and in the interpreter 2.6e-3 (y) to 4.2e-3 (dw) for wkv6.
ALLOWED = {FLOAT32: 2e-5, BFLOAT16: 5e-3}

kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in another process")
pytestmark = pytest.mark.gpu if ON_GPU else []

DECAYS = {
    "usual": lambda w: w,
    "none": lambda w: torch.full_like(w, -9.0),
    "strongest": lambda w: torch.full_like(w, -0.5),
    "none or strongest": lambda w: torch.where(w > w.median(), -0.5, -9.0),
}
# Places of what is kept that no text has stay unwritten, and may hold a NaN, which opcheck calls
# unequal: packed texts that keep something fill all places here.
as_operators = pytest.mark.parametrize(
    "keep, T, ends",
    [(False, 70, None), (True, 128, None), (True, 130, [0, 65, 130]), (False, 70, [0, 10, 70])],
)


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="runs the others where there is no GPU")
@pytest.mark.parametrize("part", ["wkv7", "not wkv7"])
def test_in_the_interpreter(part):
    pass_in_the_interpreter(__file__, "-k", part)


@pytest.mark.skipif(INTERPRETED, reason="compiles for a GPU")
@pytest.mark.parametrize("op", ["wkv7", "wkv6"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_compile_for_amd(op, dtype):
    """Without the instructions that only NVIDIA has; a block has 64 KiB there.

    Source: AMD Instinct MI300 Instruction Set Architecture, local data share.
    """
    pytest.importorskip("triton.backends.amd")
    probe = Path(__file__).with_name("triton_probe.py")
    environment = os.environ | {"PYTHONPATH": str(probe.parent.parent)}
    words = (op, dtype, "64", "gfx942")
    done = subprocess.run(
        [sys.executable, probe, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    taken = dict(line.split()[2:] for line in done.stdout.splitlines())
    assert {"scan_kernel", "gradient_kernel"} < taken.keys()
    assert max(map(int, taken.values())) <= 64 << 10


def run7(**tensors):
    from rwkv.ops import wkv7_triton

    return wkv7_triton.run(**{"cu_seqlens": None} | tensors)


def reference7(**tensors):
    from rwkv.ops import wkv7_reference

    return wkv7_reference.run(**{"cu_seqlens": None} | tensors)


def torch7(**tensors):
    from rwkv.ops import wkv7_torch

    return wkv7_torch.run(**{"cu_seqlens": None} | tensors)


def check7(inputs, state, *, reference=reference7, **options):
    """Outputs, last state and every gradient are those of the reference in float64."""
    double = {name: x.double() for name, x in inputs.items()}
    want = with_gradients(reference, double, state.double(), **options)
    got = with_gradients(run7, inputs, state, **options)
    assert_all_close(got, want, ALLOWED[inputs["v"].dtype])


@kernels
@pytest.mark.parametrize("B, T, H", [(1, 1, 1), (1, 64, 1), (1, 130, 1), (2, 33, 3)])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_wkv7_is_the_reference(B, T, H, dtype):
    x = wkv7_inputs(B=B, T=T, H=H, N=N, dtype=dtype, device=DEVICE)
    check7(x, random_state(x))


@kernels
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_wkv7_at_every_decay_and_size_of_state(decay, scale):
    x = wkv7_inputs(B=1, T=150, H=1, N=64, dtype=BFLOAT16, device=DEVICE)
    x["w"] = decay(x["w"])
    check7(x, random_state(x, scale=scale))


@kernels
@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_wkv7_at_every_size_of_values(size):
    x = wkv7_inputs(B=1, T=70, H=1, N=64, dtype=BFLOAT16, device=DEVICE)
    x["v"] = x["v"] * size
    check7(x, random_state(x))


@kernels
def test_wkv7_with_equal_keys():
    """The hardest inverse: every token removes what all tokens before it wrote, nothing decays."""
    x = wkv7_inputs(B=1, T=64, H=1, N=N, device=DEVICE)
    x["w"] = torch.full_like(x["w"], -8.0)
    x["a"] = x["a"][:, :1].expand_as(x["a"]).contiguous()
    x["b"] = -0.99 * x["a"]
    check7(x, random_state(x))


@kernels
@pytest.mark.parametrize("lengths", [[1], [64, 1, 65, 3], [1] * 4], ids=str)
def test_wkv7_packing_equals_separate_texts(lengths):
    x = wkv7_inputs(B=1, T=sum(lengths), H=1, N=N, dtype=BFLOAT16, device=DEVICE)
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    states = random_state(x, Q=len(lengths))
    check7(x, states, cu_seqlens=ends)
    y, last = run7(**x, state=states, cu_seqlens=ends)
    for q, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        alone = {name: t[:, begin:end] for name, t in x.items()}
        y_alone, last_alone = run7(**alone, state=states[q : q + 1])
        assert torch.equal(y[:, begin:end], y_alone)
        assert torch.equal(last[q : q + 1], last_alone)


@kernels
def test_wkv7_no_gradient_leaks_between_packed_texts():
    """Exactly nothing: the loss of one text does not move another's inputs or state at all."""
    x = wkv7_inputs(B=1, T=100, H=1, N=N, dtype=BFLOAT16, device=DEVICE)
    leaves = {name: t.requires_grad_() for name, t in x.items()}
    state = random_state(x, Q=3).requires_grad_()
    y, last = run7(**leaves, state=state, cu_seqlens=torch.tensor([0, 10, 77, 100]).to(DEVICE))
    (y[:, 10:77].square().sum() + last[1].square().sum()).backward()
    for leaf in leaves.values():
        assert leaf.grad[:, :10].count_nonzero() == leaf.grad[:, 77:].count_nonzero() == 0
        assert leaf.grad[:, 10:77].count_nonzero() > 0
    assert state.grad[::2].count_nonzero() == 0


@kernels
@pytest.mark.parametrize("cut", [1, 64])
def test_wkv7_state_carries_over(cut):
    x = wkv7_inputs(B=1, T=70, H=1, N=N, device=DEVICE)
    state = random_state(x)
    whole, end = run7(**x, state=state)
    first, middle = run7(**{n: t[:, :cut] for n, t in x.items()}, state=state)
    second, end2 = run7(**{n: t[:, cut:] for n, t in x.items()}, state=middle)
    assert_close("y", torch.cat([first, second], dim=1), whole, ALLOWED[FLOAT32])
    assert_close("state", end2, end, ALLOWED[FLOAT32])


@kernels
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_wkv7_keeps_at_most_8_bytes_a_token_and_channel(dtype):
    """And nothing without gradients; the outputs are the same either way."""
    x = wkv7_inputs(B=1, T=64, H=1, N=64, dtype=dtype, device=DEVICE)
    state = random_state(x)
    plain = run7(**x, state=state)
    leaves = {name: t.requires_grad_() for name, t in x.items()}
    given, kept = {t.data_ptr() for t in (*leaves.values(), state)}, {}

    def keep(t):
        if t.data_ptr() not in given:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y, last = run7(**leaves, state=state)
    assert sum(kept.values()) <= 8 * y.numel()
    assert torch.equal(y, plain[0]) and torch.equal(last, plain[1])


@kernels
@as_operators
def test_wkv7_as_an_operator_of_torch(keep, T, ends):
    """Schema, fake implementation, gradients and tracing agree with the operator itself."""
    from rwkv.ops import wkv7_triton

    x = wkv7_inputs(B=1, T=T, H=1, N=64, dtype=BFLOAT16, device=DEVICE)
    state = random_state(x, Q=1 if ends is None else len(ends) - 1)
    tensors = [t.requires_grad_() for t in (*x.values(), state)]
    cu_seqlens = None if ends is None else torch.tensor(ends, device=DEVICE)
    torch.library.opcheck(wkv7_triton._forward, (*tensors, cu_seqlens, keep))


@kernels
def test_wkv7_without_a_gradient_of_y_or_of_the_state():
    x = wkv7_inputs(B=1, T=40, H=1, N=N, device=DEVICE)
    for part in (0, 1):
        gradients = []
        for op in (run7, reference7):
            leaves = [t.clone().requires_grad_() for t in (*x.values(), random_state(x))]
            named = dict(zip([*x, "state"], leaves, strict=True))
            op(**named)[part].square().sum().backward()
            gradients.append({name: t.grad for name, t in named.items()})
        got, want = gradients
        if part == 1:
            assert got.pop("r").count_nonzero() == 0 and want.pop("r") is None
        assert_all_close(got, want, ALLOWED[FLOAT32])


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 64, 300])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_wkv7_with_heads_of_128(T, dtype):
    x = wkv7_inputs(T=T, N=128, dtype=dtype, device=DEVICE)
    check7(x, random_state(x))


@pytest.mark.gpu
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
def test_wkv7_over_long_texts(decay):
    """Against chunks in float64, which tests/test_wkv7.py holds to the reference."""
    x = wkv7_inputs(B=1, T=8192, H=2, N=64, dtype=BFLOAT16, device=DEVICE)
    x["w"] = decay(x["w"])
    check7(x, random_state(x), reference=torch7)


@kernels
@pytest.mark.parametrize(
    "dtype, reason",
    [(torch.float16, "bfloat16 or float32"), (torch.float64, "bfloat16 or float32")],
    ids=str,
)
def test_wkv7_says_why_not(dtype, reason):
    from rwkv.ops import wkv7_triton

    assert reason in wkv7_triton.why_not(torch.empty(1, 1, 1, 64, dtype=dtype), False)


@pytest.mark.skipif(INTERPRETED, reason="needs neither a GPU nor the interpreter")
def test_wkv7_leaves_to_torch_what_torch_does_faster():
    pytest.importorskip("triton")
    from rwkv.ops import wkv7_triton

    slow = [
        (dtype, N)
        for dtype in (BFLOAT16, FLOAT32)
        for N in (64, 128)
        if wkv7_triton.why_slow(torch.empty(1, 1, 1, N, dtype=dtype), False)
    ]
    assert slow == [(FLOAT32, 128)]


# RWKV-6 does not bound its decays. 0.5 and 1.5 cut chunks into smaller leaves.
DECAYS6 = {
    "usual": lambda w: w,
    "none": lambda w: torch.full_like(w, -20.0),
    **{f"w = {w}": lambda x, w=w: torch.full_like(x, w) for w in (-0.5, 0.5, 1.5, 2.5)},
    "any": lambda w: 8 * w,
    "-20 to 20": lambda w: 20 * torch.sin(1e3 * w),
    "-20 to 20 by channel": lambda w: (20 * torch.sin(1e3 * w[:, :1])).expand_as(w).contiguous(),
    "all or none": lambda w: torch.where(w > w.median(), 1e30, -1e30),
}


def run6(**tensors):
    from rwkv.ops import wkv6_triton

    return wkv6_triton.run(**{"cu_seqlens": None} | tensors)


def reference6(**tensors):
    from rwkv.ops import wkv6_reference

    return wkv6_reference.run(**{"cu_seqlens": None} | tensors)


def torch6(**tensors):
    from rwkv.ops import wkv6_torch

    return wkv6_torch.run(**{"cu_seqlens": None} | tensors)


def check6(inputs, state, *, reference=reference6, **options):
    """Outputs, last state and every gradient are those of the reference in float64."""
    double = {name: x.double() for name, x in inputs.items()}
    want = with_gradients(reference, double, state.double(), **options)
    got = with_gradients(run6, inputs, state, **options)
    assert_all_close(got, want, ALLOWED[inputs["v"].dtype])


def part6(inputs, begin, end):
    """The inputs of tokens begin to end."""
    return {name: x if name == "u" else x[:, begin:end] for name, x in inputs.items()}


@kernels
@pytest.mark.parametrize("B, T, H", [(1, 1, 1), (1, 64, 1), (1, 130, 1), (2, 33, 3)])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_wkv6_is_the_reference(B, T, H, dtype):
    x = wkv6_inputs(B=B, T=T, H=H, N=N, dtype=dtype, device=DEVICE)
    check6(x, random_state(x))


@kernels
@pytest.mark.parametrize("decay", DECAYS6.values(), ids=DECAYS6)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_wkv6_at_every_decay(decay, dtype):
    x = wkv6_inputs(B=1, T=150, H=1, N=64, dtype=dtype, device=DEVICE)
    x["w"] = decay(x["w"].double()).to(dtype)
    check6(x, random_state(x))


@kernels
@pytest.mark.parametrize("decay", ["usual", "none", "-20 to 20"])
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_wkv6_at_every_size_of_state(decay, scale):
    x = wkv6_inputs(B=1, T=150, H=1, N=64, dtype=BFLOAT16, device=DEVICE)
    x["w"] = DECAYS6[decay](x["w"].double()).to(BFLOAT16)
    check6(x, random_state(x, scale=scale))


@kernels
@pytest.mark.parametrize("name", "rkvu")
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e4])
def test_wkv6_at_every_size_of_inputs(name, size):
    x = wkv6_inputs(B=1, T=70, H=1, N=N, dtype=BFLOAT16, device=DEVICE)
    x[name] = x[name] * size
    check6(x, random_state(x))


@kernels
@pytest.mark.parametrize("lengths", [[1], [64, 1, 65, 3], [1] * 4], ids=str)
def test_wkv6_packing_equals_separate_texts(lengths):
    x = wkv6_inputs(B=1, T=sum(lengths), H=1, N=N, dtype=BFLOAT16, device=DEVICE)
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    states = random_state(x, Q=len(lengths))
    check6(x, states, cu_seqlens=ends)
    y, last = run6(**x, state=states, cu_seqlens=ends)
    for q, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        y_alone, last_alone = run6(**part6(x, begin, end), state=states[q : q + 1])
        assert torch.equal(y[:, begin:end], y_alone)
        assert torch.equal(last[q : q + 1], last_alone)


@kernels
def test_wkv6_no_gradient_leaks_between_packed_texts():
    """Exactly nothing: the loss of one text does not move another's inputs or state at all."""
    x = wkv6_inputs(B=1, T=100, H=1, N=N, dtype=BFLOAT16, device=DEVICE)
    leaves = {name: t.requires_grad_() for name, t in x.items()}
    state = random_state(x, Q=3).requires_grad_()
    y, last = run6(**leaves, state=state, cu_seqlens=torch.tensor([0, 10, 77, 100]).to(DEVICE))
    (y[:, 10:77].square().sum() + last[1].square().sum()).backward()
    for leaf in (leaves[name] for name in "rwkv"):
        assert leaf.grad[:, :10].count_nonzero() == leaf.grad[:, 77:].count_nonzero() == 0
        assert leaf.grad[:, 10:77].count_nonzero() > 0
    assert state.grad[::2].count_nonzero() == 0


@kernels
@pytest.mark.parametrize("cut", [1, 64])
def test_wkv6_state_carries_over(cut):
    x = wkv6_inputs(B=1, T=70, H=1, N=N, device=DEVICE)
    state = random_state(x)
    whole, end = run6(**x, state=state)
    first, middle = run6(**part6(x, 0, cut), state=state)
    second, end2 = run6(**part6(x, cut, 70), state=middle)
    assert_close("y", torch.cat([first, second], dim=1), whole, ALLOWED[FLOAT32])
    assert_close("state", end2, end, ALLOWED[FLOAT32])


@kernels
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("N", [64, 128])
def test_wkv6_keeps_at_most_8_bytes_a_token_and_channel(dtype, N):
    """And nothing without gradients; the outputs are the same either way."""
    x = wkv6_inputs(B=1, T=64, H=1, N=N, dtype=dtype, device=DEVICE)
    state = random_state(x)
    plain = run6(**x, state=state)
    leaves = {name: t.requires_grad_() for name, t in x.items()}
    given, kept = {t.data_ptr() for t in (*leaves.values(), state)}, {}

    def keep(t):
        if t.data_ptr() not in given:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y, last = run6(**leaves, state=state)
    assert sum(kept.values()) <= 8 * y.numel()
    assert torch.equal(y, plain[0]) and torch.equal(last, plain[1])


@kernels
@as_operators
def test_wkv6_as_an_operator_of_torch(keep, T, ends):
    """Schema, fake implementation, gradients and tracing agree with the operator itself."""
    from rwkv.ops import wkv6_triton

    x = wkv6_inputs(B=1, T=T, H=1, N=64, dtype=BFLOAT16, device=DEVICE)
    state = random_state(x, Q=1 if ends is None else len(ends) - 1)
    tensors = [t.requires_grad_() for t in (*x.values(), state)]
    cu_seqlens = None if ends is None else torch.tensor(ends, device=DEVICE)
    torch.library.opcheck(wkv6_triton._forward, (*tensors, cu_seqlens, keep))


@kernels
@pytest.mark.parametrize("part", [0, 1])
def test_wkv6_without_a_gradient_of_y_or_of_the_state(part):
    x = wkv6_inputs(B=1, T=40, H=1, N=N, device=DEVICE)
    gradients = []
    for op in (run6, reference6):
        leaves = [t.clone().requires_grad_() for t in (*x.values(), random_state(x))]
        named = dict(zip([*x, "state"], leaves, strict=True))
        op(**named)[part].square().sum().backward()
        gradients.append({name: t.grad for name, t in named.items()})
    got, want = gradients
    if part == 1:
        for name in "ru":
            assert got.pop(name).count_nonzero() == 0 and want.pop(name) is None
    assert_all_close(got, want, ALLOWED[FLOAT32])


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["usual", "-20 to 20", "w = 1.5"])
@pytest.mark.parametrize("T", [1, 64, 300])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_wkv6_with_heads_of_128(T, dtype, decay):
    x = wkv6_inputs(T=T, N=128, dtype=dtype, device=DEVICE)
    x["w"] = DECAYS6[decay](x["w"].double()).to(dtype)
    check6(x, random_state(x))


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["usual", "none", "-20 to 20"])
def test_wkv6_over_long_texts(decay):
    """Against chunks in float64, which tests/test_wkv6.py holds to the reference."""
    x = wkv6_inputs(B=1, T=8192, H=2, N=64, dtype=BFLOAT16, device=DEVICE)
    x["w"] = DECAYS6[decay](x["w"].double()).to(BFLOAT16)
    check6(x, random_state(x), reference=torch6)


@pytest.mark.gpu
@pytest.mark.parametrize("run, draw", [(run7, wkv7_inputs), (run6, wkv6_inputs)], ids="76")
@pytest.mark.parametrize("ends", [None, [0, 1, 700, 1764, 4000]], ids=["rows", "packed"])
def test_they_give_the_same_numbers_every_time(run, draw, ends):
    B, T = (4, 1000) if ends is None else (1, 4000)
    x = draw(B=B, T=T, H=32, N=64, dtype=BFLOAT16, device=DEVICE)
    options = {"cu_seqlens": None if ends is None else torch.tensor(ends, device=DEVICE)}
    first, second = (with_gradients(run, x, random_state(x, Q=4), **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
