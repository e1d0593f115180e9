"""Losses of chosen and rejected answers: golden numbers, gradients, and what never happens."""

import math

import pytest
import torch
from torch import Tensor

from losses.dpo import DPO, KINDS, dpo_loss
from losses.kto import kto_loss
from losses.orpo import ORPO, log_odds_ratio, log_one_minus_exp, orpo_loss
from losses.preference import Answers
from losses.simpo import SimPO, simpo_loss

# log-probability of each token of one pair, under the policy and under the reference
CHOSEN, REJECTED = [-0.5, -1.0, -0.25], [-2.0, -0.75, -1.5, -0.1, -0.6]
REF_CHOSEN, REF_REJECTED = [-0.7, -0.9, -0.4], [-1.5, -0.8, -1.2, -0.2, -0.9]
BETA = 0.1


def answers(tokens: list[float], reference: list[float] | None = None) -> Answers:
    total = torch.tensor([sum(tokens)], dtype=torch.float64, requires_grad=True)
    known = None if reference is None else torch.tensor([sum(reference)], dtype=torch.float64)
    return Answers(total, torch.tensor([len(tokens)]), known)


def golden_pair() -> tuple[Answers, Answers]:
    return answers(CHOSEN, REF_CHOSEN), answers(REJECTED, REF_REJECTED)


@pytest.mark.parametrize(
    ("kind", "flipped", "value"),
    [
        ("sigmoid", 0.0, 0.66359711),
        ("hinge", 0.0, 0.94),
        ("ipo", 0.0, 23.49017778),
        ("cdpo", 0.1, 0.66959711),
        ("robust", 0.1, 0.65609711),
        ("length-normalized", 0.0, 0.68550990),
    ],
)
def test_dpo_golden_numbers(kind, flipped, value):
    """Computed with numpy in float64, independently of torch."""
    loss = dpo_loss(*golden_pair(), beta=BETA, kind=kind, flipped=flipped)
    assert loss.item() == pytest.approx(value, abs=1e-6)


def test_dpo_metrics_golden_numbers():
    _, metrics = DPO(beta=BETA)(*golden_pair())
    found = dict(zip(DPO.metrics, (value.item() for value in metrics), strict=True))
    assert found == pytest.approx(
        {
            "rewards/chosen": 0.025,
            "rewards/rejected": -0.035,
            "rewards/margins": 0.06,
            "rewards/accuracies": 1.0,
            "logps/chosen": -1.75,
            "logps/rejected": -4.95,
        }
    )


def test_orpo_golden_numbers():
    chosen, rejected = golden_pair()
    assert log_odds_ratio(chosen.mean, rejected.mean).item() == pytest.approx(0.7586503, abs=1e-6)
    assert orpo_loss(chosen, rejected).item() == pytest.approx(0.38410395, abs=1e-6)


def test_simpo_golden_number():
    loss = simpo_loss(*golden_pair(), beta=2.0, gamma=0.5)
    assert loss.item() == pytest.approx(0.54870286, abs=1e-6)


def test_kto_golden_numbers():
    chosen, rejected = golden_pair()
    gain = torch.cat([chosen.gain, rejected.gain])
    loss = kto_loss(gain, torch.tensor([True, False]), torch.tensor(0.05), beta=BETA)
    assert loss.tolist() == pytest.approx([0.49500017, 0.49000133], abs=1e-6)


def test_dpo_gradient_identity():
    """d loss / d log_prob is -beta s(-beta D) for chosen, + for rejected."""
    chosen, rejected = golden_pair()
    dpo_loss(chosen, rejected, beta=BETA).backward()
    expected = BETA * torch.sigmoid(torch.tensor(-0.06, dtype=torch.float64)).item()
    assert chosen.log_prob.grad.item() == pytest.approx(-expected, abs=1e-9)
    assert rejected.log_prob.grad.item() == pytest.approx(expected, abs=1e-9)


