"""Decoding one token at a time: equal to the model on rows of one token, on every backend.

On a GPU the kernels run as they are, and in a CUDA graph. Without one those in Triton run in its
interpreter; that must be chosen before triton is imported, so this file then runs itself in a
process of its own (`test_in_the_interpreter`).
"""

import os

import pytest
import torch
from helpers import assert_close, pass_in_the_interpreter
from oracle import random_tensors

from rwkv.checkpoint import load_model, write_tensors
from rwkv.decoder import Decoder, Pace, Picker, backend_of, owned, read_one
from rwkv.generate import GREEDY, banned_tokens, generate
from rwkv.model import RWKV
from rwkv.ops import decoding_torch
from rwkv.sampling_flags import Sampling

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
N = 64 if ON_GPU else 16

kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in another process")
versions = pytest.mark.parametrize("version", [6, 7], ids=["v6", "v7"])
DRAWN = Sampling(0.8, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.2, penalty_decay=0.9)


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="runs the others where there is no GPU")
def test_in_the_interpreter():
    pass_in_the_interpreter(__file__, "-k", "triton")


def small_model(tmp_path, version: int, *, dtype=torch.float32, backend="auto", **sizes) -> RWKV:
    path = tmp_path / f"{version}.pth"
    sizes = {"C": 4 * N, "N": N, "heads": 3, "V": 300} | sizes
    tensors = random_tensors(version, **sizes)
    write_tensors(path, {name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    model = load_model(path, device=DEVICE, dtype=dtype, backend=backend)
    return model.requires_grad_(False).eval()


def prompts(count: int, V: int = 300) -> list[list[int]]:
    draw = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 12, (count,), generator=draw).tolist()
    return [torch.randint(V, (length,), generator=draw).tolist() for length in lengths]


def token_by_token(model: RWKV, tokens: torch.Tensor, lanes=()) -> dict[str, torch.Tensor]:
    """Hidden states and the last state of rows [B, T] that are read with `read_one`."""
    state = owned(model.initial_state(len(tokens)))
    hidden = [read_one(model, column, state, lanes) for column in tokens.T]
    return named(torch.stack(hidden, dim=1), state)


def named(hidden, state) -> dict[str, torch.Tensor]:
    fields = {f"{f} {n}": t for n, s in enumerate(state) for f, t in s._asdict().items()}
    return {"hidden": hidden} | fields


@versions
@pytest.mark.parametrize("heads", [3, 5], ids=["narrow", "wide"])
def test_reading_one_by_one_equals_reading_at_once(tmp_path, version, heads):
    model = small_model(tmp_path, version, dtype=torch.float64, backend="torch", heads=heads)
    tokens = torch.randint(300, (3, 9), device=DEVICE)
    got = token_by_token(model, tokens)
    for name, want in named(*model(tokens)).items():
        assert_close(name, got[name], want, 1e-9)


@versions
def test_a_tuned_state_stays_what_it_was(tmp_path, version):
    model = small_model(tmp_path, version, backend="torch")
    for block in model.blocks:
        block.att.time_state = torch.nn.Parameter(torch.randn(3, N, N, device=DEVICE))
    before = model.blocks[0].att.time_state.clone()
    tokens = torch.randint(300, (2, 4), device=DEVICE)
    got = token_by_token(model, tokens)
    assert_close("hidden", got["hidden"], model(tokens)[0], 1e-5)
    assert torch.equal(model.blocks[0].att.time_state, before)


@kernels
@versions
@pytest.mark.parametrize("C", [4 * N, 5 * N], ids=["power", "no power"])
def test_triton_reads_as_torch_does(tmp_path, version, C):
    model = small_model(tmp_path, version, C=C, dim_ffn=3 * C)
    assert backend_of(model).__name__ == "rwkv.ops.decoding_triton"
    tokens = torch.randint(300, (3, 5), device=DEVICE)
    want = token_by_token(
        small_model(tmp_path, version, C=C, dim_ffn=3 * C, backend="torch"), tokens
    )
    got = token_by_token(model, tokens)
    for name in want:
        assert_close(name, got[name], want[name], 1e-5)


SAMPLINGS = [
    GREEDY,
    Sampling(),
    Sampling(0.7, top_k=5),
    Sampling(1.3, top_p=0.6),
    Sampling(0.9, top_p=0.8, top_k=40),
    Sampling(top_p=0.0),
    DRAWN,
    Sampling(0.0, frequency_penalty=1.0),
]


@kernels
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("V", [300, 20000])
def test_triton_picks_as_torch_does(sampling, V):
    """Three tokens a row, one of five banned, with equal logits among them."""
    from rwkv.ops import picking_triton

    draw = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(4, V, generator=draw)).bfloat16().float().to(DEVICE)
    banned = (torch.arange(V) % 5 == 2).to(DEVICE)
    counts = [torch.zeros(4, V, device=DEVICE) if sampling.counts else None for _ in range(2)]
    for _ in range(3):
        uniforms = torch.rand(4, generator=draw, dtype=torch.float64).to(DEVICE)
        want = decoding_torch.pick(logits, sampling, uniforms, counts[0], banned)
        got = picking_triton.pick(logits, sampling, uniforms, counts[1], banned)
        assert got.tolist() == want.tolist()
        if sampling.counts:
            torch.testing.assert_close(counts[1], counts[0])


