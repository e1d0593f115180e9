"""The SFT loss: by hand, against torch, and the same however a step is cut."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from losses import logprobs
from losses.logprobs import score_logits, score_tokens
from losses.sft import SFT, l2wrap, smoothed_nll
from rwkv.batch import TokenBatch
from rwkv.chunks import ChunkPlan, cut
from rwkv.config import RWKVConfig, default_ranks
from rwkv.init import initialize
from rwkv.model import RWKV

V = 37


def small_model(version: int = 7, seed: int = 0) -> RWKV:
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
    initialize(model, seed)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model


def texts(lengths: list[int], seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens [n + 1] and the mask of their n targets."""
    draw = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(V, (n + 1,), generator=draw),
            torch.rand(n, generator=draw) < 0.6,
        )
        for n in lengths
    ]


def packed(some, count: int) -> TokenBatch:
    ends = torch.tensor([0] + [len(mask) for _, mask in some]).cumsum(0)
    return TokenBatch(
        torch.cat([t[:-1] for t, _ in some])[None],
        torch.cat([t[1:] for t, _ in some])[None],
        torch.cat([m for _, m in some])[None],
        ends,
        torch.tensor(count),
    )


def padded(some, count: int) -> TokenBatch:
    longest = max(len(mask) for _, mask in some)

    def rows(values):
        return torch.stack([F.pad(v, (0, longest - len(v))) for v in values])

    return TokenBatch(
        rows([t[:-1] for t, _ in some]),
        rows([t[1:] for t, _ in some]),
        rows([m for _, m in some]),
        None,
        torch.tensor(count),
    )


def gradients(model: nn.Module, batches: list[TokenBatch], objective: SFT):
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss, _ = objective(model, batch)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters()}


TEXTS = texts([9, 4, 17, 6, 12, 3])
COUNT = sum(int(mask.sum()) for _, mask in TEXTS)
CUTS = {
    "one padded batch": [padded(TEXTS, COUNT)],
    "rows one by one": [padded([text], COUNT) for text in TEXTS],
    "one packed row": [packed(TEXTS, COUNT)],
    "two packed rows": [packed(TEXTS[:2], COUNT), packed(TEXTS[2:], COUNT)],
    "with an empty rank": [
        packed(TEXTS, COUNT),
        packed([(torch.zeros(2, dtype=torch.long), torch.zeros(1, dtype=torch.bool))], COUNT),
    ],
}


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("cut_as", CUTS)
def test_a_step_is_the_same_however_it_is_cut(cut_as, version):
    """Micro-batches, accumulation, packing and ranks change neither loss nor gradient."""
    objective = SFT(smoothing=0.05, l2wrap=1e-4)
    model = small_model(version).double()
    want, expected = gradients(model, CUTS["rows one by one"], objective)
    got, found = gradients(model, CUTS[cut_as], objective)
    assert got == pytest.approx(want, rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("length", [1, 5, 13, 51])
@pytest.mark.parametrize("how", ["padded", "packed"])
def test_chunks_give_the_whole_gradient(how, length, version):
    batch = packed(TEXTS, COUNT) if how == "packed" else padded(TEXTS, COUNT)
    model = small_model(version).double()
    want, expected = gradients(model, [batch], SFT(smoothing=0.01))
    got, found = gradients(model, [batch], SFT(smoothing=0.01, chunks=ChunkPlan(length)))
    assert got == pytest.approx(want, rel=1e-9)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-10, msg=name)


def test_truncated_chunks_change_the_gradient_but_not_the_loss():
    batch = padded(TEXTS, COUNT)
    model = small_model().double()
    want, expected = gradients(model, [batch], SFT())
    got, found = gradients(model, [batch], SFT(chunks=ChunkPlan(5, truncated=True)))
    assert got == pytest.approx(want, rel=1e-9)
    assert not torch.allclose(
        found["blocks.0.att.key.weight"], expected["blocks.0.att.key.weight"], rtol=1e-3
    )


