"""Every wkv6 backend against the reference, and the reference against autograd and itself."""

import pytest
import torch
from helpers import (
    assert_all_close,
    assert_close,
    random_state,
    skip_unless_able,
    with_gradients,
    wkv6_inputs,
)

from rwkv.ops import chunk_layout
from rwkv.ops.wkv6 import BACKENDS, wkv6

# Largest relative error against the reference. float32: the chunked form was measured at 1e-6 or
# less. bfloat16: rounding the results alone gives 1.7e-3, our kernels up to 4.6e-3. fla's, which
# are not ours, up to 7.8e-3.
ALLOWED = {torch.float32: 5e-6, torch.bfloat16: 5e-3}
ALLOWED_FLA = 8e-3
OURS = [name for name in BACKENDS if name not in ("fla", "torch", "reference")]  # kernels
anywhere = pytest.mark.parametrize("backend", ["torch", "reference"])


def double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.double() for name, x in inputs.items()}


def part(inputs: dict[str, torch.Tensor], begin: int, end: int) -> dict[str, torch.Tensor]:
    """The inputs of tokens begin to end."""
    return {name: x if name == "u" else x[:, begin:end] for name, x in inputs.items()}


def check(inputs, state, backend, **options):
    """The backend's results and gradients are those of the reference in float64."""
    want = with_gradients(wkv6, double(inputs), state.double(), backend="reference", **options)
    got = with_gradients(wkv6, inputs, state, backend=backend, **options)
    allowed = ALLOWED_FLA if backend == "fla" else ALLOWED[inputs["v"].dtype]
    assert_all_close(got, want, allowed)


def test_one_step_by_hand():
    """N = 1: y = (S0 + v * u * k) * r and S = S0 * exp(-exp(w)) + v * k."""
    numbers = {"r": 2.0, "w": -0.5, "k": 3.0, "v": 5.0, "state": 4.0}
    tensors = {name: torch.full((1, 1, 1, 1), value) for name, value in numbers.items()}
    tensors["u"] = torch.tensor([[0.25]])
    S = 4.0 * 0.5452392118926051 + 15.0  # exp(-exp(-0.5)) = 0.54523921...
    for backend in ("reference", "torch"):
        y, state = wkv6(**tensors, backend=backend)
        assert (state.item(), y.item()) == pytest.approx((S, 2 * (4.0 + 3.75)), rel=1e-6)


def test_values_are_rows_and_keys_are_columns():
    """One token, u = 1: S[i, j] = v[i] k[j], and y[i] = S[i, :] . r."""
    tensors = {name: torch.zeros(1, 1, 1, 2) for name in "rw"} | {"u": torch.ones(1, 2)}
    tensors["v"], tensors["k"] = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 5.0]]]])
    tensors["r"] = torch.tensor([[[[0.0, 1.0]]]])
    for backend in ("reference", "torch"):
        y, state = wkv6(**tensors, backend=backend)
        assert state.tolist() == [[[[3.0, 5.0], [6.0, 10.0]]]]
        assert y.flatten().tolist() == [5.0, 10.0]


@pytest.mark.parametrize("T", [1, 2, 3, 31, 32, 33, 100])
def test_chunks_are_the_reference(T):
    x = wkv6_inputs(T=T)
    check(x, random_state(x), "torch")


@pytest.mark.parametrize("N", [1, 24, 64])
def test_every_head_size(N):
    x = wkv6_inputs(B=1, T=40, N=N)
    check(x, random_state(x), "torch")


def test_more_chunks_than_are_worked_on_at_once(monkeypatch):
    monkeypatch.setattr(chunk_layout, "LIMIT_CPU", 4)
    x = wkv6_inputs(B=1, T=163, H=3, N=8)
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
    """RWKV-6 bounds none; nothing overflows, and no digit is lost."""
    x = wkv6_inputs(T=70)
    x["w"] = decay(x["w"])
    check(x, random_state(x), "torch")


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6])
def test_every_size_of_state(scale):
    x = wkv6_inputs(T=70)
    check(x, random_state(x, scale=scale), "torch")


