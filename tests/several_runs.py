"""Several runs of train.py in one process, or one after the other in one process a rank.

    PYTHONPATH=. python tests/several_runs.py RUNS.json REPORT [--cpu]
    PYTHONPATH=. torchrun --standalone --nproc_per_node 2 tests/several_runs.py RUNS.json REPORT

RUNS.json is a list of objects: `name`; `words`, the command line; `stop_at`, a step after which
the run gets SIGTERM, or null. Each rank appends an object a run to REPORT-RANK.jsonl: its status or
the error, seconds, and the peak of GPU memory in GiB. After an error it leaves, for other ranks may
wait for it; whoever started it goes on behind that run. --cpu lets DeepSpeed run there.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path

import torch

import train
from rwkv.training import step_log

add_line = step_log.RunLog.add


def stop_at(step: int | None) -> None:
    """Send SIGTERM to this process when the log has the line of a step."""

    def stopping(self: step_log.RunLog, line: dict) -> None:
        add_line(self, line)
        if line["step"] == step and "loss" in line:
            os.kill(os.getpid(), 15)

    step_log.RunLog.add = stopping if step else add_line


def main() -> int:
    runs, report = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    rank = int(os.environ.get("RANK", "0"))
    if "--cpu" in sys.argv:
        torch.set_num_threads(1)
        from deepspeed_on_cpu import allow_cpu

        allow_cpu()
    for run in runs:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        stop_at(run.get("stop_at"))
        result, begun = {"name": run["name"]}, time.perf_counter()
        try:
            result["status"] = train.main(run["words"])
        except (Exception, SystemExit) as error:
            lines = str(error).strip().splitlines() or [repr(error)]
            result["error"] = f"{type(error).__name__}: {lines[0]}"
        result["seconds"] = time.perf_counter() - begun
        if torch.cuda.is_available():
            result["peak"] = torch.cuda.max_memory_allocated() / 2**30
        with Path(f"{report}-{rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        if "error" in result:
            sys.stdout.flush()
            os._exit(1)  # other ranks may be in the middle of a sum, and exit handlers would wait
    return 0


if __name__ == "__main__":
    sys.exit(main())
