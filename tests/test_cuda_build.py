"""CUDA sources compiled, kept and launched: all that can be tried without a GPU, and on one."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import emulate
import pytest
import torch

from rwkv.errors import InputError, RunError
from rwkv.ops import cuda_build

ROOT = Path(__file__).parent.parent
PROBES = Path(__file__).parent / "cuda_probes.cu"
SOURCES = [*sorted(cuda_build.CUDA.glob("*.cu")), *sorted(PROBES.parent.glob("*.cu"))]
ARCHS = {  # since CUDA
    "sm_80": (11, 0),
    "sm_86": (11, 1),
    "sm_89": (11, 8),
    "sm_90a": (12, 0),
    "sm_100a": (12, 8),
    "sm_103a": (12, 9),
    "sm_120a": (12, 8),
}
# Bytes that nvcc 13.0 spills all the same, for these GPUs alone: the launch bounds leave these
# kernels 128 registers.
SPILLED = {
    (arch, kernel): count
    for arch in ("sm_100a", "sm_103a")
    for kernel, count in (("wkv7_gradient", 20), ("wkv6_output", 60))
}

compiles = pytest.mark.skipif(
    cuda_build.find_compiler() is None,
    reason="needs NVRTC (pip install nvidia-cuda-nvrtc) or nvcc",
)


@compiles
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_source_compiles_and_spills_no_more_than_is_stated(source, arch):
    compiler = cuda_build.find_compiler().name
    if tuple(map(int, re.findall(r"\d+", compiler)[:2])) < ARCHS[arch]:
        pytest.skip(f"{compiler} does not know {arch}")
    kernels = cuda_build.usage(source, {}, arch)
    assert {kernel.kernel for kernel in kernels} == declared(source)
    more = [k for k in kernels if k.spilled > SPILLED.get((arch, k.kernel), 0)]
    assert more == []


def declared(source: Path) -> set[str]:
    """The kernels of a source, by its preprocessed text."""
    if reason := emulate.why_not():
        pytest.skip(reason)
    return set(emulate.preprocess(source, {})[1])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_nvcc_serves_where_nvrtc_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_build, "_nvrtc_candidates", list)
    cuda_build.find_compiler.cache_clear()
    try:
        assert cuda_build.find_compiler().name.startswith("nvcc 1")
        assert cuda_build.build(PROBES, {}, "sm_80", tmp_path).startswith(b"\x7fELF")
    finally:
        cuda_build.find_compiler.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="needs NVRTC's wheel")
def test_nvrtc_is_found_beside_torch():
    assert cuda_build.find_compiler().name.startswith("NVRTC 1")


@compiles
def test_what_was_compiled_is_kept_until_anything_changes(monkeypatch, tmp_path):
    source = tmp_path / "a.cu"
    source.write_text('extern "C" __global__ void f(int* x) { *x = N; }')
    first = cuda_build.build(source, {"N": 1}, "sm_80", tmp_path)
    real = cuda_build.find_compiler()

    def refuse(path, options):
        raise AssertionError("compiled again")

    monkeypatch.setattr(cuda_build, "find_compiler", lambda: real._replace(compile=refuse))
    assert cuda_build.build(source, {"N": 1}, "sm_80", tmp_path) == first
    for macros, arch in (({"N": 2}, "sm_80"), ({"N": 1}, "sm_90a")):
        with pytest.raises(AssertionError, match="compiled again"):
            cuda_build.build(source, macros, arch, tmp_path)
    source.write_text(source.read_text() + "\n")
    with pytest.raises(AssertionError, match="compiled again"):
        cuda_build.build(source, {"N": 1}, "sm_80", tmp_path)


@compiles
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    cubin = cuda_build.build(PROBES, {}, "sm_80", tmp_path / "file" / "folder")
    assert cubin.startswith(b"\x7fELF")


def test_the_cache_lies_in_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cuda_build.cache_folder() == tmp_path / "rwkv-lm-rlhf" / "cuda"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cuda_build.cache_folder() == tmp_path / ".cache" / "rwkv-lm-rlhf" / "cuda"


@compiles
def test_a_wrong_source_is_told_with_the_compilers_words(tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text('extern "C" __global__ void f() { undeclared = 1; }')
    with pytest.raises(
        RunError, match=r"wrong.cu: .* cannot compile it with -arch=sm_80[^$]*undec"
    ):
        cuda_build.build(source, {}, "sm_80", tmp_path)


def test_what_is_missing_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_build, "_driver", lambda: None)
    assert cuda_build.why_not() == "needs NVIDIA's driver (libcuda.so.1)"
    monkeypatch.setattr(cuda_build, "_driver", object)
    monkeypatch.setattr(cuda_build, "find_compiler", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert cuda_build.why_not() == (
        "needs NVRTC or nvcc to compile CUDA sources; pip install nvidia-cuda-nvrtc-cu12"
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RunError, match=r"cuda_probes.cu: there is no NVRTC.* nvidia-cuda-nvrtc$"):
        cuda_build.build(PROBES, {}, "sm_80", tmp_path)


@compiles
def test_the_command_prints_what_kernels_take(capsys):
    assert cuda_build.main([str(PROBES), "--arch", "sm_80", "-D", "UNUSED=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"kernel \(sm_80\) +registers +spilled bytes +shared bytes", lines[0])
    assert re.search(r"^probe_ldmatrix_x4 +\d+ +0 +512$", "\n".join(lines), re.M)
    with pytest.raises(InputError, match="none.cu: is not in"):
        cuda_build.main(["none.cu"])


def test_arguments_reach_the_kernel_as_the_driver_reads_them(emulated, monkeypatch):
    """The driver is given the same slots as the emulator, which stands in for it."""
    library = emulated(PROBES, {})
    seen = []

    def launch(function, gx, gy, gz, bx, by, bz, shared, stream, slots, extra):
        seen.append((function, (gx, gy, gz), (bx, by, bz), shared, stream, extra))
        error = library._library.emulator_launch(
            library._library["emulated_probe_arguments"],
            slots,
            (ctypes.c_uint * 3)(gx, gy, gz),
            (ctypes.c_uint * 3)(bx, by, bz),
            ctypes.c_size_t(shared),
            0,
        )
        assert error is None
        return 0

    class Driver:
        cuLaunchKernel = staticmethod(launch)

    class FakeLibrary:
        index, _driver = 0, Driver

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    kernel = cuda_build.Kernel(FakeLibrary, "probe_arguments", ctypes.c_void_p(5), "ilfpip", 64)
    out = torch.zeros(5, dtype=torch.float64)
    kernel((1, 2), 32, -3, 1 << 40, 0.5, out, 7, None)
    assert out.tolist() == [-3, 1 << 40, 0.5, 7, 0]
    kernel(1, (32, 1), 1, -1, 1.5, out, 2, out)
    assert out.tolist() == [1, -1, 1.5, 2, 1]
    assert seen == [
        (5, (1, 2, 1), (32, 1, 1), 64, 77, None),
        (5, (1, 1, 1), (32, 1, 1), 64, 77, None),
    ]
    good = (1, 1, 0.5, out, 7, None)
    for wrong in (good[:1], (0.5, *good[1:]), (1 << 31, *good[1:]), (True, *good[1:]), (out,) * 6):
        with pytest.raises(ValueError, match="probe_arguments: arguments 'ilfpip'"):
            kernel(1, 32, *wrong)


@pytest.fixture(scope="module")
def probes() -> cuda_build.Library:
    return cuda_build.load(str(PROBES), {}, torch.device("cuda"))


@pytest.mark.gpu
def test_arguments_of_every_kind_on_a_gpu(probes):
    out = torch.zeros(5, dtype=torch.float64, device="cuda")
    probes.kernel("probe_arguments", "ilfpip")(1, 32, -3, 1 << 40, 0.5, out, 7, None)
    assert out.tolist() == [-3, 1 << 40, 0.5, 7, 0]


@pytest.mark.gpu
def test_the_same_source_is_loaded_once(probes):
    assert cuda_build.load(str(PROBES), {}, torch.device("cuda", 0)) is probes


@pytest.mark.gpu
def test_a_launch_follows_torchs_stream(probes):
    x = torch.zeros(1 << 20, device="cuda")
    add = probes.kernel("probe_add", "ppfi")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.add_(1)
        add(1 << 12, 256, x, x, 2.0, x.numel())
        x.mul_(2)
    stream.synchronize()
    assert (x == 6).all()


@pytest.mark.gpu
def test_a_launch_can_be_captured_in_a_graph(probes):
    x = torch.zeros(1000, device="cuda")
    add = probes.kernel("probe_add", "ppfi")
    add(4, 256, x, x, 1.0, 1000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add(4, 256, x, x, 1.0, 1000)
        add(4, 256, x, x, 1.0, 1000)
    for _ in range(3):
        graph.replay()
    assert (x == 7).all()


@pytest.mark.gpu
def test_a_new_thread_can_launch(probes):
    x = torch.zeros(1000, device="cuda")
    errors = []

    def work():
        try:
            probes.kernel("probe_add", "ppfi")(4, 256, x, x, 1.0, 1000)
            torch.cuda.synchronize()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == [] and (x == 1).all()


@pytest.mark.gpu
def test_more_shared_memory_than_48_KiB(probes):
    """The kernel uses little of it: that the launch is accepted is the point."""
    x, sums = torch.ones(1, 1000, device="cuda"), torch.zeros(1, device="cuda")
    probes.kernel("probe_sum", "ppi", 96 << 10)(1, 256, x, sums, 1000)
    assert sums.item() == 1000
    with pytest.raises(RunError, match=r"probe_sum: 1048576 bytes of dynamic shared memory: CUDA"):
        probes.kernel("probe_sum", "ppi", 1 << 20)


@pytest.mark.gpu
def test_wrong_launches_are_told(probes):
    with pytest.raises(ValueError, match="cuda_probes.cu: no kernel 'probe_none'"):
        probes.kernel("probe_none", "")
    if hasattr(cuda_build._driver(), "cuFuncGetParamInfo"):
        with pytest.raises(ValueError, match=r"probe_add: its arguments have \[8, 8, 4, 4\] bytes"):
            probes.kernel("probe_add", "ppfl")
    with pytest.raises(RunError, match="probe_arguments: grid 0, block 32.*CUDA error 1"):
        probes.kernel("probe_arguments", "ilfpip")(0, 32, 1, 1, 1.0, None, 1, None)


@pytest.mark.gpu
def test_a_second_process_compiles_nothing(probes):
    """The fixture has filled the cache; a compiler that fails would be noticed."""
    code = (
        "import sys, torch\n"
        "from rwkv.ops import cuda_build\n"
        "real = cuda_build.find_compiler()\n"
        "cuda_build.find_compiler = lambda: real._replace(compile=None)\n"
        "cuda_build.load(sys.argv[1], {}, torch.device('cuda'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(PROBES)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
