"""The model against the oracle, the package rwkv and itself: values, gradients, states, packing."""

import json
from pathlib import Path

import numpy as np
import parity_rwkv
import pytest
import torch
from oracle import Oracle, Tensors, random_tensors

from rwkv.checkpoint import load_model, read_tensors
from rwkv.config import RWKVConfig, default_ffn
from rwkv.model import RWKV
from rwkv.token_shift import last_token

versions = pytest.mark.parametrize("version", [6, 7], ids=["v6", "v7"])
REAL = ("rwkv7-reverse-60digits", "tiny-rwkv-6v0-1m", "tiny-rwkv-7v0-834K")
SIZES = {
    "plain": {},
    "width 40": {"C": 40, "dim_ffn": 52},
    "head size 16, narrow heads": {"C": 48, "N": 16, "heads": 2},
    "head size 32, one layer": {"C": 32, "N": 32, "layers": 1},
    "head size 64, wide heads": {"C": 40, "N": 64, "heads": 2},
    "vocabulary 65,536": {"V": 65536, "layers": 1},
}
TEXTS = ([3, 1, 4, 1, 5, 9], [2], [6, 5, 3, 5])


@pytest.fixture
def model_of(tmp_path):
    """Make a model of an oracle's tensors, by way of a file."""

    def make(tensors: Tensors, **options) -> RWKV:
        path = tmp_path / "model.pth"
        torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, path)
        return load_model(path, **options)

    return make


def tokens_of(vocabulary: int, count: int = 20, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()


@torch.no_grad()
def logits_of(model: RWKV, tokens: list[int]) -> np.ndarray:
    hidden, _ = model(torch.tensor([tokens]))
    return model.logits(hidden)[0].double().numpy()


def nll(model: RWKV, hidden: torch.Tensor, targets: list[int]) -> torch.Tensor:
    """Summed negative log-probability of the targets, [T]."""
    logits = model.logits(hidden).flatten(0, -2)
    return torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum")


def gradients(model: RWKV, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], ratio: float) -> None:
    """Each tensor's RMS error is at most `ratio` of its RMS."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        error = (got[name].double() - expected.double()).square().mean().sqrt()
        size = expected.double().square().mean().sqrt()
        assert error <= ratio * size + 1e-12, f"{name}: {error:.1e} of {size:.1e}"


@pytest.mark.parametrize("name", REAL)
def test_real_models_give_the_oracles_logits(assets, name):
    tensors = read_tensors(assets / "models" / f"{name}.pth")
    tokens = tokens_of(tensors.shapes["emb.weight"][0])
    want = Oracle({key: tensor.numpy() for key, tensor in tensors.items()}).logits(tokens)
    got = logits_of(load_model(assets / "models" / f"{name}.pth"), tokens)
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-5 * max(1, want.std()))


@versions
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_random_models_give_the_oracles_logits(model_of, version, sizes):
    tensors = random_tensors(version, **sizes)
    tokens = tokens_of(len(tensors["emb.weight"]))
    want = Oracle(tensors).logits(tokens)
    assert 0.7 < want.std() < 1.4
    np.testing.assert_allclose(logits_of(model_of(tensors), tokens), want, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", [*REAL[1:], "random 6", "random 7"])
def test_golden_logits(request, model_of, name):
    """What the package rwkv computed: see tests/parity_rwkv.py."""
    golden = json.loads(parity_rwkv.GOLDEN.read_text())["logits"][name]
    if name.startswith("random"):
        model = model_of(random_tensors(int(name[-1])))
    else:
        model = load_model(request.getfixturevalue("assets") / "models" / f"{name}.pth")
    want = np.array(golden["last"])
    got = logits_of(model, golden["tokens"])[-1]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, want.std()))


@versions
def test_the_package_rwkv_agrees_with_a_tuned_state(model_of, tmp_path, version):
    """Logits and the likeliest continuation, begun from a state in the files' layout."""
    parity_rwkv.skip_without_peer()
    model = model_of(random_tensors(version))
    state = {f"blocks.{n}.att.time_state": torch.randn(3, 8, 8) for n in range(2)}
    torch.save(state, tmp_path / "state.pth")
    for layer, tensor in enumerate(state.values()):
        model.blocks[layer].att.time_state = torch.nn.Parameter(tensor)
    tokens = tokens_of(32)
    peer = parity_rwkv.ask_peer(
        tmp_path / "model.pth", tokens, count=12, state=Path(tmp_path / "state.pth")
    )
    np.testing.assert_allclose(logits_of(model, tokens), peer.logits, rtol=0, atol=5e-5)
    for _ in range(12):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    assert tokens[-12:] == peer.written


