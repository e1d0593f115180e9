"""Distillation losses: golden numbers, gradients, bounds, and the same however a step is cut."""

import math

import pytest
import torch
from test_infctx import with_teacher
from test_sft import V, packed, padded, small_model, texts

from losses import logprobs
from losses.distill import (
    Distillation,
    Divergence,
    forward_kl,
    generalized_jsd,
    renormalized_kl,
    reverse_kl,
    teacher_renormalized_kl,
    with_tail,
)
from losses.logprobs import score_few
from losses.sft import SFT
from rwkv.batch import TokenBatch
from rwkv.linear import Linear

STUDENT = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0], dtype=torch.float64)
TEACHER = torch.tensor([1.5, 2.0, 0.0, -0.5, -2.0], dtype=torch.float64)
TOP = torch.tensor([1, 0])  # the teacher's two likeliest
T = 2.0
TEXTS = texts([9, 4, 17, 6])
COUNT = sum(int(mask.sum()) for _, mask in TEXTS)


def of_top_k(
    divergence: Divergence,
    student: torch.Tensor,
    ids: torch.Tensor,
    values: torch.Tensor,
    lse: torch.Tensor | None,
) -> torch.Tensor:
    """The divergence from the student's logits [n, V]."""
    _, few = score_few(student, ids[:, 0], ids, divergence.temperature)
    return divergence.of_top_k(few, values, lse)


def golden(name: str, student: torch.Tensor) -> torch.Tensor:
    """One of the losses of the two rows of logits above."""
    p, q = torch.log_softmax(TEACHER / T, dim=-1), torch.log_softmax(student / T, dim=-1)
    return {
        "full forward": lambda: forward_kl(p, q),
        "full reverse": lambda: reverse_kl(p, q),
        "renormalized": lambda: renormalized_kl(TEACHER[TOP] / T, student[TOP] / T),
        "renormalized, T^2": lambda: of_top_k(
            Divergence("renormalized", T), student[None], TOP[None], TEACHER[None, TOP], None
        )[0],
        "teacher renormalized": lambda: teacher_renormalized_kl(TEACHER[TOP] / T, q[TOP]),
        "tail": lambda: forward_kl(with_tail(p[TOP]), with_tail(q[TOP])),
        "jsd 0.5": lambda: generalized_jsd(p, q, beta=0.5),
        "jsd 0.1": lambda: generalized_jsd(p, q, beta=0.1),
    }[name]()


