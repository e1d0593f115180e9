"""What losses need of logits and the gradient it sends back: kernels, formulas, and the head.

The kernels run on a GPU as they are. Without one they run in Triton's interpreter; that must be
chosen before triton is imported, so this file then runs itself in a process of its own
(`test_in_the_interpreter`).
"""

import os

import pytest
import torch
from helpers import assert_close, pass_in_the_interpreter
from test_sft import V, small_model
from torch import Tensor
from torch.nn import functional as F

from losses import logprobs
from losses.logprobs import TokenScores, score_logits, score_tokens, sum_over_tokens
from losses.sft import l2wrap, smoothed_nll
from peft.registry import make_adapter
from peft.stores import make_store
from rwkv.linear import Linear
from rwkv.ops import logit_scores
from rwkv.ops.fused import uses_kernels
from rwkv.recompute import recomputed

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"

kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in another process")
pytestmark = pytest.mark.gpu if ON_GPU else []


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="runs the others where there is no GPU")
def test_in_the_interpreter():
    pass_in_the_interpreter(__file__, "-k", "kernels")


def drawn(n: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits with their largest at the target in row 0, and tied in rows 1 and 2."""
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(n, size, generator=g, dtype=torch.float64)).to(DEVICE, dtype)
    targets = torch.randint(size, (n,), generator=g).to(DEVICE)
    logits[0, targets[0]] = 20.0
    logits[1, [0, size - 1]] = 20.0
    logits[2] = -7.0
    return logits, targets


def by_autograd(logits: Tensor, targets: Tensor) -> TokenScores:
    """The scores as one would write them, with torch's own gradients."""
    total = torch.logsumexp(logits, dim=-1)
    target = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    largest = logits.amax(dim=-1)
    hit = (target.detach() >= largest.detach()).to(logits.dtype)
    return TokenScores(target - total, logits.mean(dim=-1) - total, largest, hit)


def gradient_of(scores: TokenScores, logits: Tensor) -> Tensor:
    weights = [torch.linspace(a, a + 1, len(logits)).to(scores[0]) for a in (-1.0, 0.3, 2.0)]
    total = sum((w * field).sum() for w, field in zip(weights, scores, strict=False))
    (gradient,) = torch.autograd.grad(total, logits)
    return gradient


def test_scores_and_gradient_are_those_of_autograd():
    """Ties share the gradient of the largest logit, as in torch's amax."""
    logits, targets = drawn(5, 33, torch.float64)
    logits = logits.cpu().requires_grad_()
    got, want = score_logits(logits, targets.cpu()), by_autograd(logits, targets.cpu())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradient_of(got, logits), gradient_of(want, logits), rtol=1e-10, atol=1e-12
    )


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [7, 8192, 9000], ids=str)
def test_kernels_give_the_scores_and_gradient_of_the_formulas(dtype, size):
    logits, targets = drawn(5, size, dtype)
    assert uses_kernels(logits)
    exact = logits.double().requires_grad_()
    want = by_autograd(exact, targets)
    logits.requires_grad_()
    got = score_logits(logits, targets)
    for name, a, b in zip(TokenScores._fields, got, want, strict=True):
        assert_close(name, a.detach(), b.detach(), 1e-6)
    bound = 1e-5 if dtype == torch.float32 else 2e-3  # the gradient is rounded to logits' dtype
    assert_close("gradient", gradient_of(got, logits), gradient_of(want, exact), bound)


@kernels
def test_kernels_write_the_gradient_over_the_logits():
    logits, targets = drawn(4, 300, torch.bfloat16)
    read = logit_scores.read_logits(logits, targets)
    flows = {name: torch.linspace(-1, 1, 4).to(DEVICE) for name in ("target", "mean", "lse")}
    flows["largest"] = torch.ones(4, device=DEVICE)
    apart = logit_scores.logit_gradient(
        logits, targets, read, **flows, out=torch.empty_like(logits)
    )
    over = logit_scores.logit_gradient(logits, targets, read, **flows, out=logits)
    assert over is logits and torch.equal(over, apart)


@kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_kernels_hide_no_bad_number(bad):
    logits, targets = drawn(3, 50, torch.float32)
    logits[1, 7] = bad
    scores = score_logits(logits, targets)
    assert scores.log_prob.isfinite().tolist() == [True, False, True]


def quantities(scores: TokenScores) -> Tensor:
    loss = smoothed_nll(scores, 0.1).sum() + l2wrap(scores, 0.5)
    return torch.stack([loss, -scores.log_prob.detach().sum(), scores.hit.sum()])


def along_the_way(model, hidden: Tensor, targets: Tensor) -> Tensor:
    """`quantities` of the scores, with their gradient made in the forward pass."""

    def function(logits: Tensor, some: Tensor) -> Tensor:
        return quantities(score_logits(logits, some, given_up=True))

    return sum_over_tokens(model, hidden, (targets,), function)


def model_with_head(kind: str):
    torch.manual_seed(0)
    model = small_model().double()
    model.requires_grad_(False)
    if kind == "trained":
        model.head.requires_grad_(True)
    elif kind == "lora":
        model.head = make_adapter("lora", model.head, rank=4, scale=2.0)
        torch.nn.init.normal_(model.head.lora_B)
    elif kind == "int8":
        model.head.store_as(make_store("int8", model.head.weight))
    return model


@pytest.mark.parametrize("inside", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize("rows", [23, 5], ids=["one piece", "pieces"])
@pytest.mark.parametrize("kind", ["frozen", "trained", "lora", "int8"])
def test_the_gradient_made_along_the_way_is_that_of_the_scores(kind, rows, inside, monkeypatch):
    monkeypatch.setattr(logprobs, "MAX_LOGITS", rows * V)
    targets = torch.arange(23) % V
    results = []
    for along in (False, True):
        model = model_with_head(kind)
        hidden = torch.randn(23, 32, generator=torch.Generator().manual_seed(1)).double()
        hidden.requires_grad_()

        def run(h, model=model, along=along):
            h = 2 * h
            if along:
                return along_the_way(model, h, targets)
            return quantities(score_tokens(model, h, targets))

        out = recomputed(run, hidden, model=model) if inside else run(hidden)
        (out[0] / 7).backward()
        parts = [p.grad for p in model.head.parameters() if p.requires_grad]
        results.append([out.detach(), hidden.grad, *parts])
    assert len(results[0]) == {"frozen": 2, "trained": 3, "lora": 4, "int8": 2}[kind]
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_factor_from_behind_is_not_rounded(dtype):
    """1 / 3 of a gradient of bfloat16 numbers: each is rounded once."""
    model = small_model().to(dtype)
    model.requires_grad_(False)
    found = []
    for factor in (1.0, 1 / 3):
        hidden = torch.ones(4, 32, dtype=dtype, requires_grad=True)
        out = along_the_way(model, hidden, torch.arange(4))
        (out[0] * factor).backward()
        found.append(hidden.grad)
    assert torch.equal(found[1], (found[0].float() * torch.tensor(1 / 3)).to(dtype))


def test_the_head_runs_once_forward_and_once_backward(monkeypatch):
    runs = []
    for name in ("product", "gradient"):
        real = getattr(Linear, name)
        monkeypatch.setattr(
            Linear,
            name,
            lambda layer, x, *more, real=real, name=name: (
                runs.append((name, len(x))) or real(layer, x, *more)
            ),
        )
    model = model_with_head("frozen")
    hidden = torch.zeros(23, 32, dtype=torch.float64, requires_grad=True)
    along_the_way(model, hidden, torch.arange(23) % V)[0].backward()
    assert [run for run in runs if run[1]] == [("product", 23), ("gradient", 23)]


def test_without_gradients_the_value_is_the_same():
    model, hidden, targets = model_with_head("frozen"), torch.ones(5, 32).double(), torch.arange(5)
    with torch.no_grad():
        bare = along_the_way(model, hidden, targets)
    torch.testing.assert_close(bare, along_the_way(model, hidden, targets))


def test_smoothed_loss_is_torchs_in_value_and_gradient():
    logits = torch.randn(20, V, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.arange(20) % V
    ours = smoothed_nll(score_logits(logits, targets), 0.1).sum()
    theirs = F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)), rtol=1e-5, atol=1e-7
    )