@versions
def test_gradients_are_the_oracles(model_of, version):
    """Two entries of every tensor by central differences of the oracle's loss."""
    tensors = random_tensors(version)
    model = model_of(tensors, dtype=torch.float64)
    tokens = tokens_of(32, 7)
    hidden, _ = model(torch.tensor([tokens[:-1]]))
    found = gradients(model, nll(model, hidden, tokens[1:]) / 6)
    draw, step = np.random.default_rng(0), 1e-5
    for name, gradient in found.items():
        for entry in draw.integers(0, gradient.numel(), 2):
            if name == "emb.weight":
                entry = tokens[0] * gradient.shape[1]
            losses = []
            for sign in (1, -1):
                moved = dict(tensors)
                moved[name] = tensors[name].astype(np.float64).copy()
                moved[name].flat[entry] += sign * step
                losses.append(Oracle(moved).loss(tokens))
            want = (losses[0] - losses[1]) / (2 * step)
            assert gradient.flatten()[entry].item() == pytest.approx(want, rel=1e-4, abs=1e-8), name


@versions
def test_float32_gradients_are_float64s(model_of, version):
    tensors, tokens = random_tensors(version), tokens_of(32, 40)
    found = []
    for dtype in (torch.float32, torch.float64):
        model = model_of(tensors, dtype=dtype)
        hidden, _ = model(torch.tensor([tokens[:-1]]))
        found.append(gradients(model, nll(model, hidden, tokens[1:])))
    assert_same(*found, ratio=1e-4)


@versions
@pytest.mark.parametrize("cut", [1, 8, 18])
def test_a_sequence_may_be_cut_anywhere(model_of, version, cut):
    """The state handed on makes two pieces one, in values and gradients."""
    model = model_of(random_tensors(version), dtype=torch.float64)
    tokens = tokens_of(32)
    row = torch.tensor([tokens[:-1]])
    whole, end = model(row)
    first, middle = model(row[:, :cut])
    second, end_of_second = model(row[:, cut:], middle)
    pieces = torch.cat([first, second], dim=1)
    torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)
    for got, want in zip(end_of_second, end, strict=True):
        torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-9, atol=1e-9)
    want = gradients(model, nll(model, whole, tokens[1:]))
    assert_same(gradients(model, nll(model, pieces, tokens[1:])), want, ratio=1e-9)


@versions
def test_packed_texts_equal_separate_ones(model_of, version):
    """In hidden states, end states and gradients; one of the texts has a single token."""
    model = model_of(random_tensors(version), dtype=torch.float64)
    targets = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]
    alone = [model(torch.tensor([text])) for text in TEXTS]
    hidden = torch.cat([hidden for hidden, _ in alone], dim=1)
    borders = torch.tensor([0, 6, 7, 11])
    packed, states = model(torch.tensor([sum(TEXTS, [])]), cu_seqlens=borders)
    torch.testing.assert_close(packed, hidden, rtol=1e-9, atol=1e-9)
    for layer, state in enumerate(states):
        for field, got in state._asdict().items():
            want = torch.cat([getattr(end[layer], field) for _, end in alone])
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    want = gradients(model, nll(model, hidden, targets))
    assert_same(gradients(model, nll(model, packed, targets)), want, ratio=1e-9)


