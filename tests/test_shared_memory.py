"""The operators' kernels fit every GPU of compute capability 8.0 or more, or refuse it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv.errors import RunError
from rwkv.ops import cuda_build, wkv6_cuda, wkv7_cuda

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


def probed(op: str, dtype: torch.dtype, channels: int, gpu: int) -> dict[str, int]:
    """Bytes of shared memory of an operator's Triton kernels, compiled for a GPU."""
    pytest.importorskip("triton.backends.nvidia")
    probe = Path(__file__).with_name("triton_probe.py")
    words = (op, str(dtype).removeprefix("torch."), str(channels), str(gpu))
    environment = os.environ | {"PYTHONPATH": str(probe.parent.parent)}
    done = subprocess.run(
        [sys.executable, probe, *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {name: int(size) for name, size in map(str.split, done.stdout.splitlines())}


@pytest.mark.parametrize("op", ["wkv7", "wkv6"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, exact], ids=str)
@pytest.mark.parametrize("N", [64, 128])
def test_tritons_kernels_fit_the_smallest_gpu_or_refuse_it(op, dtype, N, monkeypatch):
    largest = max(probed(op, dtype, N, 86).values())
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


@pytest.mark.parametrize(
    "version, dtype, gpu, room",
    [
        (6, torch.bfloat16, 86, LEAST),
        (7, torch.bfloat16, 86, LEAST),
        (6, torch.float32, 86, LEAST),
        (6, torch.float32, 90, 227 << 10),
    ],
    ids=str,
)
def test_the_mixes_look_ahead_where_there_is_room(version, dtype, gpu, room):
    """RWKV-6 brings 14 rows of 4,096 channels a token, RWKV-7 10."""
    taken = probed(f"mixes{version}", dtype, 4096, gpu)
    rows = {6: 14, 7: 10}[version] * 4096 * dtype.itemsize
    assert max(taken.values()) <= room
    assert (taken["_backward_kernel"] > rows) == (rows + 128 <= room)
