"""The memory planner: by hand, against every allocation of a small model, and on a GPU."""

import gc
import importlib
import itertools
import json
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import bench_memory
import numpy as np
import pytest
import torch
from helpers import LivingBytes, wkv6_inputs, wkv7_inputs
from test_sft import small_model
from torch._subclasses.fake_tensor import FakeTensorMode

import rwkv.model
import train
from data.pair_pieces import Pair, make_batch
from losses import distill, logprobs
from losses.distill import Distillation, Divergence
from losses.dpo import DPO
from losses.orpo import ORPO
from losses.preference import Preference
from losses.sft import SFT
from peft import memory, pissa
from peft.adapter import adapters_off
from peft.apply import random_with_profile
from peft.flags import PeftFlags
from peft.layer_profile import LayerPlan
from peft.memory import GIB, Step, kept_by_block, predict
from peft.memory_fit import read_size, what_fits
from peft.plan import Layer, Plan, make_plan
from peft.quantized import quantize_tensors, quantized_metadata
from peft.stores import STORES, make_store
from rwkv.batch import TokenBatch
from rwkv.checkpoint import write_tensors
from rwkv.chunks import ChunkPlan
from rwkv.config import LowRanks, RWKVConfig
from rwkv.errors import InputError, RunError
from rwkv.keeper import keeping
from rwkv.linear import SLICE
from rwkv.model import RWKV
from rwkv.ops import chunk_layout, wkv6, wkv7
from rwkv.ops.kept import gradients_of_states
from rwkv.run.memory import compared, teacher_bytes
from rwkv.training.measure import Measured
from rwkv.training.strategy import grow_segments

C, V = 128, 64


def config_of(version: int = 7, layers: int = 2) -> RWKVConfig:
    return RWKVConfig(
        version=version, n_layer=layers, n_embd=C, dim_ffn=4 * C, vocab_size=V, head_size=64,
        ranks=LowRanks(8, 8, 8, 8, 8),
    )  # fmt: skip


def flags_of(tmp_path, mode: str = "lora", *, limited: bool = False, **keys) -> PeftFlags:
    rule = {"match": "blocks.*", "mode": mode, **keys}
    if mode != "full":
        rule["rank"] = 8
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"rules": [rule]}))
    return PeftFlags(layer_profile=str(path), limited_lora=limited)


def plan_of(tmp_path, config: RWKVConfig | None = None, mode: str = "lora", **keys) -> Plan:
    with torch.device("meta"):
        return make_plan(RWKV(config or config_of()), flags_of(tmp_path, mode, **keys))


def test_the_counts_of_losses_are_known():
    assert memory.MAX_LOGITS == logprobs.MAX_LOGITS


def test_weights_and_optimizer_by_hand(tmp_path):
    """One LoRA of rank 8 over [128, 128] beside frozen rest: 2048 numbers."""
    config = config_of(layers=1)
    path = tmp_path / "p.json"
    rules = [
        {"match": "*", "mode": "freeze"},
        {"match": "blocks.0.att.key", "mode": "lora", "rank": 8, "quant": "int8"},
    ]
    path.write_text(json.dumps({"rules": rules}))
    with torch.device("meta"):
        model = RWKV(config)
        plan = make_plan(model, PeftFlags(layer_profile=str(path), limited_lora=True))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    found = predict(config, plan, Step(1, 16))
    assert found.rest["adapters"] == 2 * 2048
    assert found.rest["weights, int8"] == C * C + 4 * C
    assert found.rest["weights, bfloat16"] == 2 * (numbers - C * C)
    assert found.rest["optimizer"] == (4 + 8) * 2048
    step = found.moments["optimizer step"]
    assert (step["gradients"], step["gradients in float32"]) == (2 * 2048, 0)
    step = predict(config, plan, Step(1, 16, optim="lion")).moments["optimizer step"]
    assert (step["gradients"], step["gradients in float32"]) == (2 * 2048, 4 * 2048)
    spread = predict(config, plan, Step(1, 16, strategy="deepspeed_stage_2", world=4))
    assert spread.rest["optimizer"] == 3 * 2048
    buckets = predict(config, plan, Step(1, 16, strategy="ddp", world=2))
    for moment in ("head", "backward pass"):
        assert buckets.moments[moment]["gradients"] == 2 * 2048
    assert "gradients" not in found.moments["head"]
    offloaded = predict(config, plan, Step(1, 16, strategy="deepspeed_stage_2_offload"))
    assert offloaded.host == {"optimizer": 12 * 2048} and "optimizer" not in offloaded.rest


TOKENS = 512
OWN = {  # bytes that wkv keeps for each of so many tokens of one text
    version: memory.WKV_BYTES[version, "cuda"].in_texts(1, TOKENS).kept for version in (6, 7)
}


class Operator(torch.autograd.Function):
    """Keeps for the backward pass what wkv on a GPU keeps; RWKV-7's reads two tensors more."""

    @staticmethod
    def forward(ctx, state, v, *others):
        y, final, own = Operator.results(state, v, OWN[2 + len(others)])
        ctx.save_for_backward(state, v, *others, own)
        return y, final

    @staticmethod
    @keeping
    def results(state, v, size):
        own = torch.empty(int(size * v.numel()), dtype=torch.uint8)
        return torch.zeros_like(v), torch.zeros_like(state), own