def test_long_texts_keep_their_digits():
    """Against the same backend in float64, which the other tests hold to the reference."""
    x = wkv6_inputs(B=1, T=4096, H=1)
    state = random_state(x)
    want = with_gradients(wkv6, double(x), state.double(), backend="torch")
    got = with_gradients(wkv6, x, state, backend="torch")
    assert_all_close(got, want, ALLOWED[torch.float32])


def test_bfloat16():
    x = wkv6_inputs(T=70, dtype=torch.bfloat16)
    check(x, random_state(x), "torch")


@anywhere
@pytest.mark.parametrize("cut", [1, 7, 32, 49])
def test_state_carries_over(backend, cut):
    """Two calls with the state between them equal one: infctx, chat and packing rest on it."""
    x = wkv6_inputs(T=50)
    whole, end = wkv6(**x, backend=backend)
    first, middle = wkv6(**part(x, 0, cut), backend=backend)
    second, end2 = wkv6(**part(x, cut, 50), state=middle, backend=backend)
    assert_close("y", torch.cat([first, second], dim=1), whole, 1e-6)
    assert_close("state", end2, end, 1e-6)


@anywhere
@pytest.mark.parametrize("lengths", [[1], [40, 3, 1, 64, 33], [1] * 9], ids=str)
def test_packing_equals_separate_texts(backend, lengths):
    x = wkv6_inputs(B=1, T=sum(lengths))
    states = random_state(x, Q=len(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    check(x, states, backend, cu_seqlens=ends)
    y, last = wkv6(**x, state=states, cu_seqlens=ends, backend=backend)
    for q, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        y_alone, last_alone = wkv6(**part(x, begin, end), state=states[q : q + 1], backend=backend)
        assert_close("y", y[:, begin:end], y_alone, 1e-6)
        assert_close("state", last[q : q + 1], last_alone, 1e-6)


@anywhere
def test_no_gradient_leaks_between_packed_texts(backend):
    """Exactly nothing: the loss of one text does not move another's inputs or state at all."""
    x = wkv6_inputs(B=1, T=100)
    leaves = {name: t.requires_grad_() for name, t in x.items()}
    state = random_state(x, Q=3).requires_grad_()
    ends = torch.tensor([0, 10, 67, 100])
    y, last = wkv6(**leaves, state=state, cu_seqlens=ends, backend=backend)
    (y[:, 10:67].square().sum() + last[1].square().sum()).backward()
    for leaf in (leaves[name] for name in "rwkv"):
        assert torch.equal(leaf.grad[:, :10], torch.zeros_like(leaf.grad[:, :10]))
        assert torch.equal(leaf.grad[:, 67:], torch.zeros_like(leaf.grad[:, 67:]))
        assert leaf.grad[:, 10:67].abs().max() > 0
    assert torch.equal(state.grad[::2], torch.zeros_like(state.grad[::2]))


@anywhere
@pytest.mark.parametrize("ends", [None, [0, 1, 5]], ids=["rows", "packed"])
def test_gradients(backend, ends):
    x = wkv6_inputs(B=1, T=5, H=1, N=2, dtype=torch.float64)
    x["w"][..., 0] += 4  # where chunks are halved
    x["w"][..., 1] -= 4  # where they are not
    ends = None if ends is None else torch.tensor(ends)
    state = random_state(x, Q=1 if ends is None else 2)
    tensors = [t.requires_grad_() for t in (*x.values(), state)]
    assert torch.autograd.gradcheck(
        lambda *ts: wkv6(
            **dict(zip(x, ts[:5], strict=True)), state=ts[5], cu_seqlens=ends, backend=backend
        ),
        tensors,
    )


@anywhere
def test_autocast_changes_nothing(backend):
    x = wkv6_inputs()
    plain = wkv6(**x, state=random_state(x), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        under = wkv6(**x, state=random_state(x), backend=backend)
    assert_close("y", under[0], plain[0], 1e-6)
    assert_close("last state", under[1], plain[1], 1e-6)


def test_inputs_of_several_types_are_read_in_that_of_v():
    """As autocast leaves them."""
    x = wkv6_inputs(dtype=torch.bfloat16)
    mixed = x | {name: x[name].float() for name in "wu"}
    y, last = wkv6(**mixed, backend="torch")
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert torch.equal(y, wkv6(**x, backend="torch")[0])


def test_no_state_is_a_state_of_zeros():
    x = wkv6_inputs()
    got, want = wkv6(**x), wkv6(**x, state=torch.zeros(2, 2, 16, 16))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_inference_first_and_training_after():
    """What is kept between calls is made without inference mode's mark."""
    x = wkv6_inputs(T=45, seed=3)
    with torch.inference_mode():
        wkv6(**x, backend="torch")
    check(x, random_state(x), "torch")


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 15, 64, 200])
@pytest.mark.parametrize("backend", OURS)
def test_kernels_are_the_reference(backend, T):
    x = wkv6_inputs(T=T, N=64, dtype=torch.bfloat16, device="cuda")
    skip_unless_able("wkv6", BACKENDS, backend, x["v"])
    check(x, random_state(x), backend)


@pytest.mark.gpu
@pytest.mark.slow
def test_fla_is_the_reference(one_configuration):
    x = wkv6_inputs(T=200, N=128, dtype=torch.bfloat16, device="cuda")
    skip_unless_able("wkv6", BACKENDS, "fla", x["v"])
    check(x, random_state(x), "fla")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [*OURS, pytest.param("fla", marks=pytest.mark.slow)])