@kernels
@pytest.mark.parametrize("u", [0.0, 1 - 2**-48])
def test_triton_draws_within_what_is_kept(u):
    from rwkv.ops import picking_triton

    logits = torch.full((1, 50), -5.0, device=DEVICE)
    logits[0, [3, 30]] = 1.0
    uniforms = torch.tensor([u], dtype=torch.float64, device=DEVICE)
    token = picking_triton.pick(logits, Sampling(top_k=2), uniforms, None, None)
    assert token.item() == (3 if u == 0 else 30)


ROWS = {
    "level": lambda draw: torch.randn(4, 20000, generator=draw),
    "equal": lambda draw: torch.zeros(4, 20000),
    "two values": lambda draw: torch.randint(2, (4, 20000), generator=draw) * 0.5,
    "steep": lambda draw: 20 * torch.randn(4, 20000, generator=draw) ** 3,
    "far": lambda draw: (
        torch.randn(4, 20000, generator=draw) * torch.tensor([[1e9], [1e6], [99.0], [1.0]])
    ),
    "one below": lambda draw: torch.randn(4, 20000, generator=draw).index_fill(
        1, torch.tensor([7]), -1e30
    ),
    "banned": lambda draw: torch.randn(4, 20000, generator=draw).index_fill(
        1, torch.arange(15, 20000), -torch.inf
    ),
}


@kernels
@versions
def test_triton_writes_the_same_whether_states_are_late(tmp_path, version, monkeypatch):
    """Rows come and go after any number of steps; 4 of them write the states."""
    model = small_model(tmp_path, version)
    texts, states = [], []
    for rows in (100, 1):
        monkeypatch.setattr("rwkv.decoder.LATE_ROWS", rows)
        decoder = Decoder(model, Picker(model, DRAWN, 3, None, 3), 3)
        decoder._capturable = False
        assert bool(decoder._late) == (rows == 1)
        decoder.put([0, 1, 2], [5, 6, 7], *_read(model, prompts(3)))
        found = decoder.run(2).rows()
        decoder.put([1], [8], *_read(model, prompts(4)[3:]))
        found += decoder.run(3).rows()
        decoder.keep([2, 1])
        found += decoder.run(3).rows()
        texts.append(found)
        states.append(named(decoder.hidden, decoder.state))
    assert texts[0] == texts[1]
    for name in states[0]:
        assert_close(name, states[1][name], states[0][name], 1e-5)