@pytest.fixture
def operator(monkeypatch):
    """The name of a backend that runs `Operator`."""
    module = types.ModuleType("operator_of_test_memory")
    module.why_not = lambda sample, packed: None
    module.run = lambda **tensors: Operator.apply(
        tensors["state"],
        tensors["v"],
        *(t for n, t in tensors.items() if n not in ("state", "v", "cu_seqlens") and t is not None),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for op in (wkv6, wkv7):
        monkeypatch.setitem(op.BACKENDS, "traced", module.__name__)
    return "traced"


def kept(
    config: RWKVConfig, flags: PeftFlags, backend: str, tokens: int, grad_cp: bool | str
) -> int:
    """Bytes alive after the forward pass over a packed text."""
    model, _ = random_with_profile(config, flags, dtype=torch.bfloat16, backend=backend)
    model.grad_cp = grad_cp
    text = torch.randint(V, (1, tokens))
    with LivingBytes(model) as living:
        hidden = model(text, None, torch.tensor([0, tokens]), final_states=0)[0]
        assert hidden.requires_grad
        return living.now


@pytest.mark.parametrize(
    ("mode", "limited"),
    [("lora", False), ("lora", True), ("bone", False), ("miss", False), ("dora", False),
     ("full", False)],
    ids=["lora", "limited", "bone", "miss", "dora", "full"],
)  # fmt: skip
@pytest.mark.parametrize("version", [6, 7])
def test_a_block_keeps_what_is_counted(tmp_path, operator, version, mode, limited):
    flags, tokens = flags_of(tmp_path, mode, limited=limited), TOKENS
    three, two = (
        kept(config_of(version, layers), flags, operator, tokens, False) for layers in (3, 2)
    )
    config = config_of(version, 3)
    with torch.device("meta"):
        plan = make_plan(RWKV(config), flags)
    state = 4 * config.n_head * config.head_size**2  # of the operator's input
    counted = kept_by_block(config, plan, Step(1, tokens, fused=False)) + state
    assert counted == pytest.approx(three - two, rel=0.03)


@pytest.mark.parametrize("grad_cp", [True, "selective"])
@pytest.mark.parametrize("mode", ["lora", "bone", "full"])
@pytest.mark.parametrize("version", [6, 7])
def test_a_recomputed_block_keeps_what_is_counted(tmp_path, operator, version, mode, grad_cp):
    """But for the operator's state, before and after the block."""
    flags, tokens = flags_of(tmp_path, mode), TOKENS
    configs = [config_of(version, layers) for layers in (3, 2)]
    three, two = (kept(config, flags, operator, tokens, grad_cp) for config in configs)
    counted = [
        memory.between_blocks(
            config, plan_of(tmp_path, config, mode), Step(1, tokens, grad_cp=grad_cp)
        )
        for config in configs
    ]
    state = 4 * 2 * 64**2
    assert counted[0] - counted[1] == pytest.approx(three - two, abs=2 * state)


@pytest.mark.parametrize("grad_cp", [True, "selective"])
@pytest.mark.parametrize("mode", ["lora", "bone", "full"])
def test_the_last_of_recomputed_blocks_keeps_what_is_counted(
    tmp_path, operator, mode, grad_cp, monkeypatch
):
    flags, config = flags_of(tmp_path, mode), config_of()
    step = Step(1, TOKENS, grad_cp=grad_cp, fused=False)
    monkeypatch.setattr(rwkv.model, "keeps_end", lambda *_: False)
    without = kept(config, flags, operator, TOKENS, grad_cp)
    assert not memory.kept_by_last_block(config, plan_of(tmp_path, config, mode), step)
    for module in (rwkv.model, memory):
        monkeypatch.setattr(module, "keeps_end", lambda *_: True)
    more = kept(config, flags, operator, TOKENS, grad_cp) - without
    counted = memory.kept_by_last_block(config, plan_of(tmp_path, config, mode), step)
    assert counted == pytest.approx(more, rel=0.03)


@pytest.mark.parametrize(
    ("mode", "quant"),
    [
        *(("lora", kind) for kind in STORES),
        *itertools.product(("dora", "dora_column"), ("none", "int8", "nf4", "fp6")),
        ("pissa", "none"),
        ("pissa", "int8"),
    ],
    ids=lambda value: value,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_loading_takes_what_is_counted(tmp_path, mode, quant, dtype):
    """By every allocation while a model is made whose largest layer, of 4 slices, comes last."""
    config = RWKVConfig(
        version=7, n_layer=1, n_embd=C, dim_ffn=C, vocab_size=4 * SLICE // C,
        head_size=64, ranks=LowRanks(8, 8, 8, 8),
    )  # fmt: skip
    rules = [
        {"match": "*", "mode": "freeze", "quant": "none"},
        {"match": "head", "mode": mode, "rank": 8, "quant": quant},
    ]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"rules": rules}))
    flags = PeftFlags(layer_profile=str(path))
    if quant != "none":
        make_store(quant, torch.ones(64, 64))  # tables that are made once
    with LivingBytes(torch.nn.Module()) as living:
        random_with_profile(config, flags, dtype=dtype)
        found = living.most
    with torch.device("meta"):
        plan = make_plan(RWKV(config), flags)
    step = Step(1, 64, dtype=dtype, on_gpu=False, fused=False)
    counted = sum(predict(config, plan, step).at(memory.LOADING).values())
    assert counted == pytest.approx(found, rel=0.05)


@pytest.mark.parametrize("sides", [(512, 512), (256, 1024), (1024, 256)], ids=str)
@pytest.mark.parametrize("rank", [32, 200], ids=["randomized", "exact"])
def test_pissas_directions_take_what_is_counted_at_most(tmp_path, sides, rank):
    """What torch's allocations show; LAPACK has some of its own, a third of the rest or less."""
    weight = torch.nn.Linear(sides[1], sides[0], bias=False, dtype=torch.bfloat16)
    with LivingBytes(weight) as living:
        pissa._principal(weight.weight.detach(), rank, 4)
        found = living.most
    layer, mine = Layer("linear", {"x.weight": sides}), LayerPlan("pissa", rank=rank, quant="none")
    plan = Plan({"x": layer}, {"x": mine}, PeftFlags())
    assert found <= memory.of_svd(plan, Step(1, 1), "x") < 3 * found