def test_kernels_pack(backend, one_configuration):
    lengths = [50, 1, 128, 77]
    x = wkv6_inputs(B=1, T=sum(lengths), N=64, dtype=torch.bfloat16, device="cuda")
    skip_unless_able("wkv6", BACKENDS, backend, x["v"], packed=True)
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    check(x, random_state(x, Q=len(lengths)), backend, cu_seqlens=ends)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
def test_torch_on_a_gpu(dtype):
    x = wkv6_inputs(T=100, N=64, dtype=dtype, device="cuda")
    check(x, random_state(x), "torch")


def test_shape_error_names_the_tensor():
    x = wkv6_inputs()
    x["k"] = x["k"][:, :-1]
    with pytest.raises(
        ValueError,
        match=r"wkv6: k is \[2, 31, 2, 16\], not \[B, T, H, N\] like r \[2, 32, 2, 16\]",
    ):
        wkv6(**x)


def test_no_tokens():
    with pytest.raises(ValueError, match=r"wkv6: r is \[2, 0, 2, 16\].* with T > 0"):
        wkv6(**part(wkv6_inputs(), 0, 0))


def test_bonus_of_another_shape():
    x = wkv6_inputs()
    x["u"] = x["u"].T
    with pytest.raises(ValueError, match=r"wkv6: u is \[16, 2\], expected \[H, N\] = \[2, 16\]"):
        wkv6(**x)


def test_state_of_another_shape():
    with pytest.raises(
        ValueError,
        match=r"wkv6: state is \[1, 2, 16, 16\], expected \[Q, H, N, N\] = \[2, 2, 16, 16\]",
    ):
        wkv6(**wkv6_inputs(), state=torch.zeros(1, 2, 16, 16))


@pytest.mark.parametrize(
    ("B", "ends", "message"),
    [
        (2, [0, 32], "wkv6: packed texts need B = 1, not B = 2"),
        (1, [0, 8, 31], "wkv6: cu_seqlens covers 31 tokens, T is 32"),
        (1, [0, 8, 8, 32], r"wkv6: each packed text needs a token.* lengths \[8, 0, 24\]"),
    ],
)
def test_packing_that_does_not_fit(B, ends, message):
    with pytest.raises(ValueError, match=message):
        wkv6(**wkv6_inputs(B=B), cu_seqlens=torch.tensor(ends))


def test_unknown_backend():
    with pytest.raises(
        ValueError, match="wkv6: no backend 'numpy'; choose one of auto, cuda, triton, fla, torch"
    ):
        wkv6(**wkv6_inputs(), backend="numpy")


def test_backend_error_gives_the_reason():
    with pytest.raises(
        RuntimeError,
        match=r"wkv6: --kernel fla cannot run here \(fla: needs a GPU, the tensors are on cpu",
    ):
        wkv6(**wkv6_inputs(), backend="fla")
