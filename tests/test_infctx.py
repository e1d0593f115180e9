"""Infinite context: pieces of any length give the numbers and gradients of the whole text."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_sft import V, packed, padded, small_model, texts
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rwkv.chunks
import train
from losses.distill import Distillation, Divergence
from losses.sft import SFT
from peft.apply import apply_profile
from peft.flags import QUANT_MODES, PeftFlags
from peft.tuned_state import add_tuned_state
from rwkv.batch import TeacherBatch, TokenBatch
from rwkv.checkpoint import write_tensors
from rwkv.chunks import ChunkPlan, read, walk
from rwkv.config import RWKVConfig, default_ranks
from rwkv.init import initialize
from rwkv.keeper import Keeper
from rwkv.model import RWKV
from rwkv.state import LayerState
from rwkv.training.step_log import read_log

ROOT = Path(__file__).parent.parent
TEXTS = texts([11, 5, 18, 7])
COUNT = sum(int(mask.sum()) for _, mask in TEXTS)
BATCHES = {"padded": padded(TEXTS, COUNT), "packed": packed(TEXTS, COUNT)}
LENGTHS = {"divides": 6, "leaves a rest": 7, "one token": 1, "nearly all": 40}


def with_teacher(batch: TokenBatch, k: int = 4) -> TeacherBatch:
    """The batch with a random teacher's scores."""
    draw = torch.Generator().manual_seed(7)
    logits = torch.randn(*batch.inputs.shape, V, generator=draw, dtype=torch.float64)
    values, ids = torch.log_softmax(logits, dim=-1).topk(k)
    lse = torch.logsumexp(torch.log_softmax(logits, dim=-1) / 2, dim=-1)
    return TeacherBatch(
        **batch._asdict(),
        ids=ids.to(torch.int16),
        values=values.half().view(torch.int16),
        lse=lse.float().view(torch.int32),
    )


def with_state(version: int):
    model = small_model(version)
    add_tuned_state(model)
    model.double()
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_state.normal_(generator=torch.Generator().manual_seed(5))
    return model