def test_kernels_that_keep_nothing_make_it_again_by_hand(tmp_path):
    """RWKV-7 in Triton: 0 bytes in place of 7.4, but 13 in the block at work; RWKV-6: 4.3 for 2.

    A text's last chunk of 64 or 32 tokens counts whole.
    """
    for version, of_cuda, of_triton in ((7, (7.4, 7.4), (0, 13)), (6, (2, 2), (4.3, 6.3))):
        config = config_of(version)
        plan, cuda = plan_of(tmp_path, config), Step(1, 640, texts=5, grad_cp=False)
        triton, other = (replace(cuda, kernel=kernel) for kernel in ("triton", "fla"))
        for place, count in enumerate((kept_by_block, memory.blocks_at_work)):
            sizes = [count(config, plan, step) for step in (cuda, triton, other)]
            more = 960 * C * of_cuda[place], 800 * C * of_triton[place]  # 640 and 5 chunks
            assert sizes[1] - sizes[0] == pytest.approx(more[1] - more[0], abs=2)
            assert sizes[2] == sizes[0]


def test_selective_by_hand(tmp_path):
    """RWKV-7: r, k, v, wkv's output, 7.4 bytes of its own; the key's result; x A^T, rank 8.

    And as many of each of the time mix's four products of low rank.

    ZeRO-3 recomputes it all.
    """
    config, plan = config_of(), plan_of(tmp_path)
    step = Step(1, 100, grad_cp="selective")
    att, ffn = (memory.kept_for_second_run(config, plan, step, part) for part in ("att", "ffn"))
    assert att == int(100 * 2 * (4 * C + 4 * 8 + 4 * 8) + 164 * 7.4 * C)
    assert ffn == 100 * 2 * (4 * C + 2 * 8)
    vectors = 2 * 2 * 100 * C * 2
    assert memory.between_blocks(config, plan, step) == vectors + 2 * (att + ffn)
    scattered = replace(step, strategy="deepspeed_stage_3")
    assert memory.between_blocks(config, plan, scattered) == vectors / 2


def test_what_selective_keeps_has_a_limit(tmp_path):
    config, plan, step = config_of(), plan_of(tmp_path), Step(1, 4096, grad_cp="selective")
    at_least, at_most = (
        memory.between_blocks(config, plan, replace(step, grad_cp=grad_cp))
        for grad_cp in (True, "selective")
    )
    limited = memory.between_blocks(config, plan, replace(step, kept_limit=1 << 20))
    assert limited == at_least + (1 << 20) < at_most
    for limit in (at_most, 0):
        assert memory.between_blocks(config, plan, replace(step, kept_limit=limit)) == at_most


@pytest.mark.parametrize(
    "more",
    [{"rows": 2}, {"ctx_len": 8192}, {"grad_cp": False}, {"accumulate": 2}],
    ids=str,
)
def test_more_work_needs_more_memory(tmp_path, more):
    config, plan, step = config_of(), plan_of(tmp_path), Step(1, 4096)
    assert predict(config, plan, replace(step, **more)).peak > predict(config, plan, step).peak


@pytest.mark.parametrize(
    "less",
    [
        {"chunk": 256},
        {"chunk": 256, "host_states": True},
        {"host_blocks": True},
        {"optim": "AdamW8bit"},
    ],
    ids=str,
)
def test_less_at_once_needs_less_memory(tmp_path, less):
    config, plan, step = config_of(), plan_of(tmp_path), Step(4, 4096)
    assert predict(config, plan, replace(step, **less)).peak < predict(config, plan, step).peak


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_plan_for_a_gpu_elsewhere_takes_its_kernel(tmp_path, capsys):
    """Not the one that this machine's CPU would have."""
    shown = {}
    for kernel in ("auto", "cuda", "torch"):
        more = {"accelerator": "gpu", "micro_bsz": 512, "kernel": kernel}
        assert train.main(dry(tmp_path, dry_run=1, n_embd=256, **more)) == 0
        shown[kernel] = re.search(r"blocks at work.*|backward pass \S+", capsys.readouterr().err)[0]
    assert shown["auto"] == shown["cuda"] != shown["torch"]


def test_what_leaves_the_device_is_in_host_memory(tmp_path):
    """2 blocks of 2 halves, each 3,000 x 128 x 2 bytes: in pinned memory a MiB."""
    config, plan = config_of(), plan_of(tmp_path)
    found = predict(config, plan, Step(1, 3000, host_blocks=True))
    assert found.host == {"between blocks": 4 << 20}
    low = 2 * 2 * 3000 * 8 * 2  # of 2 layers in 2 blocks, rank 8
    assert found.moments["head"]["between blocks"] == 3 * 3000 * C * 2 + low
    assert "gradients" in found.moments["backward pass"]


def test_a_head_that_trains_sums_its_gradient_up(tmp_path):
    """64 x 128 numbers: float32 sums and a piece's bfloat16; frozen it has none."""
    config = config_of()
    full, lora = (
        predict(config, plan_of(tmp_path, mode=mode, match="*"), Step(1, 64)).moments["head"]
        for mode in ("full", "lora")
    )
    assert full["the head's gradient"] == 64 * C * 6 and "the head's gradient" not in lora


def test_a_teacher_beside_costs_what_its_formulas_keep(monkeypatch):
    """Bytes a logit at the peak, by following every allocation; kernels would keep no more."""

    class PlainHead(torch.autograd.Function):
        """hidden W^T, which keeps nothing, as a frozen Linear."""

        @staticmethod
        def forward(ctx, hidden):
            return hidden @ weight.T

        @staticmethod
        def backward(ctx, grad):
            return grad @ weight

    n, size = 64, 1024
    weight = torch.randn(size, 8, dtype=torch.bfloat16)
    model, teacher = (
        types.SimpleNamespace(
            logits=PlainHead.apply,
            parameters=lambda: iter(()),
            to=lambda device: None,
            config=config_of(),
        )
        for _ in range(2)
    )
    hidden = torch.randn(1, n, 8, dtype=torch.bfloat16, requires_grad=True)
    batch = TokenBatch(
        *torch.randint(size, (2, 1, n)), torch.ones(1, n, dtype=torch.bool), None, torch.tensor(n)
    )
    monkeypatch.setattr(
        distill, "walk", lambda both, piece, sums, plan: sums((hidden, hidden), piece)
    )
    for kind, counted in memory.BESIDE_BYTES.items():
        with LivingBytes(torch.nn.Module()) as bytes_now:
            loss, _ = Distillation(Divergence(kind), teacher=teacher)(model, batch)
        assert counted <= bytes_now.most / (n * size) < counted + 1, kind
        assert loss.requires_grad


