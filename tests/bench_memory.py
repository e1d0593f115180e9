"""Memory of training on a GPU, predicted beside measured.

    python -m tests.bench_memory                      all settings, at most 4 minutes on an H100
    python -m tests.bench_memory --only 1,5,16        some of them
    python -m tests.bench_memory --predict            the predictions alone, anywhere
    python -m tests.bench_memory --counts             what a block keeps, in numbers a token and
                                                      channel: for the tables of peft/memory.py

Random models, full rows, two steps a setting.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from losses.sft import SFT
from peft.apply import random_with_profile
from peft.flags import PeftFlags
from peft.groups import parameter_groups
from peft.memory import GIB, Prediction, Step, kept_by_block, predict
from peft.plan import Plan, make_plan
from rwkv.batch import TokenBatch
from rwkv.chunks import ChunkPlan
from rwkv.config import RWKVConfig, default_ffn, default_ranks
from rwkv.model import RWKV
from rwkv.run.memory import compared, pairs
from rwkv.training.flags import OptimizerFlags
from rwkv.training.measure import Measured, measure
from rwkv.training.optimizer import make_optimizer
from rwkv.training.strategy import grow_segments

SHAPES = {  # name: blocks, channels
    "0.4B": (24, 1024),
    "1.5B": (24, 2048),
    "2.9B": (32, 2560),
    "7.2B": (32, 4096),
    "13.3B": (61, 4096),
}
VOCABULARY = 65536


class Setting(NamedTuple):
    """A model's shape, what trains over which storage, and what a step reads."""

    shape: str
    mode: str = "lora"
    quant: str = "none"
    rows: int = 1
    ctx_len: int = 4096
    chunk: int = 0
    grad_cp: bool | str = True
    accumulate: int = 1
    limited: bool = False
    optim: str = ""
    rank: int = 64
    offload: bool = False
    kernel: str = "cuda"
    version: int = 7
    ends: bool = False  # the head and the embedding are stored too
    texts: int = 1  # in a row

    def __str__(self) -> str:
        words = [self.shape, self.mode, self.quant, f"{self.rows} x {self.ctx_len}"]
        words += [f"of {self.texts} texts"] if self.texts > 1 else []
        words += [f"in {self.chunk}"] if self.chunk else []
        words += {True: [], False: ["kept"]}.get(self.grad_cp, [self.grad_cp])
        words += [f"{self.accumulate} batches"] if self.accumulate > 1 else []
        words += ["limited"] if self.limited else []
        words += ["offloaded"] if self.offload else []
        words += [self.kernel] if self.kernel != "cuda" else []
        words += ["RWKV-6"] if self.version == 6 else []
        words += ["all stored"] if self.ends else []
        return " ".join([*words, self.optim]).rstrip()


SETTINGS = (
    Setting("0.4B", "full", rows=4, ctx_len=1024),
    Setting("0.4B", rows=4),
    Setting("0.4B", "full", ctx_len=16384, chunk=2048),
    Setting("1.5B", ctx_len=1024),
    Setting("1.5B", quant="nf4", ctx_len=1024),
    Setting("1.5B", quant="int8", ctx_len=1024),
    Setting("1.5B", "bone", "fp8", rows=4),
    Setting("1.5B", quant="fp6", grad_cp=False),
    Setting("1.5B", "full"),
    Setting("2.9B", quant="nf4", ctx_len=1024),
    Setting("2.9B", quant="fp5", rows=2),
    Setting("2.9B", "bone", "nf4", ctx_len=8192),
    Setting("2.9B", quant="nf4_double", ctx_len=16384, chunk=1024),
    Setting("7.2B", quant="fp8"),
    Setting("7.2B", quant="fp4", accumulate=2),
    Setting("7.2B", quant="nf4", ctx_len=16384, chunk=2048, limited=True, optim="AdamW8bit"),
    Setting("13.3B", quant="nf4"),
    Setting("13.3B", "bone", "fp6_e2m3", ctx_len=1024),
    Setting("13.3B", quant="nf4", limited=True),
    Setting("13.3B", quant="nf4", limited=True, offload=True),
    Setting("2.9B", rows=4),
    Setting("2.9B", rows=4, offload=True),
    Setting("1.5B", grad_cp="selective"),
    Setting("1.5B", "bone", "nf4", rows=2, grad_cp="selective"),
    Setting("1.5B", "full", grad_cp="selective"),
    Setting("1.5B", rows=4, kernel="triton"),
    Setting("1.5B", rows=2, grad_cp="selective", kernel="triton"),
    Setting("1.5B", rows=4, version=6),
    Setting("1.5B", "full", version=6),
    Setting("2.9B", quant="nf4", ctx_len=1024, ends=True),
    Setting("1.5B", quant="int8", rows=2, ends=True),
    Setting("1.5B", texts=128),
    Setting("1.5B", texts=128, chunk=1024),
    Setting("1.5B", texts=128, grad_cp="selective"),
    Setting("1.5B", rows=8),
)