def gradients(model, batch, objective):
    model.zero_grad(set_to_none=True)
    loss, _ = objective(model, batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_equal_gradients(got, want, ratio=1e-8):
    """In float64, and so to far less than the 1e-5 that float32 has to hold."""
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert gradient.abs().max() > 0, f"{name} has no gradient to compare"
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error <= ratio, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("how", BATCHES)
def test_chunks_give_every_gradient_of_the_whole(how, length, version):
    """Every parameter trains, the initial states included."""
    model, batch = with_state(version), BATCHES[how]
    want, expected = gradients(model, batch, SFT(smoothing=0.01))
    got, found = gradients(model, batch, SFT(smoothing=0.01, chunks=ChunkPlan(length)))
    assert got == pytest.approx(want, rel=1e-9)
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("version", [6, 7])
def test_in_float32_within_1e_5(version):
    """By relative RMS for each parameter, as long texts accumulate rounding."""
    model, batch = with_state(version).float(), packed(texts([61, 35]), 96)
    _, expected = gradients(model, batch, SFT())
    _, found = gradients(model, batch, SFT(chunks=ChunkPlan(13)))
    for name, want in expected.items():
        error = (found[name] - want).norm() / want.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("mode", ["lora", "bone", "miss", "dora"])
def test_adapters_get_the_whole_gradient(mode, version, tmp_path):
    profile = tmp_path / "profile.json"
    rule = {"match": "blocks.*", "mode": mode, "rank": 4}
    profile.write_text(json.dumps({"rules": [rule]}))
    model = small_model(version)
    torch.manual_seed(0)
    apply_profile(model, PeftFlags(layer_profile=str(profile)))
    add_tuned_state(model)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    _, expected = gradients(model, BATCHES["packed"], SFT())
    _, found = gradients(model, BATCHES["packed"], SFT(chunks=ChunkPlan(9)))
    assert any(mode.startswith(("lora", "dora")) or name.endswith(mode) for name in expected)
    # DoRA takes its norms in float32
    assert_equal_gradients(found, expected, 1e-6 if mode == "dora" else 1e-8)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("kind", QUANT_MODES)
def test_every_storage_gives_the_whole_gradient(kind, version, tmp_path):
    if kind.startswith(("nf4", "fp4")):
        pytest.importorskip("bitsandbytes")
    profile = tmp_path / "profile.json"
    rule = {"match": "blocks.*", "mode": "lora", "rank": 4, "quant": kind}
    profile.write_text(json.dumps({"rules": [rule]}))
    model = small_model(version)
    torch.manual_seed(0)
    apply_profile(model, PeftFlags(layer_profile=str(profile)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    _, expected = gradients(model, BATCHES["packed"], SFT())
    _, found = gradients(model, BATCHES["packed"], SFT(chunks=ChunkPlan(9, offload=True)))
    assert_equal_gradients(found, expected, 1e-5)


@pytest.mark.parametrize("how", BATCHES)
def test_distillation_in_chunks(how):
    batch = with_teacher(BATCHES[how])
    model, divergence = with_state(7), Divergence("forward", 2.0)
    want, expected = gradients(model, batch, Distillation(divergence))
    chunked = Distillation(divergence, chunks=ChunkPlan(7, offload=True))
    got, found = gradients(model, batch, chunked)
    assert got == pytest.approx(want, rel=1e-9)
    assert_equal_gradients(found, expected)


def test_a_teacher_beside_the_student_in_chunks():
    teacher = small_model(6, seed=4).double().requires_grad_(False)
    model = with_state(7)
    whole = Distillation(Divergence("jsd", 1.0, 0.3), teacher=teacher)
    parts = Distillation(Divergence("jsd", 1.0, 0.3), teacher=teacher, chunks=ChunkPlan(8))
    want, expected = gradients(model, BATCHES["packed"], whole)
    got, found = gradients(model, BATCHES["packed"], parts)
    assert got == pytest.approx(want, rel=1e-9)
    assert_equal_gradients(found, expected)


def test_truncated_equals_each_chunk_with_a_state_from_outside():
    """What --chunk_grad truncated means: the state enters a chunk as a constant."""
    model, batch = with_state(7), BATCHES["padded"]
    _, found = gradients(model, batch, SFT(chunks=ChunkPlan(7, truncated=True)))
    model.zero_grad(set_to_none=True)
    state = None
    for start in range(0, batch.inputs.shape[1], 7):
        piece = batch.columns(start, start + 7)
        hidden, after = model(piece.inputs, state)
        logits = model.logits(hidden[piece.mask])
        loss = F.cross_entropy(logits, piece.targets[piece.mask], reduction="sum")
        (loss / COUNT + 0.5e-4 * logits.amax(dim=-1).square().sum() / COUNT).backward()
        state = [layer.detach() for layer in after]
    assert_equal_gradients(found, {n: p.grad for n, p in model.named_parameters()})


@pytest.mark.parametrize("grad_cp", [True, "selective"])
@pytest.mark.parametrize("version", [6, 7])
def test_nested_recomputation_changes_nothing(version, grad_cp):
    model = with_state(version)
    _, expected = gradients(model, BATCHES["packed"], SFT(chunks=ChunkPlan(7)))
    model.grad_cp = grad_cp
    _, found = gradients(model, BATCHES["packed"], SFT(chunks=ChunkPlan(7)))
    assert_equal_gradients(found, expected)


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS.keys())
def test_evaluation_in_chunks(length):
    model = with_state(7)
    want = SFT().measure(model, BATCHES["packed"])
    got = SFT(chunks=ChunkPlan(length, offload=True)).measure(model, BATCHES["packed"])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("how", BATCHES)
@pytest.mark.parametrize("grad_cp", [False, True, "selective"])
def test_states_in_host_memory_change_nothing(how, grad_cp):
    model = with_state(7)
    model.grad_cp = grad_cp
    want, expected = gradients(model, BATCHES[how], SFT(chunks=ChunkPlan(7)))
    got, found = gradients(model, BATCHES[how], SFT(chunks=ChunkPlan(7, offload=True)))
    assert got == want
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def most_states(T: int, *, grad_cp: bool) -> int:
    """How many wkv states that a time mix starts from live at once, those in host memory aside."""
    model, states, most = small_model(7), [], 0
    model.grad_cp = grad_cp

    def note(module, arguments):
        nonlocal most
        states.append(StorageWeakRef(arguments[4].untyped_storage()))
        most = max(most, sum(not one.expired() for one in states))

    for block in model.blocks:
        block.att.register_forward_pre_hook(note)
    SFT(chunks=ChunkPlan(16, offload=True))(model, padded(texts([T]), T))[0].backward()
    passes = 3 if grad_cp else 2  # the first, the chunk again and, if asked for, each half again
    assert len(states) == passes * 2 * T / 16
    return most


@pytest.mark.parametrize("grad_cp", [False, True, "selective"])
def test_states_in_host_memory_leave_the_device(grad_cp):
    assert most_states(256, grad_cp=grad_cp) == most_states(64, grad_cp=grad_cp)


@pytest.mark.gpu
@pytest.mark.parametrize("grad_cp", [False, True, "selective"])
def test_memory_of_a_gpu_does_not_grow(grad_cp):
    """48 chunks more, and less than the state of one of them more; the gradients are the same."""
    config = RWKVConfig(
        version=7,
        n_layer=2,
        n_embd=256,
        dim_ffn=1024,
        vocab_size=V,
        head_size=64,
        ranks=default_ranks(7, 256),
    )
    model = RWKV(config)
    initialize(model, 0)
    model.to("cuda", torch.bfloat16).grad_cp = grad_cp
    peaks, found = [], []
    for T, offload in ((1024, True), (1024, True), (4096, True), (4096, False)):
        batch = TokenBatch(*(None if x is None else x.cuda() for x in padded(texts([T]), T)))
        torch.cuda.reset_peak_memory_stats()
        _, given = gradients(model, batch, SFT(chunks=ChunkPlan(64, offload=offload)))
        peaks.append(torch.cuda.max_memory_allocated() - 3 * 17 * T)
        found.append({name: gradient.cpu() for name, gradient in given.items()})
        del given
    state = config.n_layer * config.n_head * config.head_size**2 * 4
    assert peaks[2] - peaks[1] < state + 2**20
    assert peaks[3] - peaks[2] > 30 * state
    assert all(torch.equal(found[2][name], gradient) for name, gradient in found[3].items())


def most_kept(T: int, monkeypatch) -> int:
    """How many results that second runs will take live at once in a training step over T tokens."""
    model, kept, most = small_model(7), [], 0
    model.grad_cp = "selective"
    real = Keeper.keep

    def note(keeper, results):
        nonlocal most
        kept.extend(StorageWeakRef(x.untyped_storage()) for x in results)
        most = max(most, sum(not one.expired() for one in kept))
        return real(keeper, results)

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "keep", note)
        SFT(chunks=ChunkPlan(16, offload=True))(model, padded(texts([T]), T))[0].backward()
    assert all(one.expired() for one in kept)
    return most


def test_what_second_runs_take_lives_as_long_as_a_chunk(monkeypatch):
    assert most_kept(256, monkeypatch) == most_kept(64, monkeypatch)


def most_alive(T: int) -> int:
    """How many of the blocks' outputs live at once in a training step over T tokens."""
    model, outputs, most = small_model(7), [], 0

    def note(module, arguments, output):
        nonlocal most
        outputs.append(StorageWeakRef(output[0].untyped_storage()))
        most = max(most, sum(not one.expired() for one in outputs))

    for block in model.blocks:
        block.register_forward_hook(note)
    SFT(chunks=ChunkPlan(16))(model, padded(texts([T]), T))[0].backward()
    assert len(outputs) == 2 * 2 * T / 16, "each block runs twice over each chunk"
    return most


def test_activations_of_one_chunk_at_a_time():
    assert most_alive(256) == most_alive(32)


class Work(TorchDispatchMode):
    """Counts the operations run under it, and the numbers that they write."""

    operations = numbers = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        out = operation(*arguments, **(options or {}))
        self.operations += 1
        if not operation.is_view:
            self.numbers += sum(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        return out


@pytest.mark.parametrize("grad_cp", [False, True, "selective"])
@pytest.mark.parametrize("version", [6, 7])
def test_work_is_linear(version, grad_cp):
    """Each chunk more is the same work more, wherever in the text it stands."""
    model, found = small_model(version), []
    model.grad_cp = grad_cp
    for chunks in (2, 8, 12, 16):
        T = 16 * chunks
        batch = padded(texts([T]), T)
        with Work() as work:
            SFT(chunks=ChunkPlan(16))(model, batch._replace(mask=batch.mask | True))[0].backward()
        found.append((work.operations, work.numbers))
    (_, a, b, c) = found  # the first step makes what later ones find
    assert (c[0] - b[0], c[1] - b[1]) == (b[0] - a[0], b[1] - a[1])


def kept_states(run) -> list[torch.Tensor]:
    """What is kept of states for the backward pass of `run`, which makes a number."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        assert run().requires_grad
    return [x for x in kept if x.is_floating_point() and x.ndim in (2, 4)]


@pytest.mark.parametrize("truncated", [False, True])
def test_pieces_keep_no_more_than_the_states_that_are_handed_on(truncated):
    """12 texts of 4 tokens: of three in a piece of 10 the last one's state goes on.

    For each of 4 borders two layers' states of two heads of 16 x 16 and twice 32 channels.
    """
    model, batch = small_model(7), packed(texts([4] * 12), 48)
    plan = ChunkPlan(10, truncated=truncated)
    kept = kept_states(lambda: walk(model, batch, lambda hidden, piece: hidden.sum(), plan))
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}
    assert sum(storages.values()) == sum(x.nbytes for x in kept)
    assert sum(storages.values()) == 4 * 2 * (2 * 16 * 16 + 2 * 32) * 4


def test_reading_in_pieces_keeps_no_more_than_the_states_that_are_handed_on(monkeypatch):
    """Nor do the states of the texts that end in a piece keep that of the one that goes on."""
    model, batch, real = small_model(7), packed(texts([4, 20, 4]), 28), rwkv.chunks._joined
    joined: list[torch.Tensor] = []
    monkeypatch.setattr(rwkv.chunks, "_joined", lambda x: joined.extend(tree_leaves(x)) or real(x))
    kept = kept_states(
        lambda: read(model, batch.inputs, batch.cu_seqlens, None, ChunkPlan(10))[0].sum()
    )
    assert sum(x.shape == (1, 2, 16, 16) for x in kept) == 2 * (2 + 1)  # and one of a new text
    for x in (*kept, *joined):
        assert x.untyped_storage().nbytes() == x.nbytes


@pytest.mark.parametrize("read_on", [False, True], ids=["walk", "read"])
def test_the_gradient_of_a_state_that_is_handed_on_keeps_no_other(read_on, monkeypatch):
    """It waits for the piece before; the gradient of a joined tensor's part is a view."""
    model, batch, kept = small_model(7), packed(texts([4, 9, 3, 4]), 20), []
    real = LayerState.last

    def note(layer: LayerState, count: int) -> LayerState:
        rows = real(layer, count)
        for field in rows:
            field.register_hook(lambda grad: kept.append(grad))
        return rows

    monkeypatch.setattr(LayerState, "last", note)
    if read_on:
        read(model, batch.inputs, batch.cu_seqlens, None, ChunkPlan(10))[0].sum().backward()
    else:
        walk(model, batch, lambda hidden, piece: hidden.sum(), ChunkPlan(10)).backward()
    assert len(kept) == 2 * 3
    for grad in kept:
        assert len(grad) == 1 and grad.untyped_storage().nbytes() == grad.nbytes


def living_states(model, found: list[int] | None = None) -> Callable[[], int]:
    """How many wkv states that a time mix ended with are alive, asked at any time.

    found: gets their number whenever there is one more.
    """
    states: list[StorageWeakRef] = []

    def note(module, arguments, output):
        states.append(StorageWeakRef(output[3].untyped_storage()))
        if found is not None:
            found.append(living())

    for block in model.blocks:
        block.att.register_forward_hook(note)

    def living() -> int:
        assert states
        return sum(not one.expired() for one in states)

    return living


@pytest.mark.parametrize(
    ("how", "plan", "alive"),
    [
        ("padded", None, [0]),
        ("packed", None, [0]),
        ("packed", ChunkPlan(16), [0, 0, 0]),
        ("padded", ChunkPlan(16), [2, 2]),
    ],
    ids=["rows", "packed", "packed in chunks", "rows in chunks"],
)
@pytest.mark.parametrize("grad_cp", [False, True, "selective"])
def test_states_that_nobody_reads_are_free_before_the_head_runs(grad_cp, how, plan, alive):
    """Packed chunks hand on copies of one text's; of rows those before the last chunk go on."""
    model, found = small_model(7), []
    model.grad_cp = grad_cp
    living = living_states(model)

    def sums(hidden, piece):
        found.append(living())
        return hidden.sum()

    walk(model, BATCHES[how], sums, plan)
    assert found == alive


@pytest.mark.parametrize("plan", [None, ChunkPlan(16)], ids=["whole", "chunks"])
@pytest.mark.parametrize("grad_cp", [False, True, "selective"])
def test_states_of_one_layer_at_a_time(grad_cp, plan):
    model, found = small_model(7), []
    model.grad_cp = grad_cp
    living_states(model, found)
    walk(model, BATCHES["packed"], lambda hidden, piece: hidden.sum(), plan)
    assert found == [1] * 2 * (1 if plan is None else 3)


def test_walk_without_gradient_keeps_no_graph():
    model, batch = with_state(7), BATCHES["packed"]
    with torch.no_grad():
        total = walk(model, batch, lambda hidden, piece: hidden.sum(), ChunkPlan(5))
    assert not total.requires_grad


@pytest.mark.parametrize("version, grad", [(6, "exact"), (7, "exact"), (7, "truncated")])
def test_from_the_command_line(tmp_path, version, grad):
    """With accumulation, clipping, evaluation and a tuned state; the losses are the whole rows'."""
    write_tensors(tmp_path / "base.pth", byte_model(version).state_dict())
    rows = "".join(json.dumps({"text": f"{n} " * (20 + n % 7)}) + "\n" for n in range(24))
    (tmp_path / "train.jsonl").write_text(rows)
    (tmp_path / "profile.json").write_text(
        json.dumps({"rules": [{"match": "blocks.*", "mode": "lora", "rank": 4}]})
    )
    words = (
        f"--load_model {tmp_path}/base.pth --train_data_file {tmp_path}/train.jsonl --sft 1 "
        f"--layer_profile {tmp_path}/profile.json --cache_dir {tmp_path}/cache --state 1 "
        "--accelerator cpu --ctx_len 200 --accumulate_grad_batches 2 --epoch_steps 6 "
        "--lr_init 1e-2 --lr_final 1e-2 --num_workers 0 --val_fraction 0.2 --kernel torch"
    ).split()
    losses = {}
    for name, more in {
        "whole": [],
        "chunks": ["--infctx", "1", "--chunk_ctx", "48", "--chunk_grad", grad],
    }.items():
        assert train.main([*words, *more, "--proj_dir", str(tmp_path / name)]) == 0
        log = read_log(tmp_path / name / "train_log.jsonl")
        losses[name] = [line[key] for line in log for key in ("loss", "val_loss") if key in line]
    assert len(losses["whole"]) == 5  # three steps, an evaluation before and one after
    exact = grad == "exact"
    assert losses["chunks"][:2] == pytest.approx(losses["whole"][:2], rel=1e-5)
    assert (losses["chunks"] == pytest.approx(losses["whole"], rel=1e-4)) == exact


def byte_model(version: int):
    """As small_model, with a vocabulary of bytes."""
    config = RWKVConfig(
        version=version,
        n_layer=2,
        n_embd=32,
        dim_ffn=64,
        vocab_size=256,
        head_size=16,
        ranks=default_ranks(version, 32),
    )
    model = RWKV(config, "torch")
    initialize(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter.add_(0.1 * noise)
    return model


def test_the_example_runs(tmp_path):
    """example/InfCtx at a small size: the data's answers are what stands after the mark."""
    make = [sys.executable, "example/InfCtx/make_data.py", "--output", str(tmp_path), "--rows", "8"]
    subprocess.run([*make, "--held_out", "4"], cwd=ROOT, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert all(row["prompt"][1] == row["completion"] for row in rows)
    words = (
        f"--sft 1 --n_layer 1 --n_embd 32 --head_size_a 32 --template plain --ctx_len 48 "
        f"--train_data_file {tmp_path}/train.jsonl --val_data_file {tmp_path}/val.jsonl "
        f"--packing 0 --micro_bsz 4 --infctx 1 --chunk_ctx 12 --kernel torch --accelerator cpu "
        f"--num_workers 0 --cache_dir {tmp_path}/cache --proj_dir {tmp_path}/out"
    ).split()
    assert train.main([*words, "--tokenizer", "chars:0123456789#?"]) == 0
    log = read_log(tmp_path / "out" / "train_log.jsonl")
    assert [line["step"] for line in log if "val_accuracy" in line] == [0, 2]