def test_the_head_takes_larger_pieces_where_it_writes_over_them():
    """2 bytes for each of 2^28 logits; with a teacher beside 30 for each of 2^26."""
    config, step = bench_memory.config_of_shape("1.5B", layers=1), Step(8, 4096)
    assert memory.head(config, step) == 2 * 2**28
    assert memory.head(config, replace(step, beside="forward")) == 30 * 2**26
    assert memory.head(config, replace(step, fused=False)) == 20 * 2**26


@pytest.mark.parametrize("op", ["wkv7", "wkv6"])
@pytest.mark.parametrize("N", [64, 128])
def test_tritons_kernels_keep_what_is_counted_or_nothing(op, N):
    """In bfloat16, beside the inputs; traced, so that nothing runs."""
    pytest.importorskip("triton")
    run = importlib.import_module(f"rwkv.ops.{op}_triton").run
    make = {"wkv7": wkv7_inputs, "wkv6": wkv6_inputs}[op]
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x.nbytes
        return x

    with FakeTensorMode():
        inputs = make(B=1, T=256, H=2, N=N, dtype=torch.bfloat16)
        leaves = {n: x.requires_grad_() for n, x in inputs.items()}
        leaves["state"] = torch.empty(1, 2, N, N, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            run(**leaves, cu_seqlens=None)
    assert kept
    for x in leaves.values():
        kept.pop(x.untyped_storage()._cdata, None)
    counted = memory.WKV_BYTES[int(op[-1]), "triton"].kept * 256 * 2 * N
    states = counted if N == 64 else 0  # and their powers of two, and decays
    assert sum(kept.values()) == pytest.approx(states, rel=0.07)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["wkv7", "wkv6"])
def test_plain_torch_keeps_what_is_counted(op, dtype):
    """Beside the inputs: states at the starts of chunks and, of RWKV-7, u and inverses."""
    run = importlib.import_module(f"rwkv.ops.{op}_torch").run
    inputs = {"wkv7": wkv7_inputs, "wkv6": wkv6_inputs}[op](B=1, T=256, H=2, N=64, dtype=dtype)
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    leaves["state"] = torch.zeros(2, 2, 64, 64, requires_grad=True)
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y, _ = run(**leaves, cu_seqlens=torch.tensor([0, 32, 256]))
    assert y.requires_grad
    for x in leaves.values():
        kept.pop(x.untyped_storage()._cdata, None)
    counted = memory.WKV_BYTES[int(op[-1]), "torch"].kept * 256 * 2 * 64
    assert sum(x.nbytes for x in kept.values()) == counted


@pytest.mark.parametrize("op", ["wkv7", "wkv6"])
def test_going_back_plain_torch_holds_one_state_where_nobody_reads_any(op):
    """Beside it that of S_0, where that is wanted; 64 texts of 4 tokens."""
    run = importlib.import_module(f"rwkv.ops.{op}_torch").run
    inputs = {"wkv7": wkv7_inputs, "wkv6": wkv6_inputs}[op](B=64, T=4, H=2, N=64)
    leaves = {n: x.requires_grad_() for n, x in inputs.items()}
    state, most = torch.zeros(64, 2, 64, 64), {}
    for wanted in (False, False, True):  # the first one makes what the others find
        y, final = run(**leaves, state=state.clone().requires_grad_(wanted), cu_seqlens=None)
        del final
        room = chunk_layout.room_like(torch.empty(0))
        with LivingBytes(torch.nn.Module()) as living:
            living.sizes |= {x.untyped_storage()._cdata: 0 for x in room._tensors}
            torch.autograd.grad(y.sum(), leaves.values())
        most[wanted] = living.most
    assert most[False] < most[True] - 0.8 * state.nbytes < 4 * state.nbytes


def test_going_back_kernels_hold_one_state_where_nobody_reads_any():
    """Of a gradient that comes the operator writes no byte."""
    r, borders = torch.empty(1, 8, 2, 16, dtype=torch.bfloat16), torch.tensor([0, 2, 7, 8])
    last, first = gradients_of_states(None, r, borders)
    assert last is first and last.shape == (3, 2, 16, 16) and not last.any()
    assert last.dtype == torch.float32
    given, first = gradients_of_states(last, r, borders)
    assert given is last and first.data_ptr() != last.data_ptr()


def most_living(model: RWKV, objective, batch) -> int:
    """Bytes at the peak of a forward and backward pass, over a model that has run once.

    But for what wkv works in, whatever the model.
    """
    for _ in range(2):
        room = chunk_layout.room_like(torch.empty(0))
        with LivingBytes(model) as living:
            living.sizes |= {x.untyped_storage()._cdata: 0 for x in room._tensors}
            objective(model, batch)[0].backward()
        model.zero_grad()
    return living.most


def texts_of(lengths: list[int]) -> TokenBatch:
    """Packed texts of which every token is scored."""
    tokens = sum(lengths)
    text, borders = torch.randint(V, (1, tokens + 1)), torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.ones(1, tokens, dtype=torch.bool)
    return TokenBatch(text[:, :-1], text[:, 1:], mask, borders, torch.tensor(tokens))


@pytest.mark.parametrize("grad_cp", [True, False])
@pytest.mark.parametrize("version", [6, 7])
def test_a_cpus_step_takes_what_is_predicted(tmp_path, version, grad_cp):
    """Every allocation of a pass in float32."""
    config, flags, tokens = config_of(version, 4), flags_of(tmp_path), 4096
    model, plan = random_with_profile(config, flags)
    model.grad_cp = grad_cp
    most = most_living(model, SFT(), texts_of([2000, 2096]))
    step = Step(1, tokens, torch.float32, texts=2, grad_cp=grad_cp, on_gpu=False, fused=False)
    found = predict(config, plan, replace(step, kernel="torch"))
    assert sum(found.moments["backward pass"].values()) == pytest.approx(most, rel=0.1)