@versions
def test_packed_texts_continue_from_their_own_states(model_of, version):
    model = model_of(random_tensors(version), dtype=torch.float64)
    whole, _ = model(torch.tensor([TEXTS[0] + TEXTS[2]]))
    other, _ = model(torch.tensor([TEXTS[1] + TEXTS[1]]))
    borders = torch.tensor([0, 6, 7])
    _, states = model(torch.tensor([TEXTS[0] + TEXTS[1]]), cu_seqlens=borders)
    borders = torch.tensor([0, 4, 5])
    rest, _ = model(torch.tensor([TEXTS[2] + TEXTS[1]]), states, borders)
    torch.testing.assert_close(rest[:, :4], whole[:, 6:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rest[:, 4:], other[:, 1:], rtol=1e-9, atol=1e-9)


@versions
def test_no_gradient_goes_from_one_packed_text_to_another(model_of, version):
    model = model_of(random_tensors(version))
    embedded = model.emb(torch.tensor([sum(TEXTS, [])])).detach().requires_grad_()
    hidden, states = model.run_blocks(embedded, None, torch.tensor([0, 6, 7, 11]))
    reached = hidden[0, 6:7].sum() + sum(field[1].sum() for state in states for field in state)
    (gradient,) = torch.autograd.grad(reached, embedded)
    assert not gradient[0, :6].any() and not gradient[0, 7:].any()
    assert gradient[0, 6].any()


@versions
def test_recomputing_blocks_changes_no_gradient(model_of, version):
    model = model_of(random_tensors(version))
    tokens = tokens_of(32)
    found = []
    for model.grad_cp in (False, True):
        _, state = model(torch.tensor([tokens[:4]]))
        hidden, _ = model(torch.tensor([tokens[4:-1]]), state)
        found.append(gradients(model, nll(model, hidden, tokens[5:])))
    assert_same(*found, ratio=1e-6)


@versions
def test_batched_rows_equal_single_ones(model_of, version):
    model = model_of(random_tensors(version), dtype=torch.float64)
    rows = [tokens_of(32, 9, seed) for seed in range(3)]
    hidden, states = model(torch.tensor(rows))
    alone, _ = model(torch.tensor(rows[2:]))
    torch.testing.assert_close(hidden[2:], alone, rtol=1e-9, atol=1e-9)
    picked = [state.select(torch.tensor([2, 2])) for state in states]
    more, _ = model(torch.tensor([[1], [1]]), picked)
    whole, _ = model(torch.tensor([[*rows[2], 1]]))
    torch.testing.assert_close(more, whole[:, -1:].expand_as(more), rtol=1e-9, atol=1e-9)


@versions
def test_a_tuned_state_is_where_every_text_starts(model_of, version):
    """And its gradient is that of the state itself, summed over the texts."""
    model = model_of(random_tensors(version), dtype=torch.float64)
    tuned = [torch.nn.Parameter(torch.randn(3, 8, 8, dtype=torch.float64)) for _ in model.blocks]
    zeros = model.initial_state(2)
    given = [
        state._replace(wkv=tensor.expand(2, 3, 8, 8))
        for state, tensor in zip(zeros, tuned, strict=True)
    ]
    rows = torch.tensor([[1, 2, 3], [4, 5, 6]])
    want, _ = model(rows, given)
    for block, tensor in zip(model.blocks, tuned, strict=True):
        block.att.time_state = tensor
    got, _ = model(rows)
    torch.testing.assert_close(got, want)
    found = torch.autograd.grad(got.square().sum(), tuned)
    for gradient, expected in zip(
        found, torch.autograd.grad(want.square().sum(), tuned), strict=True
    ):
        torch.testing.assert_close(gradient, expected)
        assert gradient.any()


@versions
def test_bfloat16_keeps_the_wkv_state_in_float32(model_of, version):
    tensors, tokens = random_tensors(version), tokens_of(32)
    model = model_of(tensors, dtype=torch.bfloat16)
    hidden, states = model(torch.tensor([tokens]))
    assert hidden.dtype == torch.bfloat16
    assert {state.wkv.dtype for state in states} == {torch.float32}
    error = logits_of(model, tokens) - Oracle(tensors).logits(tokens)
    assert np.sqrt((error**2).mean()) < 0.05


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 9, 50])], ids=["rows", "packed"])
def test_a_state_does_not_keep_its_tokens_alive(cu_seqlens):
    x = torch.randn(1 if cu_seqlens is not None else 2, 50, 8)
    last = last_token(x, cu_seqlens)
    assert last.untyped_storage().nbytes() == 2 * 8 * x.element_size()


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="72 channels are no whole number of heads of 64"):
        RWKVConfig(version=7, n_layer=1, n_embd=72, dim_ffn=288, vocab_size=12)
    with pytest.raises(ValueError, match="version 5 is not 6 or 7"):
        RWKVConfig(version=5, n_layer=1, n_embd=64, dim_ffn=224, vocab_size=12)


def test_sizes_of_new_models():
    """The channel mix of 0.1B of version 7, and of 1.6B and 7B of version 6, as published."""
    assert (default_ffn(7, 768), default_ffn(6, 2048), default_ffn(6, 4096)) == (3072, 7168, 14336)
