"""Every wkv7 backend against the reference, and the reference against autograd and itself."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import (
    assert_all_close,
    assert_close,
    random_state,
    skip_unless_able,
    with_gradients,
    wkv7_inputs,
)

from rwkv.ops import chunk_layout
from rwkv.ops.wkv7 import BACKENDS, wkv7

# Largest relative error against the reference. float32: the chunked form was measured at 1e-6 or
# less. bfloat16: rounding the results alone gives 1.7e-3, our kernels up to 4.6e-3. fla's, which
# are not ours, up to 7.8e-3.
ALLOWED = {torch.float32: 5e-6, torch.bfloat16: 5e-3}
ALLOWED_FLA = 8e-3
OURS = [name for name in BACKENDS if name not in ("fla", "torch", "reference")]  # kernels
anywhere = pytest.mark.parametrize("backend", ["torch", "reference"])


def double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.double() for name, x in inputs.items()}


def check(inputs, state, backend, **options):
    """The backend's results and gradients are those of the reference in float64."""
    want = with_gradients(wkv7, double(inputs), state.double(), backend="reference", **options)
    got = with_gradients(wkv7, inputs, state, backend=backend, **options)
    allowed = ALLOWED_FLA if backend == "fla" else ALLOWED[inputs["v"].dtype]
    assert_all_close(got, want, allowed)


def test_one_step_by_hand():
    """N = 1: S = S0 * exp(-exp(w)) + S0 * a * b + v * k and y = S * r."""
    numbers = {"r": 2.0, "w": -0.5, "k": 3.0, "v": 5.0, "a": -1.0, "b": 0.25, "state": 4.0}
    tensors = {name: torch.full((1, 1, 1, 1), value) for name, value in numbers.items()}
    S = 4.0 * 0.5452392118926051 - 4.0 * 0.25 + 15.0  # exp(-exp(-0.5)) = 0.54523921...
    for backend in ("reference", "torch"):
        y, state = wkv7(**tensors, backend=backend)
        assert (state.item(), y.item()) == pytest.approx((S, 2 * S), rel=1e-6)


def test_values_are_rows_and_keys_are_columns():
    """One token without decay of what it adds: S[i, j] = v[i] k[j], and y[i] = S[i, :] . r."""
    tensors = {name: torch.zeros(1, 1, 1, 2) for name in "rwkvab"}
    tensors["v"], tensors["k"] = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 5.0]]]])
    tensors["r"] = torch.tensor([[[[0.0, 1.0]]]])
    for backend in ("reference", "torch"):
        y, state = wkv7(**tensors, backend=backend)
        assert state.tolist() == [[[[3.0, 5.0], [6.0, 10.0]]]]
        assert y.flatten().tolist() == [5.0, 10.0]


@pytest.mark.parametrize("T", [1, 2, 3, 31, 32, 33, 100])
def test_chunks_are_the_reference(T):
    x = wkv7_inputs(T=T)
    check(x, random_state(x), "torch")


@pytest.mark.parametrize("N", [1, 24, 64])
def test_every_head_size(N):
    x = wkv7_inputs(B=1, T=40, N=N)
    check(x, random_state(x), "torch")


def test_more_chunks_than_are_worked_on_at_once(monkeypatch):
    monkeypatch.setattr(chunk_layout, "LIMIT_CPU", 4)
    x = wkv7_inputs(B=1, T=163, H=3, N=8)
    ends = torch.tensor([0, 70, 163])
    check(x, random_state(x, Q=2), "torch", cu_seqlens=ends)


DECAYS = {
    "none": lambda w: torch.full_like(w, -20.0),
    **{f"w = {w}": lambda x, w=w: torch.full_like(x, w) for w in (-0.5, 0.7, 1.5, 2.0, 3.0)},
    "all": lambda w: torch.full_like(w, 30.0),
    "mixed": lambda w: 8 * w,
    "all or none": lambda w: torch.where(w > w.median(), 1e30, -1e30),
}


@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
def test_every_decay(decay):
    """Also those that RWKV-7 never makes; nothing overflows, and no digit is lost."""
    x = wkv7_inputs(T=70)
    x["w"] = decay(x["w"])
    check(x, random_state(x), "torch")


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6])
def test_every_size_of_state(scale):
    x = wkv7_inputs(T=70)
    check(x, random_state(x, scale=scale), "torch")


def test_equal_keys():
    """The hardest inverse: every token removes what all tokens before it wrote, nothing decays."""
    x = wkv7_inputs(T=64)
    x["w"] = torch.full_like(x["w"], -8.0)
    x["a"] = x["a"][:, :1].expand_as(x["a"]).contiguous()
    x["b"] = -0.99 * x["a"]
    check(x, random_state(x), "torch")