@pytest.mark.parametrize("chunk", [0, 512])
@pytest.mark.parametrize(
    ("version", "grad_cp"),
    [(7, True), (7, False), (7, "selective"), (6, False)],
    ids=["7 recomputed", "7", "7 selective", "6"],
)
def test_many_texts_take_what_is_predicted(tmp_path, version, grad_cp, chunk):
    """62 texts with a state of 32 KiB in each layer; in 4 chunks 17 at once, of 5 layers each."""
    config, flags = config_of(version, 5 if chunk else 3), flags_of(tmp_path)
    model, plan = random_with_profile(config, flags)
    model.grad_cp = grad_cp
    lengths = [33] * 61 + [35]
    most = most_living(model, SFT(chunks=ChunkPlan(chunk) if chunk else None), texts_of(lengths))
    step = Step(1, 2048, torch.float32, chunk=chunk, texts=62, grad_cp=grad_cp, on_gpu=False)
    found = predict(config, plan, replace(step, fused=False, kernel="torch"))
    assert sum(found.moments["backward pass"].values()) == pytest.approx(most, rel=0.1)


PAIRS = {
    "dpo": Preference(DPO(), reference=adapters_off),
    "orpo": Preference(ORPO(), nll_weight=1.0),
}


@pytest.mark.parametrize("chunk", [0, 512])
@pytest.mark.parametrize(
    ("loss", "lengths", "pairs"),
    [
        ("dpo", (65, 66, 34), 16),
        ("orpo", (65, 66, 34), 16),
        ("dpo", (257, 34, 36), 6),
        ("orpo", (33, 34, 34), 24),
    ],
    ids=["dpo", "orpo", "long prompts", "many pairs"],
)
def test_pairs_take_what_is_predicted(tmp_path, loss, lengths, pairs, chunk):
    """Prompts, and answers from copies of their states; the reference's pass takes less."""
    config, flags = config_of(7, 4), flags_of(tmp_path, limited=True)
    model, plan = random_with_profile(config, flags)
    model.grad_cp = True
    draw = np.random.default_rng(0)
    records = [
        Pair(*(draw.integers(0, V, n).astype(np.uint16) for n in lengths)) for _ in range(pairs)
    ]
    objective = replace(PAIRS[loss], chunks=ChunkPlan(chunk) if chunk else None)
    most = most_living(model, objective, make_batch(records))
    read = sum(lengths) - 2
    step = Step(
        1, pairs * read, torch.float32, texts=pairs, answers=2, prompts=lengths[0] / read,
        chunk=chunk, on_gpu=False, fused=False, kernel="torch",
    )  # fmt: skip
    moments = predict(config, plan, step).moments
    walked = max(sum(moments[name].values()) for name in ("backward pass", "head", "answers begin"))
    assert walked == pytest.approx(most, rel=0.1)


def test_reading_pairs_by_hand(tmp_path):
    """2 rows of 100 tokens, 2 prompts in each: 40 tokens of 4 prompts, 160 of 8 answers.

    A state: 2 heads of 64 x 64 in float32, 2 shifts of 128 in bfloat16, 2 layers.
    """
    config, plan, state = config_of(), plan_of(tmp_path), 2 * (4 * 2 * 64**2 + 2 * 2 * C)
    step = Step(2, 100, texts=2, answers=2, prompts=0.2, packed=False)
    prompts, answers = step.reads
    assert (prompts.tokens, prompts.texts_at_once) == (40, 4)
    assert (answers.tokens, answers.texts_at_once) == (160, 8)
    begin = predict(config, plan, step).moments["answers begin"]
    assert (begin["states of prompts"], begin["states of texts"]) == (4 * state, 8 * state)
    assert begin["between blocks of prompts"] == (
        memory.between_blocks(config, plan, prompts) + 2 * 40 * C * 2
    )
    chunks = replace(step, chunk=50)
    assert memory.states_handed_on(config, chunks) == (0 + 3 + 8) * state
    moved = predict(config, plan, replace(chunks, host_states=True))
    assert moved.host == {"states between chunks": 11 * state}


@pytest.mark.parametrize(
    ("objective", "file", "answers", "share"),
    [("dpo", "pairs.jsonl", 2, 72 / (72 + 68 - 8)), ("orpo", "pairs.jsonl", 2, 72 / 132),
     ("kto", "labelled.jsonl", 1, None)],
    ids=["dpo", "orpo", "kto"],
)  # fmt: skip
def test_a_row_of_pairs_has_twice_the_room(tmp_path, monkeypatch, objective, file, answers, share):
    found: list[Step] = []
    monkeypatch.setattr(
        "rwkv.run.memory.describe_memory", lambda *given: found.append(given[-1]) or []
    )
    profile = "layerprofile/lora-adapters-only.json"
    more = {"sft": 0, objective: 1, "ctx_len": 512, "micro_bsz": 2, "layer_profile": profile}
    data = {"train_data_file": f"example/Preference/{file}", "accelerator": "cpu"}
    assert train.main(dry(tmp_path, dry_run=1, **more, **data)) == 0
    (step,) = found
    assert (step.rows, step.ctx_len, step.answers) == (2, 1024, answers)
    assert share is None or step.prompts == pytest.approx(share)


def test_states_of_texts_by_hand(tmp_path):
    """A state: 2 heads of 64 x 64 in float32, 2 shifts of 128 in bfloat16, 2 layers.

    8 texts of 512 tokens at once share zeros, and a block's gradient lies over them; a chunk of
    1,024 tokens cuts 3, which in each layer follow the one that goes on.
    """
    config, state = config_of(), 4 * 2 * 64**2 + 2 * 2 * C
    whole = Step(1, 4096, texts=8)
    counts = memory.first_states, memory.gradients_of_states
    assert [count(config, whole) for count in counts] == [8 * state, (8 * state, 0)]
    chunks = replace(whole, chunk=1024)
    assert chunks.texts_at_once == 3
    assert [count(config, chunks) for count in counts] == [6 * state, (6 * state, 6 * state)]
    tuned = replace(whole, tuned_state=True)
    assert memory.first_states(config, tuned) == 8 * state
    assert memory.first_states(config, replace(tuned, grad_cp=False)) == 16 * state
    given = replace(whole, given_states=True)
    assert [count(config, given) for count in counts] == [16 * state, (16 * state, 16 * state)]
    rows = Step(8, 512, packed=False, chunk=128)
    assert rows.texts_at_once == 8 and memory.first_states(config, rows) == 8 * state