def config_of_shape(shape: str, *, layers: int = 0, version: int = 7) -> RWKVConfig:
    """The sizes of a published model, or of one with fewer blocks."""
    blocks, channels = SHAPES[shape]
    return RWKVConfig(
        version=version,
        n_layer=layers or blocks,
        n_embd=channels,
        dim_ffn=default_ffn(version, channels),
        vocab_size=VOCABULARY,
        ranks=default_ranks(version, channels),
    )


def peft_flags(setting: Setting) -> PeftFlags:
    """A profile with one rule for all blocks."""
    rule: dict[str, Any] = {"match": "blocks.*", "mode": setting.mode, "quant": setting.quant}
    if setting.mode == "full":
        del rule["quant"]
        rule["match"] = "*"
    else:
        rule["rank"] = setting.rank
    rules = [rule]
    if setting.ends:
        rules.append({"match": ["emb", "head"], "quant": setting.quant})
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump({"rules": rules}, file)
    return PeftFlags(layer_profile=file.name, limited_lora=setting.limited)


def step_of(setting: Setting) -> Step:
    return Step(
        setting.rows,
        setting.ctx_len,
        chunk=setting.chunk,
        texts=setting.texts,
        grad_cp=setting.grad_cp,
        host_blocks=setting.offload,
        accumulate=setting.accumulate,
        kernel=setting.kernel,
        optim=setting.optim,
    )


def planned(setting: Setting, config: RWKVConfig) -> tuple[Plan, Prediction]:
    """The plan of a setting and its predicted memory."""
    with torch.device("meta"):
        plan = make_plan(RWKV(config), peft_flags(setting))
    return plan, predict(config, plan, step_of(setting))


def full_batch(rows: int, ctx_len: int, count: int, *, texts: int = 1) -> TokenBatch:
    """Random texts of which every token is scored, packed into one row; so many in each row."""
    tokens = torch.randint(VOCABULARY, (1, rows * ctx_len + 1), device="cuda")
    borders = torch.linspace(0, rows * ctx_len, rows * texts + 1, device="cuda").long()
    mask = torch.ones(1, rows * ctx_len, dtype=torch.bool, device="cuda")
    total = torch.tensor(count, device="cuda")
    return TokenBatch(tokens[:, :-1], tokens[:, 1:], mask, borders, total)


def measured(setting: Setting, config: RWKVConfig, *, steps: int = 2) -> Measured:
    """A few steps of a setting on the GPU."""
    optimizer, plan = OptimizerFlags(optim=setting.optim), None

    def make() -> RWKV:
        nonlocal plan
        model, plan = random_with_profile(
            config,
            peft_flags(setting),
            device="cuda",
            dtype=torch.bfloat16,
            backend=setting.kernel,
        )
        model.grad_cp, model.grad_cp_offload = setting.grad_cp, setting.offload
        return model

    def optimize(model: Any) -> Any:
        groups = [
            {"params": list(group.params), "lr": group.lr_init, "weight_decay": group.weight_decay}
            for group in parameter_groups(model, plan, optimizer)
        ]
        return make_optimizer(groups, optimizer, strategy="auto", on_gpu=True)

    objective = SFT(chunks=ChunkPlan(setting.chunk) if setting.chunk else None)
    count = setting.rows * setting.ctx_len * setting.accumulate
    batches = [
        full_batch(setting.rows, setting.ctx_len, count, texts=setting.texts)
        for _ in range(setting.accumulate)
    ]
    return measure(make, optimize, objective, batches, steps=steps)