def gradient_by_hand(loss, chosen: float, rejected: float, step: float = 1e-6):
    """Central differences of a loss of the two summed log-probabilities."""
    return (
        (loss(chosen + step, rejected) - loss(chosen - step, rejected)) / (2 * step),
        (loss(chosen, rejected + step) - loss(chosen, rejected - step)) / (2 * step),
    )


LOSSES = {kind: lambda c, r, kind=kind: dpo_loss(c, r, beta=BETA, kind=kind) for kind in KINDS}
LOSSES |= {
    "robust, e = 0.1": lambda c, r: dpo_loss(c, r, beta=BETA, kind="robust", flipped=0.1),
    "orpo": orpo_loss,
    "simpo": lambda c, r: simpo_loss(c, r, beta=2.0, gamma=0.5),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_value(name):
    chosen, rejected = golden_pair()
    LOSSES[name](chosen, rejected).backward()

    def value(c: float, r: float) -> float:
        made = (
            side._replace(log_prob=torch.tensor([x], dtype=torch.float64))
            for side, x in zip((chosen, rejected), (c, r), strict=True)
        )
        return LOSSES[name](*made).item()

    expected = gradient_by_hand(value, sum(CHOSEN), sum(REJECTED))
    found = chosen.log_prob.grad.item(), rejected.log_prob.grad.item()
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("x", [-1e-6, -0.1, -math.log(2), -1.0, -50.0, -500.0])
def test_log_one_minus_exp(x):
    leaf = torch.tensor(x, requires_grad=True)
    y = log_one_minus_exp(leaf)
    y.backward()
    exact = math.log(-math.expm1(x)) if x > -30 else -math.exp(x)
    assert y.item() == pytest.approx(exact, rel=1e-4, abs=1e-30)
    assert math.isfinite(leaf.grad.item())


@pytest.mark.parametrize(
    ("chosen", "rejected"), [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-99.0, -1.0)]
)
def test_orpo_is_finite_for_sure_answers(chosen, rejected):
    """Probability 1 has infinite odds; the loss and its gradient stay finite."""
    means = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
    pair = [Answers(x, torch.ones(1)) for x in means]
    loss = orpo_loss(*pair)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert all(x.grad.isfinite().all() for x in means)


def test_sums_would_turn_length_into_preference():
    """Equal averages: ORPO and SimPO see a tie whatever the lengths."""
    short, long = answers([-1.0] * 3), answers([-1.0] * 30)
    assert log_odds_ratio(short.mean, long.mean).item() == pytest.approx(0.0, abs=1e-12)
    assert SimPO(gamma=0.0)(short, long)[0].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", ["sigmoid", "robust", "cdpo", "length-normalized"])
def test_dpo_starts_at_log_two(kind):
    pair = answers(CHOSEN, CHOSEN), answers(REJECTED, REJECTED)
    assert dpo_loss(*pair, beta=0.5, kind=kind, flipped=0.1).item() == pytest.approx(math.log(2))


def test_a_tie_counts_half():
    pair = answers(CHOSEN, CHOSEN), answers(REJECTED, REJECTED)
    for loss in (DPO(), ORPO(), SimPO()):
        found = dict(zip(loss.metrics, loss(*pair)[1], strict=True))
        assert found["rewards/accuracies"].item() in (0.5, 1.0)
    found = dict(zip(DPO.metrics, DPO()(*pair)[1], strict=True))
    assert found["rewards/accuracies"].item() == 0.5


def test_without_reference_dpo_says_so():
    with pytest.raises(ValueError, match="the answers have no reference"):
        dpo_loss(answers(CHOSEN), answers(REJECTED), beta=BETA)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="no loss 'sigmod'; choose one of sigmoid, ipo"):
        dpo_loss(*golden_pair(), beta=BETA, kind="sigmod")


def test_kto_gradient_signs():
    """A good answer is pulled up, a bad one down; the baseline carries no gradient here."""
    gain = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss: Tensor = kto_loss(gain, torch.tensor([True, False]), torch.tensor(0.0), beta=0.2)
    loss.sum().backward()
    assert gain.grad.tolist() == pytest.approx([-0.05, 0.05])