def test_many_texts_need_more_memory(tmp_path):
    """By their states alone 2 MiB more: 63 texts, shared and as a block's gradient."""
    config, plan = config_of(), plan_of(tmp_path)
    one, many = (predict(config, plan, Step(1, 4096, texts=n)) for n in (1, 64))
    parts = one.moments["backward pass"], many.moments["backward pass"]
    for name in ("states of texts", "a block's gradients of states"):
        assert parts[1][name] == 64 * parts[0][name] > 2**21


@pytest.mark.parametrize("quant", ["int8", "fp8"])
def test_a_product_of_few_bits_by_hand(tmp_path, quant):
    """Dense, 2 bytes a weight; or transposed codes and rounded rows, of the head a piece."""
    plan = plan_of(tmp_path, quant=quant)
    weight, rows = 4 * C * C, 100_000
    few, many = Step(1, 16), Step(1, rows)
    assert memory.unpacked_weight(plan, few, of_head=False) == 2 * weight
    assert memory.unpacked_weight(plan, many, of_head=False) == weight + rows * 4 * C
    path = tmp_path / "head.json"
    rules = [{"match": "*", "mode": "freeze"}, {"match": "head", "mode": "freeze", "quant": quant}]
    path.write_text(json.dumps({"rules": rules}))
    with torch.device("meta"):
        config = replace(config_of(), vocab_size=2**16)
        plan = make_plan(RWKV(config), PeftFlags(layer_profile=str(path)))
    piece = 4 * memory.MAX_LOGITS // 2**16
    assert memory.unpacked_weight(plan, many, of_head=True) == 2**16 * (C + piece)


def test_chunks_cut_the_packed_row(tmp_path):
    """4 rows of 1,024 tokens: 1 row of 4,096 in 16 chunks, or each row in 4."""
    config, plan = config_of(), plan_of(tmp_path)
    packed, padded = (Step(4, 1024, chunk=256, packed=packed) for packed in (True, False))
    assert (packed.tokens, packed.borders) == (256, 15)
    assert (padded.tokens, padded.borders) == (1024, 12)
    state = 4 * 2 * 64**2 + 2 * 2 * C  # two heads in float32, two shifts in bfloat16
    assert memory.states_between_chunks(config, packed) == 15 * 2 * state
    assert predict(config, plan, padded).peak > predict(config, plan, packed).peak


def test_blocks_below_the_first_that_trains_keep_nothing(tmp_path):
    config = config_of(layers=4)
    path = tmp_path / "p.json"
    rules = [{"match": "*", "mode": "freeze"}, {"match": "blocks.3.*", "mode": "lora", "rank": 8}]
    path.write_text(json.dumps({"rules": rules}))
    with torch.device("meta"):
        plan = make_plan(RWKV(config), PeftFlags(layer_profile=str(path)))
    step = Step(1, 64)
    assert memory.learning_blocks(config, plan, step) == 1
    assert memory.learning_blocks(config, plan, replace(step, tuned_state=True)) == 4
    assert memory.learning_blocks(config, plan_of(tmp_path, config), step) == 4


def test_under_a_prefix_all_blocks_keep_their_part(tmp_path):
    config, plan = config_of(), plan_of(tmp_path)
    frozen = {name: replace(mine, mode="freeze") for name, mine in plan.plans.items()}
    plan, step = replace(plan, plans=frozen), Step(1, 64, given_states=True)
    assert not memory.between_blocks(config, plan, step)
    found = memory.between_blocks(config, plan, replace(step, prefix=True))
    assert found >= 2 * config.n_layer * 64 * C * 2


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A plan of the 1.5B shape: LoRA over bfloat16, everything kept."""
    config = bench_memory.config_of_shape("1.5B")
    plan = plan_of(tmp_path_factory.mktemp("large"), config)
    return config, plan, Step(8, 4096, grad_cp=False)


@pytest.mark.parametrize(
    ("step", "memory_gib", "words"),
    [
        ({}, 400, "fits 400.0 GiB: needs"),
        ({"rows": 8}, 30, "does not fit 30.0 GiB; fits with --micro_bsz 2: "),
        ({"rows": 1}, 15, "does not fit 15.0 GiB; fits with --grad_cp selective: "),
        ({"rows": 1}, 8, "does not fit 8.0 GiB; fits with --grad_cp 1: "),
        ({"rows": 1, "grad_cp": "selective"}, 8, "does not fit 8.0 GiB; fits with --grad_cp 1: "),
        ({"rows": 1, "grad_cp": True, "ctx_len": 8192}, 6, "fits with --grad_cp_offload 1: "),
        ({"rows": 1, "grad_cp": True, "ctx_len": 65536}, 12, "fits with --infctx 1 --chunk_ctx "),
        ({"rows": 1, "grad_cp": True, "ctx_len": 256}, 4.2, "fits with --quant 1 --quant_mode "),
        (
            {"rows": 1, "grad_cp": "selective", "kept_limit": 2 * GIB}, 7,
            "fits with --grad_cp 1 --grad_cp_memory 0: ",
        ),
        (
            {"rows": 1, "grad_cp": True, "ctx_len": 65536, "host_blocks": True}, 10,
            "fits with --grad_cp_offload 0 --infctx 1 --chunk_ctx ",
        ),
        ({"rows": 8}, 4, "--micro_bsz 1 --grad_cp 1 --infctx 1 --chunk_ctx "),
        ({"rows": 8}, 1, "by any of these changes: --micro_bsz 1 --grad_cp 1 "),
    ],
    ids=[
        "as it is",
        "rows",
        "selective recomputation",
        "recomputation",
        "more recomputation",
        "host memory",
        "chunks",
        "storage",
        "less of it kept",
        "chunks in place of host memory",
        "together",
        "never",
    ],
)  # fmt: skip
def test_the_first_change_that_fits_is_named(large, step, memory_gib, words):
    config, plan, full = large
    told = what_fits(config, plan, replace(full, **step), int(memory_gib * GIB))
    assert words in told, told


def test_deepspeed_is_not_advised_of_8_bit_moments(large):
    config, plan, full = large
    for strategy, named in (("auto", True), ("deepspeed_stage_2", False)):
        told = what_fits(config, plan, replace(full, strategy=strategy), GIB)
        assert ("--optim AdamW8bit" in told) == named


def test_what_is_named_does_fit(large):
    """The number told is that of the changed run, and below the limit."""
    config, plan, full = large
    told = what_fits(config, plan, full, 30 * GIB)
    needed = predict(config, plan, replace(full, rows=2)).needed / GIB
    assert told.endswith(f"--micro_bsz 2: {needed:.1f} GiB") and needed <= 30


def fitting(tmp_path, rules: list[dict], gib: float, **flags) -> str:
    """What would let LoRA of the 7.2B shape's first four blocks fit."""
    config = bench_memory.config_of_shape("7.2B", layers=4)
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"rules": rules}))
    with torch.device("meta"):
        plan = make_plan(RWKV(config), PeftFlags(layer_profile=str(path), **flags))
    return what_fits(config, plan, Step(1, 256), int(gib * GIB))