def test_long_texts_keep_their_digits():
    """Against the same backend in float64, which the other tests hold to the reference."""
    x = wkv7_inputs(B=1, T=4096, H=1)
    state = random_state(x)
    want = with_gradients(wkv7, double(x), state.double(), backend="torch")
    got = with_gradients(wkv7, x, state, backend="torch")
    assert_all_close(got, want, ALLOWED[torch.float32])


def test_bfloat16():
    x = wkv7_inputs(T=70, dtype=torch.bfloat16)
    check(x, random_state(x), "torch")


@anywhere
@pytest.mark.parametrize("cut", [1, 7, 32, 49])
def test_state_carries_over(backend, cut):
    """Two calls with the state between them equal one: infctx, chat and packing rest on it."""
    x = wkv7_inputs(T=50)
    whole, end = wkv7(**x, backend=backend)
    first, middle = wkv7(**{n: t[:, :cut] for n, t in x.items()}, backend=backend)
    second, end2 = wkv7(**{n: t[:, cut:] for n, t in x.items()}, state=middle, backend=backend)
    assert_close("y", torch.cat([first, second], dim=1), whole, 1e-6)
    assert_close("state", end2, end, 1e-6)


@anywhere
@pytest.mark.parametrize("lengths", [[1], [40, 3, 1, 64, 33], [1] * 9], ids=str)
def test_packing_equals_separate_texts(backend, lengths):
    x = wkv7_inputs(B=1, T=sum(lengths))
    states = random_state(x, Q=len(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    check(x, states, backend, cu_seqlens=ends)
    y, last = wkv7(**x, state=states, cu_seqlens=ends, backend=backend)
    for q, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        alone = {name: t[:, begin:end] for name, t in x.items()}
        y_alone, last_alone = wkv7(**alone, state=states[q : q + 1], backend=backend)
        assert_close("y", y[:, begin:end], y_alone, 1e-6)
        assert_close("state", last[q : q + 1], last_alone, 1e-6)


@anywhere
def test_no_gradient_leaks_between_packed_texts(backend):
    """Exactly nothing: the loss of one text does not move another's inputs or state at all."""
    x = wkv7_inputs(B=1, T=100)
    leaves = {name: t.requires_grad_() for name, t in x.items()}
    state = random_state(x, Q=3).requires_grad_()
    ends = torch.tensor([0, 10, 67, 100])
    y, last = wkv7(**leaves, state=state, cu_seqlens=ends, backend=backend)
    (y[:, 10:67].square().sum() + last[1].square().sum()).backward()
    for leaf in leaves.values():
        assert torch.equal(leaf.grad[:, :10], torch.zeros_like(leaf.grad[:, :10]))
        assert torch.equal(leaf.grad[:, 67:], torch.zeros_like(leaf.grad[:, 67:]))
        assert leaf.grad[:, 10:67].abs().max() > 0
    assert torch.equal(state.grad[::2], torch.zeros_like(state.grad[::2]))


@anywhere
@pytest.mark.parametrize("ends", [None, [0, 1, 5]], ids=["rows", "packed"])
def test_gradients(backend, ends):
    x = wkv7_inputs(B=1, T=5, H=1, N=2, dtype=torch.float64)
    x["w"][..., 0] += 4  # where chunks are halved
    ends = None if ends is None else torch.tensor(ends)
    state = random_state(x, Q=1 if ends is None else 2)
    tensors = [t.requires_grad_() for t in (*x.values(), state)]
    assert torch.autograd.gradcheck(
        lambda *ts: wkv7(
            **dict(zip(x, ts[:6], strict=True)), state=ts[6], cu_seqlens=ends, backend=backend
        ),
        tensors,
    )


@anywhere
def test_autocast_changes_nothing(backend):
    x = wkv7_inputs()
    plain = wkv7(**x, state=random_state(x), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        under = wkv7(**x, state=random_state(x), backend=backend)
    assert_close("y", under[0], plain[0], 1e-6)
    assert_close("last state", under[1], plain[1], 1e-6)


def test_inputs_of_several_types_are_read_in_that_of_v():
    """As autocast leaves them."""
    x = wkv7_inputs(dtype=torch.bfloat16)
    mixed = x | {name: x[name].float() for name in "wab"}
    y, last = wkv7(**mixed, backend="torch")
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert torch.equal(y, wkv7(**x, backend="torch")[0])


def test_no_state_is_a_state_of_zeros():
    x = wkv7_inputs()
    got, want = wkv7(**x), wkv7(**x, state=torch.zeros(2, 2, 16, 16))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_calls_leave_each_other_alone():
    """Calls work in memory that the next one has again; no result lies in it."""
    xs = [wkv7_inputs(T=45, seed=seed) for seed in (3, 4)]
    first = with_gradients(wkv7, xs[0], random_state(xs[0]), backend="torch")
    copies = {name: x.clone() for name, x in first.items()}
    second = with_gradients(wkv7, xs[1], random_state(xs[1]), backend="torch")
    assert all(torch.equal(first[name], copies[name]) for name in first)

    leaves = {name: x.clone().requires_grad_() for name, x in xs[0].items()}
    y, _ = wkv7(**leaves, state=random_state(xs[0]), backend="torch")
    with_gradients(wkv7, xs[1], random_state(xs[1]), backend="torch")
    late = torch.autograd.grad(y, leaves["k"], torch.ones_like(y))[0]
    y, _ = wkv7(**leaves, state=random_state(xs[0]), backend="torch")
    assert torch.equal(late, torch.autograd.grad(y, leaves["k"], torch.ones_like(y))[0])

    with ThreadPoolExecutor(4) as threads:
        runs = [
            threads.submit(with_gradients, wkv7, x, random_state(x), backend="torch")
            for _ in range(8)
            for x in xs
        ]
    for i, run in enumerate(runs):
        assert_all_close(run.result(), (first, second)[i % 2], 1e-6)


def test_inference_first_and_training_after():
    """What is kept between calls is made without inference mode's mark."""
    x = wkv7_inputs(T=45, seed=3)
    with torch.inference_mode():
        wkv7(**x, backend="torch")
    check(x, random_state(x), "torch")


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 15, 64, 200])
@pytest.mark.parametrize("backend", OURS)
def test_kernels_are_the_reference(backend, T):
    x = wkv7_inputs(T=T, N=64, dtype=torch.bfloat16, device="cuda")
    skip_unless_able("wkv7", BACKENDS, backend, x["v"])
    check(x, random_state(x), backend)


@pytest.mark.gpu
@pytest.mark.slow
def test_fla_is_the_reference(one_configuration):
    x = wkv7_inputs(T=200, N=128, dtype=torch.bfloat16, device="cuda")
    skip_unless_able("wkv7", BACKENDS, "fla", x["v"])
    check(x, random_state(x), "fla")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [*OURS, pytest.param("fla", marks=pytest.mark.slow)])
