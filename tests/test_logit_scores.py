"""What losses need of logits and the gradient it sends back: kernels, formulas, and the head.

The kernels run on a GPU as they are. Without one they run in Triton's interpreter; that must be
chosen before triton is imported, so this file then runs itself in a process of its own
(`test_in_the_interpreter`).
"""

import os
import weakref

import pytest
import torch
from helpers import assert_close, pass_in_the_interpreter
from test_sft import V, small_model
from torch import Tensor
from torch.nn import functional as F

from losses import logprobs
from losses.distill import Divergence
from losses.logprobs import (
    FewScores,
    TokenScores,
    score_few,
    score_logits,
    score_tokens,
    sum_over_tokens,
    token_log_probs,
)
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


TEMPERATURE = 1.7


def few_ids(n: int, size: int) -> Tensor:
    """Some tokens of each row: the first and last of all, and one that comes twice."""
    ids = torch.randint(size, (n, 5), generator=torch.Generator().manual_seed(3))
    ids[:, 0], ids[:, 1], ids[:, 3] = 0, size - 1, ids[:, 2]
    return ids.to(DEVICE)


def few_by_autograd(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    return logits.gather(-1, ids), torch.logsumexp(logits / TEMPERATURE, dim=-1)


def gradient_with_few(scores: TokenScores, few: Tensor, tempered: Tensor, logits: Tensor) -> Tensor:
    weights = torch.linspace(-2, 1, few.numel()).view(few.shape).to(few)
    total = (few * weights).sum() + (tempered * weights[:, 0]).sum()
    (gradient,) = torch.autograd.grad(total + scores.log_prob.sum(), logits)
    return gradient


def test_few_tokens_and_their_gradient_are_those_of_autograd():
    logits, targets = (x.cpu() for x in drawn(5, 33, torch.float64))
    ids = few_ids(5, 33).cpu()
    logits.requires_grad_()
    scores, few = score_few(logits, targets, ids, TEMPERATURE)
    want = few_by_autograd(logits, ids)
    for a, b in zip(few[:2], want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradient_with_few(scores, few.logits, few.tempered, logits),
        gradient_with_few(by_autograd(logits, targets), *want, logits),
        rtol=1e-10,
        atol=1e-12,
    )


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [7, 8192, 9000], ids=str)
@pytest.mark.parametrize("given_up", [False, True])
def test_kernels_give_few_tokens_as_the_formulas_do(given_up, size, dtype):
    logits, targets = drawn(5, size, dtype)
    ids = few_ids(5, size)
    exact = logits.double().requires_grad_()
    scores, few = score_few(logits.requires_grad_(), targets, ids, TEMPERATURE, given_up=given_up)
    want = few_by_autograd(exact, ids)
    for name, a, b in zip(("logits", "tempered"), few, want, strict=False):
        assert_close(name, a.detach(), b.detach(), 1e-6)
    bound = 1e-5 if dtype == torch.float32 else 2e-3
    gradient = gradient_with_few(scores, few.logits, few.tempered, logits)
    assert (gradient.data_ptr() == logits.data_ptr()) == given_up
    wanted = gradient_with_few(by_autograd(exact, targets), *want, exact)
    assert_close("gradient", gradient, wanted, bound)


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


DIVERGENCE = Divergence("forward", TEMPERATURE)


def top_k_quantities(scores: TokenScores, few: FewScores) -> Tensor:
    """The loss of distillation from a teacher of five tokens."""
    values = torch.linspace(0, -3, 5).expand_as(few.logits).to(few.logits)
    far = DIVERGENCE.of_top_k(few, values, values.new_full((len(values),), 1.5)).sum()
    return torch.stack([quantities(scores)[0] + 0.3 * far, far.detach()])


def plainly(what: str, logits: Tensor, targets: Tensor, ids: Tensor) -> Tensor:
    """The quantities of all positions, as one would write them."""
    scores = by_autograd(logits, targets)
    if what == "scores":
        return quantities(scores)
    return top_k_quantities(scores, FewScores(*few_by_autograd(logits, ids), TEMPERATURE))


def made_along_the_way(what: str, model, hidden: Tensor, targets: Tensor, ids: Tensor) -> Tensor:
    if what == "scores":
        return along_the_way(model, hidden, targets)

    def function(logits: Tensor, some: Tensor, some_ids: Tensor) -> Tensor:
        return top_k_quantities(*score_few(logits, some, some_ids, TEMPERATURE, given_up=True))

    return sum_over_tokens(model, hidden, (targets, ids), function)


