"""Shared prompts: the same scores and gradients as reading each prompt with each answer."""

import numpy as np
import pytest
import torch
from test_infctx import living_states

from data.pair_pieces import Pair, make_batch
from losses import logprobs, preference
from losses.dpo import DPO
from losses.kto import KTO, mismatched
from losses.logprobs import score_logits
from losses.orpo import ORPO
from losses.preference import Preference, answer_log_probs, reference_log_probs
from losses.simpo import SimPO
from rwkv.chunks import ChunkPlan
from rwkv.config import RWKVConfig, default_ranks
from rwkv.init import initialize
from rwkv.linear import Linear
from rwkv.model import RWKV

V = 37
SHAPES = [(9, 4, 7), (1, 1, 3), (17, 2, 1), (3, 12, 5), (6, 1, 1)]  # prompt, chosen, rejected


def small_model(version: int = 7) -> RWKV:
    """Two layers with no parameter at its start value, so that all gradients count."""
    config = RWKVConfig(
        version=version,
        n_layer=2,
        n_embd=32,
        dim_ffn=64,
        vocab_size=V,
        head_size=16,
        ranks=default_ranks(version, 32),
    )
    model = RWKV(config, "torch")
    initialize(model, 0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def make_pairs(shapes=SHAPES, reference=True) -> list[Pair]:
    draw = np.random.default_rng(0)
    return [
        Pair(
            *(draw.integers(0, V, n).astype(np.uint16) for n in shape),
            reference=tuple(-draw.random(2) * 10) if reference else None,
        )
        for shape in shapes
    ]


def separate_scores(model: RWKV, pairs: list[Pair]) -> torch.Tensor:
    """The oracle: each prompt and answer read from the start, one after another."""
    found = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            if not len(answer):
                continue
            text = torch.from_numpy(np.concatenate([pair.prompt, answer]).astype(np.int64))
            hidden, _ = model(text[None, :-1])
            scores = score_logits(model.logits(hidden[0]), text[1:]).log_prob
            found.append(scores[len(pair.prompt) - 1 :].sum())
    return torch.stack(found)


def gradients(model, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    weights = torch.linspace(-1, 1, len(scores), dtype=scores.dtype)
    (scores * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


PLANS = {
    "whole": None,
    "chunks of 5": ChunkPlan(5),
    "chunks in host memory": ChunkPlan(17, offload=True),
}


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("grad_cp", [False, True, "selective"])
def test_shared_prompts_equal_two_passes(plan, version, grad_cp):
    model = small_model(version)
    pairs = make_pairs()
    expected = separate_scores(model, pairs)
    wanted = gradients(model, expected)
    model.grad_cp = grad_cp
    scores = answer_log_probs(model, make_batch(pairs), PLANS[plan])
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-5)
    found = gradients(model, scores)
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error <= 2e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize("version", [6, 7])
def test_shared_prompts_equal_two_passes_in_float64(version):
    """Nothing but rounding separates the two."""
    model, pairs = small_model(version).double(), make_pairs()
    wanted = gradients(model, separate_scores(model, pairs))
    found = gradients(model, answer_log_probs(model, make_batch(pairs), ChunkPlan(6)))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def test_pairs_do_not_see_each_other():
    model, pairs = small_model(), make_pairs()
    together = answer_log_probs(model, make_batch(pairs))
    alone = torch.cat([answer_log_probs(model, make_batch([pair])) for pair in pairs])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_truncated_chunks_keep_the_scores():
    model, batch = small_model(), make_batch(make_pairs())
    whole, cut = (answer_log_probs(model, batch, p) for p in (None, ChunkPlan(4, truncated=True)))
    torch.testing.assert_close(whole, cut, rtol=1e-5, atol=1e-5)


OBJECTIVES = {
    "dpo": Preference(DPO(beta=0.3), nll_weight=0.2),
    "ipo": Preference(DPO(beta=0.3, kind="ipo")),
    "orpo": Preference(ORPO(), nll_weight=1.0),
    "simpo": Preference(SimPO(), nll_weight=0.1),
}


def with_count(pairs: list[Pair], all_pairs: list[Pair]):
    return make_batch(pairs, make_batch(all_pairs).count.tolist())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_the_same_however_it_is_cut(name):
    """Micro-batches and ranks, also one without any pair, change neither loss nor gradient."""
    objective, model, pairs = OBJECTIVES[name], small_model().double(), make_pairs()
    totals, grads = [], []
    for parts in ([pairs], [[pair] for pair in pairs] + [[]], [pairs[:2], [], pairs[2:]]):
        model.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for part in parts:
            loss, metrics = objective(model, with_count(part, pairs))
            loss.backward()
            for key, value in {"loss": loss.detach(), **metrics}.items():
                sums[key] = sums.get(key, 0.0) + value.item()
        totals.append(sums)
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for sums, found in zip(totals[1:], grads[1:], strict=True):
        assert sums == pytest.approx(totals[0], rel=1e-5)  # reference scores are float32
        for key, gradient in grads[0].items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-6, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_evaluation_gives_the_training_numbers(name):
    objective, model, pairs = OBJECTIVES[name], small_model(), make_pairs()
    loss, metrics = objective(model, make_batch(pairs))
    total = sum(objective.measure(model, make_batch([pair])) for pair in pairs)
    total = total + objective.measure(model, make_batch([]))
    numbers = objective.summarize(total.tolist())
    expected = {"loss": loss.item(), **{key: value.item() for key, value in metrics.items()}}
    assert numbers == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_frozen_head_gives_the_gradient_of_one_that_trains(name, monkeypatch):
    """In pieces, made along the way, against one piece that is run again."""
    objective, batch, found = OBJECTIVES[name], make_batch(make_pairs()), []
    for trains, rows in ((False, 4), (True, 1000)):
        monkeypatch.setattr(logprobs, "MAX_LOGITS", rows * V)
        model = small_model().double()
        model.head.requires_grad_(trains)
        loss, _ = objective(model, batch)
        loss.backward()
        blocks = {n: p.grad for n, p in model.named_parameters() if not n.startswith("head")}
        found.append({"loss": loss.detach(), **blocks})
        assert (model.head.weight.grad is not None) == trains
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-7, atol=1e-10, msg=key)


def test_a_frozen_head_runs_once_forward_and_once_backward(monkeypatch):
    model, batch = small_model(), make_batch(make_pairs())
    model.head.requires_grad_(False)
    runs = []
    for which in ("product", "gradient"):
        real = getattr(Linear, which)

        def noted(layer, x, *more, real=real, which=which):
            if layer is model.head and len(x):
                runs.append((which, len(x)))
            return real(layer, x, *more)

        monkeypatch.setattr(Linear, which, noted)
    loss, _ = Preference(DPO())(model, batch)
    loss.backward()
    first, rest = batch.first.numel(), batch.targets.numel()
    assert runs == [(w, n) for n in (first, rest) for w in ("product", "gradient")]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("grad_cp", [False, True, "selective"])
def test_states_that_nobody_reads_are_free_before_the_answers_are_scored(
    grad_cp, plan, monkeypatch
):
    """The prompts' own, once the answers have their copies, and those that answers end with."""
    model, found, real = small_model(), [], preference.token_log_probs
    model.grad_cp = grad_cp
    living = living_states(model)
    monkeypatch.setattr(
        preference, "token_log_probs", lambda *some: found.append(living()) or real(*some)
    )
    answer_log_probs(model, make_batch(make_pairs()), PLANS[plan])
    assert found[1] == 0 and (plan != "whole" or found[0] == 2)


def test_nll_is_the_chosen_answers_alone():
    """Per token over all chosen answers; no prompt token, no rejected token."""
    model, pairs = small_model(), make_pairs()
    _, metrics = Preference(ORPO())(model, make_batch(pairs))
    chosen = separate_scores(model, pairs)[::2].sum()
    tokens = sum(len(pair.chosen) for pair in pairs)
    assert metrics["nll"].item() == pytest.approx(-chosen.item() / tokens, rel=1e-5)


def test_the_last_token_is_learned_like_any_other():
    """Token 0 ends texts and fills rows: it is scored nevertheless."""
    model = small_model()
    pair = Pair(np.array([5, 6]), np.array([7, 0]), np.array([8, 0]))
    torch.testing.assert_close(
        answer_log_probs(model, make_batch([pair])), separate_scores(model, [pair])
    )


def test_reference_scores_survive_a_cast_of_the_batch():
    """Trainers cast the floats of a batch; scores of -500 nats must not become bfloat16."""
    batch = make_batch(make_pairs())
    cast = batch._replace(
        **{
            name: value.bfloat16()
            for name, value in batch._asdict().items()
            if value is not None and value.is_floating_point()
        }
    )
    found = reference_log_probs(None, cast, None, None)
    scores = [float(score) for pair in make_pairs() for score in pair.reference]
    expected = torch.tensor(scores)
    torch.testing.assert_close(found, expected)


def test_dpo_without_scores_says_what_to_run():
    batch = make_batch(make_pairs(reference=False))
    with pytest.raises(ValueError, match=r"python -m data\.make_reference adds them"):
        Preference(DPO())(small_model(), batch)


class Frozen:
    """Within the block a model is as it was when this was made."""

    def __init__(self, model):
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def __call__(self, model):
        self.model = model
        return self

    def __enter__(self):
        self.after = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self._load(self.before)

    def __exit__(self, *error):
        self._load(self.after)

    def _load(self, values):
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(values[name])


def test_a_step_down_the_gradient_raises_the_margin():
    model = small_model()
    objective = Preference(DPO(beta=1.0), reference=Frozen(model))
    batch = make_batch(make_pairs(reference=False))
    before, metrics = objective(model, batch)
    assert before.item() == pytest.approx(0.693147, abs=1e-4)
    assert metrics["rewards/accuracies"].item() == 0.5
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
    after, metrics = objective(model, batch)
    assert after < before
    assert metrics["rewards/margins"] > 0


def test_kto_takes_single_answers():
    model = small_model()
    pairs = make_pairs([(5, 3, 0), (4, 0, 6), (7, 2, 2)], reference=False)
    objective = KTO(beta=0.5, undesirable=2.0, reference=Frozen(model))
    loss, metrics = objective(model, make_batch(pairs))
    assert loss.item() == pytest.approx((2 * 0.5 + 2 * 2.0 * 0.5) / 4, abs=1e-4)
    assert metrics["kl"].item() == pytest.approx(0.0, abs=1e-4)
    loss.backward()
    numbers = objective.summarize(objective.measure(model, make_batch(pairs)).tolist())
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_kto_baseline_is_of_answers_after_other_prompts():
    batch = make_batch(make_pairs())
    other = mismatched(batch)
    assert (other.prompt_of != batch.prompt_of).all()
    model = small_model()
    pairs = make_pairs()
    turned = [
        pair._replace(prompt=pairs[(n + 1) % len(pairs)].prompt) for n, pair in enumerate(pairs)
    ]
    torch.testing.assert_close(
        answer_log_probs(model, other), separate_scores(model, turned), rtol=1e-5, atol=1e-5
    )