def test_no_flag_is_named_that_changes_nothing(tmp_path):
    """The profile's own storage and its own small layers outweigh the flags."""
    stored = [{"match": "blocks.*", "mode": "lora", "rank": 8, "quant": "fp8"}]
    assert "--quant" not in fitting(tmp_path, stored, 1.5)
    assert "--quant 1 --quant_mode" in fitting(
        tmp_path, [{"match": "blocks.*", "mode": "lora", "rank": 8}], 3
    )
    small = [{"match": "blocks.*.ln*", "mode": "full"}]
    assert "--limited_lora" not in fitting(tmp_path, small, 0.5)


def on_a_cpu(tmp_path, gib: float, **step) -> str:
    """What would let LoRA of the 1.5B shape fit in a CPU's memory."""
    config = bench_memory.config_of_shape("1.5B")
    cpu = Step(1, 256, torch.float32, on_gpu=False, fused=False, **step)
    return what_fits(config, plan_of(tmp_path, config), cpu, int(gib * GIB))


def test_a_cpu_is_not_advised_of_a_gpus_ways(tmp_path):
    """Its memory is the host's, and DeepSpeed does not run there."""
    told = on_a_cpu(tmp_path, 0.5)
    assert "--grad_cp_offload" not in told and "deepspeed" not in told
    assert told.endswith("; take a smaller model, or a GPU")


@pytest.mark.parametrize(
    "more",
    [{"host_blocks": True}, {"chunk": 64, "host_states": True}, {"strategy": "x_offload"}],
    ids=str,
)
def test_what_a_cpu_keeps_in_host_memory_is_in_its_total(tmp_path, more):
    config, plan = config_of(), plan_of(tmp_path)
    step = Step(1, 4096, torch.float32, on_gpu=False, fused=False, chunk=more.get("chunk", 0))
    moved = predict(config, plan, replace(step, **more))
    assert not moved.host and moved.peak == predict(config, plan, step).peak


def test_half_the_bits_are_proposed_where_a_run_is_in_float32(tmp_path):
    assert "fits with --precision bf16: " in on_a_cpu(tmp_path, 4)
    config = bench_memory.config_of_shape("1.5B")
    assert "--precision" not in what_fits(config, plan_of(tmp_path, config), Step(1, 256), GIB)


def test_the_ends_are_proposed_where_the_rest_is_stored(tmp_path):
    """Beside --quant 1, asked for or named; not where it was asked for, or a profile says."""
    rules = [{"match": "blocks.*", "mode": "lora", "rank": 8}]
    stored = {"quant": True, "quant_mode": "nf4"}
    assert "; fits with --quant_head 1: " in fitting(tmp_path, rules, 2.4, **stored)
    assert "--quant 1 --quant_mode nf4 --quant_head 1: " in fitting(tmp_path, rules, 2.4)
    assert "--quant_head" not in fitting(tmp_path, rules, 1, **stored, quant_head=True)
    ends = [{"match": "*", "mode": "freeze", "quant": "none"}]
    assert "--quant_head" not in fitting(tmp_path, [*ends, *rules], 1, **stored)


def test_a_rank_is_told_beside_flags(tmp_path):
    """It is no flag, so that "and" comes before it."""
    rules = [{"match": "blocks.*", "mode": "lora", "rank": 1024}]
    told = fitting(tmp_path, rules, 0.1)
    assert "--limited_lora 1 and a rank of 8 would need" in told, told


def test_a_rank_that_a_layer_cannot_have_is_not_proposed(tmp_path):
    """Half of LoRA's 96 divides no side of Bone's weights."""
    rules = [
        {"match": "blocks.*", "mode": "bone", "rank": 64},
        {"match": "head", "mode": "lora", "rank": 96},
    ]
    assert "by any of these changes" in fitting(tmp_path, rules, 0.2)


def test_two_changes_are_tried_before_more():
    """Changes added up in their order would be chunks, another optimizer and adapters alone."""
    config = bench_memory.config_of_shape("7.2B")
    with torch.device("meta"):
        plan = make_plan(RWKV(config), PeftFlags(layer_profile="layerprofile/lora-nf4.json"))
    told = what_fits(config, plan, Step(1, 4096), 8 * GIB)
    assert "fits with --grad_cp_offload 1 --limited_lora 1: " in told, told


def test_a_teacher_lies_beside(tmp_path):
    config, plan = config_of(), plan_of(tmp_path)
    alone, taught = (predict(config, plan, Step(1, 16, teacher=size)) for size in (0, 5000))
    assert taught.peak - alone.peak == 5000 == taught.rest["the teacher's weights"]


