"""Runs of train.py under DeepSpeed on a CPU, which Lightning refuses by itself.

    python tests/deepspeed_on_cpu.py RUNS.json

RUNS.json is a list of objects: `words`, the command line; `stop_at`, a step after which the run
gets SIGTERM, or null; `sgd`, true for plain gradient descent in place of Adam. For each run a line
of JSON says the exit status and, under ZeRO-3, how many parameters the model has and how many of
them were gathered at once.
"""

import json
import os
import signal
import sys
from pathlib import Path

import deepspeed
import deepspeed.ops.adam
import pytorch_lightning.strategies.deepspeed as lightning_deepspeed
import torch
from pytorch_lightning.accelerators import Accelerator

import train
from losses import logprobs
from rwkv.model import RWKV
from rwkv.scattered import is_scattered
from rwkv.training import optimizer, step_log, strategy
from rwkv.training.launch import is_child

HEAD_ROWS = 16  # positions that the head runs on at once, so that it runs several times


class PlainAdam(torch.optim.AdamW):
    """Stands in for DeepSpeed's own Adam, which has to be compiled."""

    def __init__(self, groups, adamw_mode, **rest):
        super().__init__(groups, **rest)


def allow_cpu() -> None:
    """Lift the checks that ask for a GPU, and compile nothing."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.ops.adam.DeepSpeedCPUAdam = PlainAdam
    lightning_deepspeed.CUDAAccelerator = Accelerator
    lightning_deepspeed._validate_device_index_selection = lambda devices: None
    lightning_deepspeed.DeepSpeedStrategy.root_device = property(
        lambda self: torch.device("cpu", 0)
    )
    strategy.check_strategy = lambda flags, on_gpu: None
    config = strategy.deepspeed_config

    def scatter_all(flags, dtype, trained):
        """By itself ZeRO-3 keeps small parameters, and those that are needed again soon."""
        found = config(flags, dtype, trained)
        zero = found["zero_optimization"]
        for place in ("offload_optimizer", "offload_param"):
            if place in zero:
                zero[place] = zero[place] | {"pin_memory": False}
        if zero["stage"] == 3:
            zero["stage3_param_persistence_threshold"] = 0
            zero["stage3_max_reuse_distance"] = 0
            zero["stage3_max_live_parameters"] = 0
        return found

    strategy.deepspeed_config = scatter_all


def use_sgd() -> None:
    optimizer._maker = lambda flags, **_: lambda groups: torch.optim.SGD(groups, lr=flags.lr_init)


def stop_at(step: int | None) -> None:
    """Send SIGTERM to this process when the log has the line of a step."""
    add = step_log.RunLog.add

    def stopping(self, line):
        add(self, line)
        if line["step"] == step and "loss" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    step_log.RunLog.add = stopping


def gathered(model: RWKV) -> int:
    return sum(p.ds_numel for p in model.parameters() if p.ds_status.name == "AVAILABLE")


def main() -> None:
    torch.set_num_threads(1)
    allow_cpu()
    logprobs.MAX_LOGITS = HEAD_ROWS * 256
    models: list[RWKV] = []
    peak = 0

    def watch(module, arguments, output):
        nonlocal peak
        if isinstance(module, RWKV) and module not in models:
            models.append(module)
        if models and is_scattered(models[-1]):
            peak = max(peak, gathered(models[-1]))

    torch.nn.modules.module.register_module_forward_hook(watch)
    originals = optimizer._maker, step_log.RunLog.add
    for run in json.loads(Path(sys.argv[1]).read_text()):
        models.clear()
        peak = 0
        if run["sgd"]:
            use_sgd()
        stop_at(run["stop_at"])
        report = {"status": train.main(run["words"])}
        optimizer._maker, step_log.RunLog.add = originals
        if peak:
            blocks = ([p.ds_numel for p in block.parameters()] for block in models[-1].blocks)
            report |= {"peak": peak, "block": max(sum(sizes) for sizes in blocks)}
            report["left"] = gathered(models[-1])
        if not is_child():
            print("report", json.dumps(report), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