def test_kernels_pack(backend, one_configuration):
    lengths = [50, 1, 128, 77]
    x = wkv7_inputs(B=1, T=sum(lengths), N=64, dtype=torch.bfloat16, device="cuda")
    skip_unless_able("wkv7", BACKENDS, backend, x["v"], packed=True)
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    check(x, random_state(x, Q=len(lengths)), backend, cu_seqlens=ends)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
def test_torch_on_a_gpu(dtype):
    x = wkv7_inputs(T=100, N=64, dtype=dtype, device="cuda")
    check(x, random_state(x), "torch")


def test_shape_error_names_the_tensor():
    x = wkv7_inputs()
    x["k"] = x["k"][:, :-1]
    with pytest.raises(
        ValueError,
        match=r"wkv7: k is \[2, 31, 2, 16\], not \[B, T, H, N\] like r \[2, 32, 2, 16\]",
    ):
        wkv7(**x)


def test_no_tokens():
    x = {name: t[:, :0] for name, t in wkv7_inputs().items()}
    with pytest.raises(ValueError, match=r"wkv7: r is \[2, 0, 2, 16\].* with T > 0"):
        wkv7(**x)


def test_state_of_another_shape():
    with pytest.raises(
        ValueError,
        match=r"wkv7: state is \[1, 2, 16, 16\], expected \[Q, H, N, N\] = \[2, 2, 16, 16\]",
    ):
        wkv7(**wkv7_inputs(), state=torch.zeros(1, 2, 16, 16))


@pytest.mark.parametrize(
    ("B", "ends", "message"),
    [
        (2, [0, 32], "wkv7: packed texts need B = 1, not B = 2"),
        (1, [0, 8, 31], "wkv7: cu_seqlens covers 31 tokens, T is 32"),
        (1, [0, 8, 8, 32], r"wkv7: each packed text needs a token.* lengths \[8, 0, 24\]"),
    ],
)
def test_packing_that_does_not_fit(B, ends, message):
    with pytest.raises(ValueError, match=message):
        wkv7(**wkv7_inputs(B=B), cu_seqlens=torch.tensor(ends))


def test_unknown_backend():
    with pytest.raises(
        ValueError, match="wkv7: no backend 'numpy'; choose one of auto, cuda, triton, fla, torch"
    ):
        wkv7(**wkv7_inputs(), backend="numpy")


def test_backend_error_gives_the_reason():
    with pytest.raises(
        RuntimeError,
        match=r"wkv7: --kernel fla cannot run here \(fla: needs a GPU, the tensors are on cpu",
    ):
        wkv7(**wkv7_inputs(), backend="fla")