def compare(only: list[int], seconds: float, details: bool) -> int:
    """The table; returns how many settings are more than a tenth off."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, two steps each")
    print(f"{'':>2} {'setting':<46}{'predicted':>10}{'peak':>8}{'reserved':>9}{'ratio':>7}{'s':>6}")
    start, off = time.perf_counter(), 0
    for number in only:
        setting = SETTINGS[number]
        if time.perf_counter() - start > seconds:
            print(f"{seconds:.0f} s are over; left out from {number}")
            break
        config = config_of_shape(setting.shape, version=setting.version)
        _, prediction = planned(setting, config)
        try:
            found = measured(setting, config)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            print(f"{number:>2} {setting!s:<46}{str(error).splitlines()[0]}")
            continue
        ratio = prediction.peak / found.peak
        off += abs(ratio - 1) > 0.1
        print(
            f"{number:>2} {setting!s:<46}{prediction.peak / GIB:10.2f}{found.peak / GIB:8.2f}"
            f"{found.reserved / GIB:9.2f}{ratio:7.2f}{found.seconds:6.2f}",
            flush=True,
        )
        if details:
            print("\n".join("     " + line for line in compared(prediction, found)), flush=True)
        else:
            parts = [
                f"{name} {predicted / GIB:.2f}/{got / GIB:.2f}"
                for name, predicted, got in pairs(prediction, found)
                if name not in ("peak", "reserved")
            ]
            print("     predicted/measured: " + ", ".join(parts), flush=True)
    print(f"{off} of {len(only)} peaks are more than a tenth off")
    return off


def predictions(only: list[int]) -> None:
    """The predictions alone."""
    for number in only:
        setting = SETTINGS[number]
        _, found = planned(setting, config_of_shape(setting.shape, version=setting.version))
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in found.parts.items())
        print(f"{number:>2} {setting!s:<46}{found.peak / GIB:8.2f}  {found.moment}: {parts}")


def counts() -> None:
    """Numbers that a block keeps and makes for each token and channel, on the GPU."""
    print("numbers a token and channel: kept by a block (counted), made beside it going backward")
    tokens, channels = 4096, SHAPES["1.5B"][1]
    unit = tokens * channels * 2
    for version in (7, 6):
        for mode, limited in (("lora", False), ("lora", True), ("bone", False), ("full", False)):
            kept, peak = {}, {}
            for layers in (2, 3):
                setting = Setting("1.5B", mode, ctx_len=tokens, limited=limited)
                config = config_of_shape("1.5B", layers=layers, version=version)
                model, plan = random_with_profile(
                    config, peft_flags(setting), device="cuda", dtype=torch.bfloat16
                )
                batch = full_batch(1, tokens, tokens)
                for model.grad_cp in (False, True):
                    for _ in range(2):  # the first one compiles
                        before = torch.cuda.memory_allocated()
                        hidden = model(batch.inputs, None, batch.cu_seqlens)[0]
                        kept[layers, model.grad_cp] = torch.cuda.memory_allocated() - before
                        torch.cuda.reset_peak_memory_stats()
                        hidden.float().sum().backward()
                        peak[layers, model.grad_cp] = torch.cuda.max_memory_allocated() - before
                        del hidden
                        model.zero_grad()
                del model
            counted = kept_by_block(config, plan, step_of(setting)) / unit
            whole, cut = ((kept[3, cp] - kept[2, cp]) / unit for cp in (False, True))
            beside = (peak[2, True] - kept[2, True]) / unit - whole
            print(
                f"RWKV-{version} {mode}{' limited' * limited}: {whole:.2f} ({counted:.2f}), "
                f"recomputed {cut:.2f}, beside it {beside:.2f}",
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="numbers of settings, commas between them")
    parser.add_argument("--seconds", type=float, default=220.0, help="begin no setting after these")
    parser.add_argument("--predict", action="store_true", help="measure nothing")
    parser.add_argument("--parts", action="store_true", help="a table of parts for each setting")
    parser.add_argument("--counts", action="store_true", help="what a block keeps")
    options = parser.parse_args()
    only = [int(word) for word in options.only.split(",") if word] or list(range(len(SETTINGS)))
    if options.predict:
        predictions(only)
        return 0
    grow_segments()
    if options.counts:
        counts()
    else:
        compare(only, options.seconds, options.parts)
    return 0


if __name__ == "__main__":
    if not Path("train.py").exists():
        sys.exit("bench_memory: run it from the repository's root, as python -m tests.bench_memory")
    sys.exit(main())
