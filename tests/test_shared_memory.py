"""The operators' kernels fit every GPU of compute capability 8.0 or more, or refuse it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv.errors import RunError
from rwkv.ops import cuda_build, wkv6_cuda, wkv7_cuda
from rwkv.ops.norm_mix import WIDEST

# What one block may have on compute capability 8.6, 8.9 and 12.x, the least of all from 8.0 on;
# 163 KiB on 8.0 and 8.7, 227 KiB on 9.0 to 11.x. Source: CUDA C++ Programming Guide, table of
# technical specifications per compute capability.
LEAST = 99 << 10

compiles = pytest.mark.skipif(
    cuda_build.find_compiler() is None,
    reason="needs NVRTC (pip install nvidia-cuda-nvrtc) or nvcc",
)


@pytest.fixture(params=[wkv6_cuda, wkv7_cuda], ids=lambda module: module.__name__[-9:])
def module(request):
    return request.param


@pytest.fixture
def dynamic(module, monkeypatch) -> dict[str, int]:
    """The most dynamic shared memory that a kernel of the operator is launched with, by name."""
    taken: dict[str, int] = {}

    def kernel(name: str, letters: str, shared: int = 0) -> None:
        taken[name] = max(shared, taken.get(name, 0))

    monkeypatch.setattr(cuda_build, "load", lambda *_: SimpleNamespace(kernel=kernel))
    module.load_kernels.__wrapped__(torch.device("cuda", 0))
    return taken


@compiles
def test_no_kernel_takes_more_than_the_smallest_gpu_has(module, dynamic):
    source = module.__name__.rsplit(".", 1)[1].replace("_cuda", ".cu")
    static = {kernel.kernel: kernel.shared for kernel in cuda_build.usage(source, {}, "sm_86")}
    assert static.keys() == dynamic.keys()
    assert {name: static[name] + dynamic[name] for name in static if static[name] > 0} == {}
    assert {name: size for name, size in dynamic.items() if size > LEAST} == {}


def test_a_gpu_is_refused_by_the_largest_kernel(module, dynamic, monkeypatch):
    largest = max(dynamic.values())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(cuda_build, "why_not", lambda: None)
    monkeypatch.setattr(cuda_build, "refusal", lambda source, index: None)
    sample = SimpleNamespace(
        device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(1, 64, 1, 64)
    )
    for room, reason in (
        (LEAST, None),
        (largest, None),
        (
            largest - 1,
            f"needs {largest:,} bytes of shared memory a block, the GPU has {largest - 1:,}",
        ),
    ):
        monkeypatch.setattr(cuda_build, "shared_memory", lambda index, room=room: room)
        assert module.why_not(sample, False) == reason


def test_a_compiler_that_refuses_the_gpu_leaves_it_to_triton(module, monkeypatch):
    """In one line, as of a compiler that is older than the GPU."""

    def refuse(*_):
        raise RunError(
            "wkv.cu: NVRTC 12.0 cannot compile it with -arch=sm_120a; it says:\nbad arch"
        )

    for name, value in (("why_not", lambda: None), ("build", refuse)):
        monkeypatch.setattr(cuda_build, name, value)
    monkeypatch.setattr(cuda_build, "too_small", lambda device, shared: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    cuda_build.refusal.cache_clear()
    sample = SimpleNamespace(
        device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(1, 64, 1, 64)
    )
    reason = "wkv.cu: NVRTC 12.0 cannot compile it with -arch=sm_120a; it says: bad arch"
    assert module.why_not(sample, False) == reason
    cuda_build.refusal.cache_clear()


exact = pytest.param(torch.float32, marks=pytest.mark.slow)


def probed(
    ops: Sequence[str], dtype: torch.dtype, channels: Sequence[int], gpu: int | str
) -> dict[tuple[str, int, str], int]:
    """Bytes of shared memory of Triton kernels compiled for a GPU, by operator, channels, name."""
    pytest.importorskip("triton.backends.nvidia")
    probe = Path(__file__).with_name("triton_probe.py")
    several = (",".join(ops), str(dtype).removeprefix("torch."), ",".join(map(str, channels)))
    environment = os.environ | {"PYTHONPATH": str(probe.parent.parent)}
    done = subprocess.run(
        [sys.executable, probe, *several, str(gpu)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = map(str.split, done.stdout.splitlines())
    return {(op, int(C), name): int(size) for op, C, name, size in lines}


@pytest.mark.parametrize("op", ["wkv7", "wkv6"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, exact], ids=str)
@pytest.mark.parametrize("N", [64, 128])
def test_tritons_kernels_fit_the_smallest_gpu_or_refuse_it(op, dtype, N, monkeypatch):
    largest = max(probed([op], dtype, [N], 86).values())
    from rwkv.ops import wkv7_triton

    stated = wkv7_triton.SHARED.get((dtype, N)) if op == "wkv7" else None
    assert largest <= LEAST if stated is None else largest == stated > LEAST
    if stated is None:
        return
    monkeypatch.setattr(cuda_build, "shared_memory", lambda index: LEAST)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    device = torch.device("cuda", 0)
    sample = SimpleNamespace(device=device, dtype=dtype, shape=(1, 64, 1, N))
    assert f"needs {stated:,} bytes" in wkv7_triton.why_not(sample, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "gpu, room, channels",
    [
        (86, LEAST, [2048, 2560, 4096]),
        pytest.param(86, LEAST, [WIDEST], marks=pytest.mark.slow),
        pytest.param(90, 227 << 10, [2048, 2560, 4096, WIDEST], marks=pytest.mark.slow),
    ],
)
def test_the_mixes_look_ahead_where_there_is_room(dtype, gpu, room, channels):
    """All rows that a token brings to a kernel wait in shared memory, or none."""
    rows = {"time7": 10, "time6": 7, "channel7": 5, "channel6": 6}
    taken = probed(rows, dtype, channels, gpu)
    from rwkv.ops.norm_mix_triton import OTHER_BYTES, parts

    assert {op: size for op, size in taken.items() if size > room} == {}
    assert {kernel for op, _, kernel in taken if op == "time6"} > {"_mixes_gradient_kernel"}
    for (op, C, kernel), size in taken.items():
        waiting = (rows[op] if kernel == "_backward_kernel" else 1) * sum(parts(C)) * dtype.itemsize
        if not kernel.startswith("_mixes") and waiting + OTHER_BYTES <= room:
            assert waiting < size <= waiting + OTHER_BYTES, (op, C, kernel)
        else:
            assert size <= 32 << 10, (op, C, kernel)


@pytest.mark.parametrize("gpu, room", [(86, LEAST), ("gfx942", 64 << 10)])
@pytest.mark.parametrize(
    "op, dtype, sizes",
    [
        ("heads", torch.bfloat16, [2560]),
        pytest.param("heads", torch.float32, [2560], marks=pytest.mark.slow),
        ("adapters", torch.bfloat16, [64, 128]),
        pytest.param("adapters", torch.bfloat16, [16, 32, 256], marks=pytest.mark.slow),
        pytest.param("adapters", torch.float32, [16, 32, 64], marks=pytest.mark.slow),
        ("stores", torch.bfloat16, [4096]),
        ("tokens", torch.bfloat16, [65536]),
        ("training", torch.bfloat16, [4096]),
        ("training", torch.float32, [4096]),
    ],
)
def test_all_other_kernels_fit_the_smallest_gpu_or_say_what_they_need(op, dtype, sizes, gpu, room):
    """AMD's GPUs have 64 KiB; what needs more is left to plain torch there."""
    pytest.importorskip("triton.backends.amd")
    taken = {(size, kernel): n for (_, size, kernel), n in probed([op], dtype, sizes, gpu).items()}
    assert len(taken) >= len(sizes)
    picking = taken.pop((65536, "_pick_kernel"), None)
    assert picking in (None, (64 if gpu == 86 else 128) << 10)
    assert {kernel: size for kernel, size in taken.items() if size > room} == {}


def test_decoding_is_left_to_torch_where_drawing_has_no_room(monkeypatch):
    pytest.importorskip("triton")
    from rwkv.ops import decoding_triton, picking_triton

    sample = SimpleNamespace(
        device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(1, 1, 1, 64)
    )
    for room in (LEAST, picking_triton.SHARED - 1):
        monkeypatch.setattr(cuda_build, "shared_memory", lambda index, room=room: room)
        reason = decoding_triton.why_not(sample, False)
        assert (reason is None) == (room == LEAST)