def test_states_in_host_memory_give_the_same_gradient():
    batch = packed(TEXTS, COUNT)
    model = small_model().double()
    _, expected = gradients(model, [batch], SFT(chunks=ChunkPlan(7)))
    _, found = gradients(model, [batch], SFT(chunks=ChunkPlan(7, offload=True)))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_cut_tells_whether_a_text_continues():
    batch = packed(texts([4, 3]), 7)
    pieces = [cut(batch, start, min(start + 2, 7)) for start in range(0, 7, 2)]
    assert [continues for _, continues in pieces] == [False, True, False, True]
    assert [p.cu_seqlens.tolist() for p, _ in pieces] == [[0, 2], [0, 2], [0, 2], [0, 1]]


def test_chunk_that_spans_two_texts():
    piece, continues = cut(packed(texts([4, 3]), 7), 3, 6)
    assert continues and piece.cu_seqlens.tolist() == [0, 1, 3]


def test_grad_cp_changes_nothing():
    model = small_model().double()
    want, expected = gradients(model, [packed(TEXTS, COUNT)], SFT())
    model.grad_cp = True
    got, found = gradients(model, [packed(TEXTS, COUNT)], SFT())
    assert got == want
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=0)


def test_smoothing_by_hand():
    """Logits log 1, log 2, log 5 and target 1: p = 1/8, 2/8, 5/8."""
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    scores = score_logits(logits, torch.tensor([1]))
    mean = (math.log(1 / 8) + math.log(2 / 8) + math.log(5 / 8)) / 3
    assert smoothed_nll(scores, 0.1).item() == pytest.approx(-0.9 * math.log(2 / 8) - 0.1 * mean)


def test_smoothing_is_torchs():
    logits, targets = torch.randn(20, V, generator=torch.Generator().manual_seed(0)), None
    targets = torch.arange(20) % V
    got = smoothed_nll(score_logits(logits, targets), 0.1)
    want = F.cross_entropy(logits, targets, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(got, want)


def test_label_smoothing_golden_number():
    """e = 0.1, logits [2, 1, 0.5, -1, 0], target 1, in float64: 1.624438."""
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]], dtype=torch.float64)
    scores = score_logits(logits, torch.tensor([1]))
    assert smoothed_nll(scores, 0.1).item() == pytest.approx(1.624438, abs=1e-6)


def test_l2wrap_pulls_the_largest_logit():
    """One token whose largest logit is 2: gradient 1e-4 * 2 there, 0 elsewhere, value 0."""
    logits = torch.tensor([[0.5, 2.0, -1.0]], requires_grad=True)
    term = l2wrap(score_logits(logits, torch.tensor([0])), 1e-4)
    term.backward()
    assert term.item() == 0
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 2e-4, 0.0]]))


def test_head_in_pieces_equals_the_whole(monkeypatch):
    model = small_model().double()
    hidden = torch.randn(23, 32, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(23) % V
    whole = score_logits(model.logits(hidden), targets)
    whole.log_prob.sum().backward()
    expected, hidden.grad = hidden.grad, None
    monkeypatch.setattr(logprobs, "MAX_LOGITS", 5 * V)
    pieces = score_tokens(model, hidden, targets)
    pieces.log_prob.sum().backward()
    for got, want in zip(pieces, whole, strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(hidden.grad, expected)


def test_log_probs_do_not_shift():
    """logits[t] scores targets[t]; a second shift would read the wrong column."""
    logits = torch.full((3, 4), -20.0)
    targets = torch.tensor([2, 0, 3])
    logits[torch.arange(3), targets] = 20.0
    scores = score_logits(logits, targets)
    assert scores.log_prob.abs().max() < 1e-6
    assert scores.hit.tolist() == [1, 1, 1]


def test_evaluation_is_the_training_loss_without_smoothing():
    model = small_model()
    batch = packed(TEXTS, COUNT)
    nll, _, count = SFT().measure(model, batch).tolist()
    _, metrics = SFT(smoothing=0.3)(model, batch)
    assert count == COUNT
    assert nll / COUNT == pytest.approx(metrics["nll"].item(), rel=1e-6)