@kernels
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(
    "sampling", [Sampling(top_p=0.3), Sampling(top_k=30), Sampling(top_k=9000, top_p=0.7)], ids=str
)
def test_triton_finds_the_threshold_of_any_row(kind, sampling):
    """More tokens than are gathered, and values that are hard to tell apart."""
    from rwkv.ops import picking_triton

    draw = torch.Generator().manual_seed(1)
    logits = ROWS[kind](draw).to(DEVICE)
    uniforms = torch.rand(4, generator=draw, dtype=torch.float64).to(DEVICE)
    want = decoding_torch.pick(logits, sampling, uniforms, None, None)
    got = picking_triton.pick(logits, sampling, uniforms, None, None)
    assert got.tolist() == want.tolist()


@kernels
def test_triton_tells_the_smallest_values_apart():
    from rwkv.ops import picking_triton

    logits = 1e-30 * torch.randn(3, 20000, device=DEVICE)
    uniforms = torch.rand(3, dtype=torch.float64, device=DEVICE)
    want = decoding_torch.pick(logits, Sampling(top_k=30), uniforms, None, None)
    got = picking_triton.pick(logits, Sampling(top_k=30), uniforms, None, None)
    assert got.tolist() == want.tolist()


@kernels
def test_triton_makes_the_same_uniform_numbers():
    from rwkv.ops import picking_triton

    rows = torch.randint(2**40, (300,), device=DEVICE)
    steps = torch.arange(300, device=DEVICE)
    for seed in (0, 1, -1, 123456789, 2**62 + 5, 2**63):
        want = decoding_torch.uniform_numbers(seed, rows, steps)
        assert torch.equal(picking_triton.uniform_numbers(seed, rows, steps), want)


@versions
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    "pace", [Pace(1, 0, 3), Pace(4, 0, 2), Pace(3, 1, 4), Pace(8, 2, 1)], ids=str
)
def test_how_closely_the_host_follows_changes_no_text(tmp_path, version, sampling, pace):
    """Rows end at different times, prompts take their place, and the batch shrinks at the end."""
    model = small_model(tmp_path, version, dtype=torch.float64, backend="torch")
    options = {"max_tokens": 20, "stop": list(range(30)), "sampling": sampling, "seed": 7}
    want = generate(model, prompts(13)[:1], **options)
    alone = generate(model, prompts(13), batch_size=13, **options)
    found = generate(model, prompts(13), batch_size=4, pace=pace, **options)
    assert found == alone and found[:1] == want
    assert len({len(answer.tokens) for answer in found}) > 1


def test_rows_keep_their_draws_when_others_leave(tmp_path):
    model = small_model(tmp_path, 7, backend="torch")
    rows = []
    for kept in ([0, 1, 2], [2]):
        decoder = Decoder(model, Picker(model, DRAWN, 3, None, 3), 3)
        decoder.put([0, 1, 2], [5, 6, 7], *_read(model, prompts(3)))
        decoder.run(2)
        decoder.keep(kept)
        rows.append(decoder.run(5).rows()[-1])
    assert rows[0] == rows[1]


def _read(model, texts):
    from rwkv.reading import read_to_the_end

    return read_to_the_end(model, texts)


def adapted(model: RWKV, storage: str) -> RWKV:
    """A LoRA that does something on each linear of the blocks, over stored weights."""
    from peft.registry import make_adapter
    from peft.stores import make_store
    from rwkv.linear import Linear

    torch.manual_seed(0)
    linears = [(name, m) for name, m in model.blocks.named_modules() if isinstance(m, Linear)]
    for name, layer in linears:
        if storage != "none":
            layer.store_as(make_store(storage, layer.weight))
        parent, _, child = name.rpartition(".")
        made = make_adapter("lora", layer, rank=4, scale=1.0)
        torch.nn.init.normal_(made.lora_B, std=0.1)
        setattr(model.blocks.get_submodule(parent), child, made)
    return model.requires_grad_(False).eval()