@pytest.mark.parametrize("inside", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize("rows", [23, 5], ids=["one piece", "pieces"])
@pytest.mark.parametrize("kind", ["frozen", "trained", "lora", "int8"])
@pytest.mark.parametrize("what", ["scores", "top k"])
def test_the_gradient_made_along_the_way_is_that_of_the_scores(
    what, kind, rows, inside, monkeypatch
):
    monkeypatch.setattr(logprobs, "MAX_LOGITS", rows * V)
    targets, ids = torch.arange(23) % V, few_ids(23, V).cpu()
    results = []
    for along in (False, True):
        model, hidden = model_with_head(kind), hidden_states()

        def run(h, model=model, along=along):
            h = 2 * h
            if along:
                return made_along_the_way(what, model, h, targets, ids)
            return plainly(what, model.logits(h), targets, ids)

        out = recomputed(run, hidden, model=model) if inside else run(hidden)
        (out[0] / 7).backward()
        parts = [p.grad for p in model.head.parameters() if p.requires_grad]
        results.append([out.detach(), hidden.grad, *parts])
    assert len(results[0]) == {"frozen": 2, "trained": 3, "lora": 4, "int8": 2}[kind]
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@kernels
@pytest.mark.parametrize("kind", ["frozen", "trained", "lora"])
@pytest.mark.parametrize("what", ["scores", "top k", "log-probs"])
def test_kernels_along_the_way_are_near_the_formulas(what, kind, monkeypatch):
    """In bfloat16, pieces of 8 of 23 positions; the formulas in float64 read the same logits."""
    monkeypatch.setattr(logprobs, "MAX_LOGITS", 2 * V)
    targets, ids = (torch.arange(23) % V).to(DEVICE), few_ids(23, V)
    factors = torch.linspace(-1, 2, 23, device=DEVICE, dtype=torch.float64)
    model = model_with_head(kind).bfloat16().to(DEVICE)
    exact = model_with_head(kind).bfloat16().double().to(DEVICE)
    hidden = hidden_states().bfloat16().to(DEVICE).detach().requires_grad_()
    wide = hidden.detach().double().requires_grad_()
    with torch.no_grad():
        rounded = torch.cat([model.logits(some) for some in hidden.split(8)])
    assert uses_kernels(rounded)
    logits = exact.logits(wide)
    logits = logits + (rounded - logits).detach()
    if what == "log-probs":
        want = by_autograd(logits, targets).log_prob
        got = token_log_probs(model, hidden, targets)
    else:
        want = plainly(what, logits, targets, ids)
        got = made_along_the_way(what, model, hidden, targets, ids)
    for out in (want, got):
        ((out * factors).sum() if what == "log-probs" else out[0] / 7).backward()
    assert_close("values", got.detach(), want.detach(), 1e-5)
    assert_close("hidden states", hidden.grad, wide.grad, 8e-3)
    pairs = zip(model.head.named_parameters(), exact.head.parameters(), strict=True)
    for (name, mine), its in pairs:
        if mine.requires_grad:
            assert_close(name, mine.grad, its.grad, 8e-3)


def test_logits_that_were_given_up_have_one_backward_pass():
    logits, targets = drawn(3, 40, torch.float32)
    loss = score_logits(1 * logits.requires_grad_(), targets, given_up=True).log_prob.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_scores_that_run_the_head_again_have_the_same_gradient(monkeypatch):
    monkeypatch.setattr(logprobs, "MAX_LOGITS", 5 * V)
    model, targets, found = model_with_head("frozen"), torch.arange(23) % V, []
    for run in (along_the_way, lambda *given: quantities(score_tokens(*given))):
        hidden = hidden_states()
        run(model, hidden, targets)[0].backward()
        found.append(hidden.grad)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


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


@pytest.fixture
def runs(monkeypatch):
    """The head's products and gradients, in their order, with the rows of each."""
    found = []
    for name in ("product", "gradient"):
        real = getattr(Linear, name)

        def noted(layer, x, *more, real=real, name=name):
            if layer.out_features == V and len(x):
                found.append((name, len(x)))
            return real(layer, x, *more)

        monkeypatch.setattr(Linear, name, noted)
    return found


def hidden_states() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(23, 32, generator=draw, dtype=torch.float64).requires_grad_()


ONCE = [("product", 23), ("gradient", 23)]


def test_the_head_runs_once_forward_and_once_backward(runs):
    model, hidden = model_with_head("frozen"), hidden_states()
    along_the_way(model, hidden, torch.arange(23) % V)[0].backward()
    assert runs == ONCE


def test_the_frozen_head_runs_once_for_log_probs(runs):
    model, hidden = model_with_head("frozen"), hidden_states()
    log_probs = token_log_probs(model, hidden, torch.arange(23) % V)
    torch.nn.functional.logsigmoid(log_probs).sum().backward()
    assert runs == ONCE


def test_a_piece_is_gone_before_the_next(monkeypatch):
    monkeypatch.setattr(logprobs, "MAX_LOGITS", 5 * V)
    model, living, most = model_with_head("frozen"), [], []
    real = model.logits

    def logits(hidden):
        out = real(hidden)
        if len(out):
            living.append(weakref.ref(out.untyped_storage()))
            most.append(sum(one() is not None for one in living))
        return out

    monkeypatch.setattr(model, "logits", logits)
    targets = torch.arange(23) % V
    along_the_way(model, hidden_states(), targets)[0].backward()
    token_log_probs(model, hidden_states(), targets).sum().backward()
    assert most == [1] * 10


@pytest.mark.parametrize("inside", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize("rows", [23, 5], ids=["one piece", "pieces"])
@pytest.mark.parametrize("kind", ["frozen", "trained", "lora", "int8"])
def test_log_probs_have_the_gradient_of_the_scores(kind, rows, inside, monkeypatch):
    """Under any factors, one for each token."""
    monkeypatch.setattr(logprobs, "MAX_LOGITS", rows * V)
    targets = torch.arange(23) % V
    factors = torch.linspace(-1, 2, 23, dtype=torch.float64)
    results = []
    for along in (False, True):
        model, hidden = model_with_head(kind), hidden_states()

        def run(h, model=model, along=along):
            if along:
                return token_log_probs(model, 2 * h, targets)
            return score_logits(model.logits(2 * h), targets).log_prob

        out = recomputed(run, hidden, model=model) if inside else run(hidden)
        (out * factors).sum().backward()
        parts = [p.grad for p in model.head.parameters() if p.requires_grad]
        results.append([out.detach(), hidden.grad, *parts])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_the_factors_of_tokens_are_not_rounded():
    model = model_with_head("frozen").bfloat16()
    found = []
    for factors in (torch.ones(4), torch.tensor([1.0, 1 / 3, -0.1, 0.7])):
        hidden = torch.ones(4, 32, dtype=torch.bfloat16, requires_grad=True)
        (token_log_probs(model, hidden, torch.arange(4)) * factors).sum().backward()
        found.append(hidden.grad)
    assert torch.equal(found[1], (found[0].float() * factors.unsqueeze(-1)).bfloat16())


def test_a_scattered_model_runs_the_pieces_of_all_ranks(monkeypatch):
    """Two pieces more than its own, which are empty; values and gradients stay."""
    targets, ids = torch.arange(23) % V, few_ids(23, V).cpu()
    results = []
    for scattered in (False, True):
        monkeypatch.setattr(logprobs, "MAX_LOGITS", 5 * V)
        monkeypatch.setattr(logprobs, "is_scattered", lambda _, scattered=scattered: scattered)
        monkeypatch.setattr(logprobs, "most_of_all_ranks", lambda number, *_: number + 2)
        model, hidden = model_with_head("frozen"), hidden_states()
        total = made_along_the_way("top k", model, hidden, targets, ids)
        log_probs = token_log_probs(model, hidden, targets)
        (total[0] + log_probs.square().sum()).backward()
        results.append([total.detach(), log_probs.detach(), hidden.grad])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_no_tokens_have_no_log_probs():
    model, hidden = model_with_head("frozen"), torch.zeros(0, 32).double().requires_grad_()
    found = token_log_probs(model, hidden, torch.zeros(0, dtype=torch.int64))
    found.sum().backward()
    assert found.shape == (0,) and hidden.grad.shape == (0, 32)


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