GOLDEN = {  # computed in float64 by numpy from the definitions, beside the papers' own code
    "full forward": 0.09696537,
    "full reverse": 0.10246107,
    "renormalized": 0.06976994,
    "renormalized, T^2": 0.27907976,
    "teacher renormalized": 0.57773653,
    "tail": 0.06609802,
    "jsd 0.5": 0.02441314,
    "jsd 0.1": 0.00871577,
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers(name):
    assert golden(name, STUDENT).item() == pytest.approx(GOLDEN[name], abs=1e-8)


@pytest.mark.parametrize("name", GOLDEN)
def test_gradients(name):
    """Against central differences in float64."""
    student = STUDENT.clone().requires_grad_()
    golden(name, student).backward()
    for index in range(len(STUDENT)):
        step = torch.zeros_like(STUDENT)
        step[index] = 1e-5
        slope = (golden(name, STUDENT + step) - golden(name, STUDENT - step)).item() / 2e-5
        assert student.grad[index].item() == pytest.approx(slope, abs=1e-9)


def test_forward_gradient_by_hand():
    """d KL / d z = (q - p) / T, so that T^2 KL has the gradient T (q - p)."""
    student = STUDENT.clone().requires_grad_()
    (T**2 * golden("full forward", student)).backward()
    expected = T * (torch.softmax(STUDENT / T, -1) - torch.softmax(TEACHER / T, -1))
    torch.testing.assert_close(student.grad, expected, rtol=1e-12, atol=1e-14)


def test_jsd_ends_at_the_two_kls():
    p, q = torch.log_softmax(TEACHER, -1), torch.log_softmax(STUDENT, -1)
    assert generalized_jsd(p, q, beta=0) == forward_kl(p, q)
    assert generalized_jsd(p, q, beta=1) == reverse_kl(p, q)
    near = generalized_jsd(p, q, beta=1e-6) / 1e-6
    assert near.item() == pytest.approx(forward_kl(p, q).item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_the_tail_bound(kind):
    """0 <= over k + 1 outcomes <= over the vocabulary, growing with k to equality."""
    draw = torch.Generator().manual_seed(1)
    teacher, student = torch.randn(2, 64, V, generator=draw, dtype=torch.float64) * 2
    divergence = Divergence(kind, temperature=1.5)
    whole = divergence.of_logits(teacher, student)
    log_probs = torch.log_softmax(teacher, dim=-1)
    lse = torch.logsumexp(log_probs / 1.5, dim=-1)
    last = torch.zeros(64, dtype=torch.float64)
    for k in (1, 2, 5, 12, V - 1):
        values, ids = log_probs.topk(k, dim=-1)
        part = of_top_k(divergence, student, ids, values, lse)
        assert (part >= last - 1e-12).all() and (part <= whole + 1e-12).all()
        last = part
    torch.testing.assert_close(last, whole, rtol=1e-9, atol=1e-12)


def test_a_sure_teacher_gives_finite_numbers():
    """Where the k tokens hold all probability, the tail is clamped and no gradient is nan."""
    student = torch.tensor([[9.0, -9.0, -9.0]], requires_grad=True)
    ids, values = torch.tensor([[0, 1]]), torch.tensor([[0.0, -30.0]])
    for kind in ("forward", "reverse", "jsd"):
        student.grad = None
        loss = of_top_k(Divergence(kind, 1.0), student, ids, values, torch.zeros(1))
        loss.sum().backward()
        assert loss.isfinite().all() and student.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_mixture_is_alpha_of_the_hard_labels(alpha):
    batch, model = with_teacher(packed(TEXTS, COUNT)), small_model()
    kd = Divergence("forward", 2.0)
    loss, metrics = Distillation(kd, alpha=alpha, smoothing=0.1, l2wrap=0)(model, batch)
    hard, _ = SFT(smoothing=0.1, l2wrap=0)(model, TokenBatch(*batch[:5]))
    assert loss.item() == pytest.approx(alpha * hard.item() + (1 - alpha) * metrics["kl"].item())


@pytest.mark.parametrize("kind", ["forward", "jsd", "renormalized", "teacher_renormalized"])
def test_a_step_is_the_same_however_it_is_cut(kind):
    objective, model = Distillation(Divergence(kind, 2.0)), small_model().double()

    def step(batches):
        model.zero_grad()
        total = 0.0
        for batch in batches:
            loss, _ = objective(model, batch)
            loss.backward()
            total += loss.item()
        return total, {n: p.grad.clone() for n, p in model.named_parameters()}

    # one teacher for all cuts: its scores are drawn for the rows, then packed
    rows = [with_teacher(padded([text], COUNT)) for text in TEXTS]
    ends = torch.tensor([0] + [row.inputs.shape[1] for row in rows]).cumsum(0)
    together = rows[0]._replace(
        **{
            name: torch.cat([getattr(row, name) for row in rows], dim=1)
            for name in ("inputs", "targets", "mask", "ids", "values", "lse")
        },
        cu_seqlens=ends,
    )
    want, expected = step(rows)
    got, found = step([together])
    assert got == pytest.approx(want, rel=1e-7)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


def test_head_in_pieces_equals_the_whole(monkeypatch):
    batch, model = with_teacher(packed(TEXTS, COUNT)), small_model().double()
    objective = Distillation(Divergence())
    whole, _ = objective(model, batch)
    most = []
    logits = type(model).logits

    def counted(self, hidden):
        most.append(len(hidden))
        return logits(self, hidden)

    monkeypatch.setattr(logprobs, "MAX_LOGITS", 5 * V)
    monkeypatch.setattr(type(model), "logits", counted)
    pieces, _ = objective(model, batch)
    pieces.backward()
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-12)
    assert max(most) == 5


@pytest.mark.parametrize("beside", [False, True], ids=["scores", "teacher beside"])
def test_the_head_runs_once_forward_and_once_backward(beside, monkeypatch):
    """The student's; a teacher's runs forward alone."""
    model = small_model()
    model.head.requires_grad_(False)
    teacher = small_model(seed=3).requires_grad_(False) if beside else None
    names, runs = {model.head: "student"}, []
    if teacher is not None:
        names[teacher.head] = "teacher"
    for which in ("product", "gradient"):
        real = getattr(Linear, which)

        def noted(layer, x, *more, real=real, which=which):
            if layer in names and len(x):
                runs.append((names[layer], which, len(x)))
            return real(layer, x, *more)

        monkeypatch.setattr(Linear, which, noted)
    batch = packed(TEXTS, COUNT)
    objective = Distillation(Divergence(), teacher=teacher)
    loss, _ = objective(model, batch if beside else with_teacher(batch))
    loss.backward()
    taught = [("teacher", "product", COUNT)] * beside
    assert runs == [("student", "product", COUNT), *taught, ("student", "gradient", COUNT)]


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_teacher_beside_has_the_gradient_of_its_formulas(kind, monkeypatch):
    """The head in pieces against all logits at once, written out."""
    monkeypatch.setattr(logprobs, "MAX_LOGITS", 5 * V)
    model, teacher = small_model().double(), small_model(seed=3).double().requires_grad_(False)
    batch, divergence = packed(TEXTS, COUNT), Divergence(kind, 1.5)
    loss, _ = Distillation(divergence, alpha=0.3, l2wrap=0, teacher=teacher)(model, batch)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    places = batch.scored_places()
    student, taught = (
        m.logits(m(batch.inputs, None, batch.cu_seqlens)[0])[0, places] for m in (model, teacher)
    )
    hard = torch.nn.functional.cross_entropy(student, batch.targets[0, places])
    (0.3 * hard + 0.7 * divergence.of_logits(taught, student).mean()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-10, msg=name)


def test_a_teacher_beside_equals_its_scores_of_the_whole_vocabulary():
    """With k = V and scores in float16, to what float16 holds."""
    teacher, model = small_model(6, seed=3), small_model()
    batch = packed(TEXTS, COUNT)
    kind = Divergence("forward", 2.0)
    beside, _ = Distillation(kind, teacher=teacher.requires_grad_(False))(model, batch)
    hidden, _ = teacher(batch.inputs, None, batch.cu_seqlens)
    log_probs = torch.log_softmax(teacher.logits(hidden), dim=-1)
    values, ids = log_probs.topk(V - 1)
    from rwkv.batch import TeacherBatch

    scored = TeacherBatch(
        **batch._asdict(),
        ids=ids.to(torch.int16),
        values=values.half().view(torch.int16),
        lse=torch.logsumexp(log_probs / 2, dim=-1).view(torch.int32),
    )
    from_file, _ = Distillation(kind)(model, scored)
    assert from_file.item() == pytest.approx(beside.item(), rel=2e-3)


def test_evaluation_measures_what_training_does():
    batch, model = with_teacher(packed(TEXTS, COUNT)), small_model()
    objective = Distillation(Divergence(), alpha=0.25, l2wrap=0)
    numbers = objective.summarize(objective.measure(model, batch).tolist())
    loss, metrics = objective(model, batch)
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert numbers["kl"] == pytest.approx(metrics["kl"].item(), rel=1e-5)
    assert numbers["perplexity"] == pytest.approx(math.exp(metrics["nll"].item()), rel=1e-5)


def test_the_student_becomes_its_teacher():
    """A few steps of plain gradient descent bring the divergence down."""
    teacher, model = small_model(7, seed=9).requires_grad_(False), small_model(7)
    objective = Distillation(Divergence("forward", 1.0), alpha=0.0, teacher=teacher)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    far = []
    for _ in range(15):
        optimizer.zero_grad()
        loss, metrics = objective(model, packed(TEXTS, COUNT))
        loss.backward()
        optimizer.step()
        far.append(metrics["kl"].item())
    assert far[-1] < 0.3 * far[0]