def test_a_teachers_weights_are_counted_from_its_file(tmp_path):
    model = small_model()
    write_tensors(tmp_path / "teacher.pth", model.state_dict())
    numbers = sum(p.numel() for p in model.parameters())
    assert teacher_bytes(str(tmp_path / "teacher.pth"), torch.bfloat16) == 2 * numbers
    tensors, described = quantize_tensors(model.state_dict(), {"head"}, "int8")
    metadata = quantized_metadata("base", described)
    write_tensors(tmp_path / "small.pth", tensors, metadata)
    head = model.head.weight.numel()
    rows = model.head.out_features
    assert teacher_bytes(str(tmp_path / "small.pth"), torch.bfloat16) == (
        2 * (numbers - head) + head + 4 * rows
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * GIB), ("1.5 GiB", 1.5 * GIB), ("800MB", 800 * 2**20), ("12G", 12 * GIB)],
)
def test_sizes_are_read(text, size):
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["much", "24 parsecs", "-1GB", ""])
def test_what_is_no_size_is_said(text):
    with pytest.raises(InputError, match=f"--memory {text}: is no size; write 24GB, say"):
        read_size(text)


SMALL = {
    "sft": 1, "my_testing": "x070", "n_layer": 2, "n_embd": 64, "vocab_size": 65536, "ctx_len": 64,
    "train_data_file": "example/SFT/samples.jsonl",
}  # fmt: skip


def dry(tmp_path, **more) -> list[str]:
    values = SMALL | {"cache_dir": tmp_path} | more
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_the_readmes_plan_is_what_is_printed(capsys, tmp_path):
    text = Path("README.md").read_text()
    told = re.search(r"^    (--memory 16GB: .*)$", text, re.M)[1]
    command = re.search(r"python train.py (--sft 1 [^`]*?--memory 16GB --dry_run 1)", text)[1]
    words = command.replace("\\\n", " ").split()
    assert train.main([*words, "--cache_dir", str(tmp_path)]) == 0
    assert told in capsys.readouterr().err


def test_a_dry_run_prints_the_memory(tmp_path, capsys):
    assert train.main(dry(tmp_path, dry_run=1, memory="24GB", accelerator="cpu")) == 0
    told = capsys.readouterr().err
    assert "predicted memory of a device, GiB:" in told and "the largest part is" in told
    assert "--memory 24GB: fits 24.0 GiB: needs" in told


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_cudas_own_memory_is_counted_on_a_gpu_alone(tmp_path, capsys, accelerator):
    """Workspaces, and what torch does not count; 0.6 GiB would be most of what this run needs."""
    assert train.main(dry(tmp_path, dry_run=1, memory="500MB", accelerator=accelerator)) == 0
    told, on_gpu = capsys.readouterr().err, accelerator == "gpu"
    assert ("workspaces of cuBLAS" in told) == ("with what CUDA takes" in told) == on_gpu
    assert ("GiB beside Python and its libraries; the largest" in told) != on_gpu
    assert ("fits 0.5 GiB: needs" in told) != on_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_verifying_needs_a_gpu(tmp_path):
    with pytest.raises(RunError, match="--dry_run verify: measures a GPU, and torch finds none"):
        train.main(dry(tmp_path, dry_run="verify"))


def test_small_models_are_told_in_mib(tmp_path):
    """A LoRA of rank 8 over 128 x 128 weights: no part would be a hundredth of a GiB."""
    found = predict(config_of(), plan_of(tmp_path), Step(1, 64, on_gpu=False, fused=False))
    first, *parts, last, malloc = memory.table(found)
    assert malloc == memory.MALLOC
    assert first == "predicted memory of a device, MiB:"
    size = found.rest["weights, bfloat16"] / 2**20
    assert f"  weights, bfloat16  {size:.2f}" in [re.sub(" {3,}", "  ", line) for line in parts]
    assert f"a device needs {found.needed / 2**20:.1f} MiB beside Python" in last
    told = what_fits(config_of(), plan_of(tmp_path), Step(1, 64, on_gpu=False), 50 * 2**20)
    assert told.startswith("fits 50.0 MiB: needs ") and told.endswith(" MiB")


def test_prediction_and_measurement_side_by_side(tmp_path):
    config = config_of()
    found = predict(config, plan_of(tmp_path), Step(1, 64))
    lines = list(compared(found, Measured(*[GIB] * 8, seconds=1.0)))
    assert [line.split("  ")[0] for line in lines[1:-1]] == [
        "weights and adapters", "at most while loading", "optimizer", "gradients",
        "forward and backward", "optimizer step", "peak", "reserved",
    ]  # fmt: skip


@pytest.fixture
def alone(tmp_path_factory):
    """One such test at a time where several processes share a GPU; what it took is given back."""
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path_factory.getbasetemp().parent / "alone").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("number", [1, 4, 6, 8, 11, 12, 22, 23, 24, 27, 29, 31, 32, 34])
def test_predictions_are_within_a_tenth(number):
    setting = bench_memory.SETTINGS[number]
    config = bench_memory.config_of_shape(setting.shape, version=setting.version)
    _, prediction = bench_memory.planned(setting, config)
    found = bench_memory.measured(setting, config)
    assert prediction.peak == pytest.approx(found.peak, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "more",
    [{}, {"prefix_tuning": 1, "layer_profile": "layerprofile/prefix.json"}],
    ids=["adapters", "prefix"],
)
def test_two_steps_are_measured_by_a_dry_run(tmp_path, capsys, more):
    assert train.main(dry(tmp_path, dry_run="verify", **more)) == 0
    assert "measured" in capsys.readouterr().err


def test_what_the_user_says_of_the_allocator_stays(monkeypatch):
    said = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append, raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    grow_segments()
    assert said == []
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    grow_segments()
    assert said == ["expandable_segments:True"]


@pytest.mark.gpu
def test_segments_grow():
    """In a process of its own: the setting is for good."""
    code = (
        "import torch\n"
        "from rwkv.training.strategy import grow_segments\n"
        "grow_segments()\n"
        "x = torch.zeros(2**22, device='cuda')\n"
        "assert all(s['is_expandable'] for s in torch.cuda.memory_snapshot())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