@versions
@pytest.mark.parametrize("storage", ["none", "int8", "fp6"])
def test_adapters_and_stores_are_read_as_in_the_model(tmp_path, version, storage):
    sizes = {"C": 4 * N, "heads": 4, "dim_ffn": 8 * N}
    model = adapted(small_model(tmp_path, version, backend="torch", **sizes), storage)
    tokens = torch.randint(300, (2, 5), device=DEVICE)
    assert_close("hidden", token_by_token(model, tokens)["hidden"], model(tokens)[0], 1e-5)


@pytest.mark.gpu
@versions
def test_a_graph_of_many_rows_writes_what_steps_do(tmp_path, version):
    """So many that states are late, in graphs of two sizes."""
    model = small_model(tmp_path, version, dtype=torch.bfloat16)
    texts = []
    for captured in (False, True):
        decoder = Decoder(model, Picker(model, DRAWN, 3, None, 70), 70)
        decoder._capturable &= captured
        assert decoder._late
        decoder.put(range(70), range(70), *_read(model, prompts(70)))
        found = decoder.run(7).rows()
        assert (decoder.graph is not None) == captured
        decoder.keep(range(1, 68))
        texts.append(found + decoder.run(9).rows())
    assert texts[0] == texts[1]


def run(
    model: RWKV, *, captured: bool, sampling=DRAWN, steps=30
) -> tuple[list[list[int]], Decoder]:
    """What 6 rows write, in a graph or without."""
    banned = banned_tokens(model, None, [1, 2])
    decoder = Decoder(model, Picker(model, sampling, 3, banned, 6), 6)
    decoder._capturable &= captured
    decoder.put(range(6), range(6), *_read(model, prompts(6)))
    return decoder.run(steps).rows(), decoder


@pytest.mark.gpu
@versions
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_writes_what_steps_do(tmp_path, version, sampling, dtype):
    model = small_model(tmp_path, version, dtype=dtype)
    want, _ = run(model, captured=False, sampling=sampling)
    got, decoder = run(model, captured=True, sampling=sampling)
    assert decoder.graph is not None and got == want


@pytest.mark.gpu
@versions
def test_on_a_gpu_the_text_is_that_of_a_cpu(tmp_path, version):
    """Greedy, in float32, 40 prompts through a batch of 16."""
    model = small_model(tmp_path, version)
    options = {"max_tokens": 40, "stop": [7], "batch_size": 16}
    got = generate(model, prompts(40), **options)
    assert got == generate(model.cpu(), prompts(40), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ["none", "nf4", "int8", "fp8", "fp6"])
def test_a_graph_of_adapters_over_stores(tmp_path, storage):
    sizes = {"C": 256, "heads": 4, "dim_ffn": 512}
    model = adapted(small_model(tmp_path, 7, dtype=torch.bfloat16, **sizes), storage)
    want, _ = run(model, captured=False)
    got, decoder = run(model, captured=True)
    assert decoder.graph is not None and got == want


@pytest.mark.gpu
def test_what_cannot_be_captured_is_written_without_a_graph(tmp_path):
    model = small_model(tmp_path, 7)
    want, _ = run(model, captured=False)
    stream = torch.cuda.current_stream()
    model.blocks[1].ffn.key.register_forward_hook(lambda module, x, y: y.sum().item() and None)
    with pytest.warns(UserWarning, match="goes on without a CUDA graph"):
        got, decoder = run(model, captured=True)
    assert decoder.graph is None and got == want
    assert torch.cuda.current_stream() == stream
    torch.randn(1, device="cuda")  # the generator is as it was


@pytest.mark.gpu
def test_after_a_failed_capture_another_succeeds(tmp_path):
    model = small_model(tmp_path, 7)
    want, _ = run(model, captured=False)
    hook = model.blocks[1].ffn.key.register_forward_hook(lambda m, x, y: y.sum().item() and None)
    with pytest.warns(UserWarning, match="goes on without a CUDA graph"):
        run(model, captured=True)
    hook.remove()
    got, decoder = run(model, captured=True)
    assert decoder.graph is not None and got == want
