"""CUDA sources of `cuda/`, compiled once a machine and launched on torch's stream.

NVRTC, which comes with torch for NVIDIA GPUs, compiles for the device at hand; where it is missing
nvcc does. What it made is kept in the user's cache folder under a name that depends on the source,
the headers, the options and the compiler.

    python -m rwkv.ops.cuda_build [wkv7.cu ...] [--arch sm_90a] [-D N=64]

prints what each kernel takes: registers, spilled bytes and static shared memory.
"""

import argparse
import contextlib
import ctypes
import ctypes.util
import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rwkv.cli import Parser, run
from rwkv.errors import InputError, RunError
from rwkv.files import replacing

CUDA = Path(__file__).parents[2] / "cuda"
FORMATS = {"p": "P", "i": "i", "l": "q", "f": "f"}  # of `struct`, native sizes and alignment
NUMBERS = (int, float)
TOOLKIT = Path("/usr/local/cuda")

# From cuda.h.
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
INVALID_CONTEXT = 201


class Compiler(NamedTuple):
    """A compiler: its name and version, and what makes (cubin, messages) of (path, options)."""

    name: str
    compile: Callable[[Path, list[str]], tuple[bytes, str]]


class Usage(NamedTuple):
    """What one kernel takes: registers a thread, bytes spilled a thread, shared bytes a block."""

    kernel: str
    registers: int
    spilled: int
    shared: int


def why_not() -> str | None:
    """Why no CUDA source can be compiled and launched here, or None."""
    if _driver() is None:
        return "needs NVIDIA's driver (libcuda.so.1)"
    if find_compiler() is None:
        return f"needs NVRTC or nvcc to compile CUDA sources; {_advice()}"
    return None


def _advice() -> str:
    major = (torch.version.cuda or "13").split(".")[0]
    return f"pip install nvidia-cuda-nvrtc{'-cu12' if major == '12' else ''}"


@cache
def find_compiler() -> Compiler | None:
    """NVRTC, or else nvcc, or None where neither is found."""
    for path in _nvrtc_candidates():
        with contextlib.suppress(OSError):
            return _nvrtc(path)
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(TOOLKIT / "bin"))
    return _nvcc(nvcc) if nvcc else None


def _nvrtc_candidates() -> list[str]:
    """Where libnvrtc may be, best first: beside torch, in a toolkit, wherever the system looks."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    major = (torch.version.cuda or "").split(".")[0]
    beside = [
        path
        for place in places
        for pattern in ("cu[0-9]*/lib", "cuda_nvrtc/lib")
        for path in sorted(place.glob(f"{pattern}/libnvrtc.so.*"), reverse=True)
    ]
    beside.sort(key=lambda path: path.suffix != f".{major}")
    nvcc = shutil.which("nvcc")
    toolkits = [TOOLKIT, *([Path(nvcc).resolve().parents[1]] if nvcc else [])]
    installed = [path for folder in toolkits for path in sorted(folder.glob("lib64/libnvrtc.so.*"))]
    system = ctypes.util.find_library("nvrtc")
    return [*map(str, [*beside, *installed]), *([system] if system else [])]


def _nvrtc(path: str) -> Compiler:
    """The compiler in the shared library at `path`.

    Raises:
        OSError: it cannot be loaded.
    """
    for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")):
        ctypes.CDLL(str(builtins))  # NVRTC looks for it by name alone
    library = ctypes.CDLL(path)
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    name = f"NVRTC {major.value}.{minor.value}"

    def check(status: int, path: Path) -> None:
        if status:
            raise RunError(f"{path.name}: {name}: {library.nvrtcGetErrorString(status).decode()}")

    def read(program: ctypes.c_void_p, what: str, path: Path) -> bytes:
        size = ctypes.c_size_t()
        check(library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)), path)
        buffer = ctypes.create_string_buffer(size.value)
        check(library[f"nvrtcGet{what}"](program, buffer), path)
        return buffer.raw

    def compile(path: Path, options: list[str]) -> tuple[bytes, str]:
        program = ctypes.c_void_p()
        source, title = path.read_bytes(), str(path).encode()
        check(library.nvrtcCreateProgram(ctypes.byref(program), source, title, 0, None, None), path)
        try:
            words = [word.encode() for word in [*options, f"-I{path.parent}"]]
            array = (ctypes.c_char_p * len(words))(*words)
            failed = library.nvrtcCompileProgram(program, len(words), array)
            messages = read(program, "ProgramLog", path).rstrip(b"\0").decode(errors="replace")
            if failed:
                raise _refusal(path, name, options, messages)
            return read(program, "CUBIN", path), messages
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    return Compiler(name, compile)


def _nvcc(program: str) -> Compiler:
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", version)
    name = f"nvcc {found.group(1) if found else version}"

    def compile(path: Path, options: list[str]) -> tuple[bytes, str]:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            done = subprocess.run(
                [program, "-cubin", *options, str(path), "-o", str(cubin)],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise _refusal(path, name, options, done.stderr)
            return cubin.read_bytes(), done.stderr

    return Compiler(name, compile)


def _refusal(path: Path, name: str, options: list[str], messages: str) -> RunError:
    return RunError(
        f"{path.name}: {name} cannot compile it with {' '.join(options)}; it says:\n"
        + messages.strip()
    )


def _options(arch: str, macros: Mapping[str, int | str]) -> list[str]:
    defined = [f"-D{name}={value}" for name, value in sorted(macros.items())]
    return [f"-arch={arch}", "-std=c++17", "-lineinfo", *defined]


def cache_folder() -> Path:
    """Where compiled sources are kept: `rwkv-lm-rlhf/cuda` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "rwkv-lm-rlhf" / "cuda"


def build(
    source: str | Path, macros: Mapping[str, int | str], arch: str, folder: Path | None = None
) -> bytes:
    """The cubin of a source, compiled unless `folder` already holds it.

    Args:
        source: a file of cuda/, or a path.
        macros: what -D defines.
        arch: what to compile for, as "sm_80" or "sm_90a".
        folder: where cubins are kept; None for `cache_folder()`. One that cannot be written is
            done without.

    Raises:
        RunError: there is no compiler, or it refuses the source.
    """
    compiler = find_compiler()
    path = CUDA / source
    if compiler is None:
        raise RunError(f"{path.name}: there is no NVRTC and no nvcc to compile it; {_advice()}")
    options = _options(arch, macros)
    texts = [path, *sorted(CUDA.glob("*.cuh"))]
    key = hashlib.sha256("\0".join([compiler.name, *options]).encode())
    for text in texts:
        key.update(b"\0" + text.name.encode() + b"\0" + text.read_bytes())
    kept = (folder or cache_folder()) / f"{path.stem}-{arch}-{key.hexdigest()[:20]}.cubin"
    with contextlib.suppress(OSError):
        return kept.read_bytes()
    cubin, _ = compiler.compile(path, options)
    with contextlib.suppress(InputError, OSError), replacing(kept) as beside:
        beside.write_bytes(cubin)
    return cubin


def usage(source: str | Path, macros: Mapping[str, int | str], arch: str) -> list[Usage]:
    """What each kernel of a source takes, as the assembler reports it; compiles each time."""
    compiler = find_compiler()
    path = CUDA / source
    if compiler is None:
        raise RunError(f"{path.name}: there is no NVRTC and no nvcc to compile it; {_advice()}")
    _, messages = compiler.compile(path, [*_options(arch, macros), "--ptxas-options=-v"])
    table = []
    for part in messages.split("Compiling entry function '")[1:]:
        numbers = {
            what: sum(int(number) for number in re.findall(pattern, part))
            for what, pattern in (
                ("registers", r"Used (\d+) registers"),
                ("spilled", r"(\d+) bytes spill stores"),
                ("shared", r"(\d+) bytes smem"),
            )
        }
        table.append(Usage(part.split("'")[0], **numbers))
    return sorted(table)


def arch_of(device: int) -> str:
    """What to compile for to run on a CUDA device: all that it has, so "sm_90a" on Hopper."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def index_of(device: torch.device) -> int:
    """The number of a CUDA device, which may be the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def refusal(source: str, index: int) -> str | None:
    """Why a source of cuda/ cannot be compiled for a CUDA device, in a line, or None.

    It is compiled for it, if it was not before, and kept.
    """
    try:
        build(source, {}, arch_of(index))
    except RunError as error:
        return " ".join(str(error).splitlines()[:2])
    return None


def too_small(device: torch.device, shared: int) -> str | None:
    """Why a GPU has no room for blocks of so many bytes of shared memory, or None."""
    if device.type != "cuda":  # where kernels are interpreted
        return None
    room = shared_memory(index_of(device))
    if room < shared:
        return f"needs {shared:,} bytes of shared memory a block, the GPU has {room:,}"
    return None


@cache
def shared_memory(index: int) -> int:
    """The bytes of shared memory that one block may have on a GPU; AMD's have one limit only."""
    found = torch.cuda.get_device_properties(index)
    return int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block))


@cache
def _driver() -> ctypes.CDLL | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_uint
    driver.cuLaunchKernel.argtypes = [pointer, *7 * [number], pointer, pointer, pointer]
    driver.cuFuncSetAttribute.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    driver.cuModuleGetFunction.argtypes = [pointer, pointer, ctypes.c_char_p]
    driver.cuCtxSetCurrent.argtypes = [pointer]
    return driver


def _check(status: int, what: str) -> None:
    """Raise a RunError with CUDA's own words unless `status` is 0."""
    if status:
        text = ctypes.c_char_p()
        driver = _driver()
        assert driver is not None
        driver.cuGetErrorString(status, ctypes.byref(text))
        raise RunError(f"{what}: CUDA error {status}: {(text.value or b'unknown').decode()}")


def load(source: str, macros: Mapping[str, int | str], device: torch.device | int) -> "Library":
    """The kernels of a source on a CUDA device, ready to launch; compiled and loaded once.

    Loading is no work for a stream: do it before a CUDA graph is captured.

    Args:
        source: a file of cuda/, or a path.
        macros: what -D defines.
        device: a CUDA device, or its index.

    Raises:
        RunError: there is no driver or compiler, or one of them refuses the source.
    """
    index = device if isinstance(device, int) else index_of(device)
    return _load(source, tuple(sorted(macros.items())), index)


@cache
def _load(source: str, macros: tuple[tuple[str, int | str], ...], index: int) -> "Library":
    if reason := why_not():
        raise RunError(f"{source}: {reason}")
    cubin = build(source, dict(macros), arch_of(index))
    return Library(Path(source).name, cubin, index)


def _enter(index: int) -> None:
    """Make torch's context of a device current in this thread; torch makes it at first use."""
    driver = _driver()
    assert driver is not None
    torch.cuda.init()
    context = ctypes.c_void_p()
    what = f"cuda:{index}: its context"
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), index), what)
    _check(driver.cuCtxSetCurrent(context), what)


class Library:
    """The kernels of one source, loaded on one device."""

    def __init__(self, title: str, cubin: bytes, index: int):
        self.title, self.index = title, index
        driver = _driver()
        assert driver is not None
        self._driver, self._module = driver, ctypes.c_void_p()
        with torch.cuda.device(index):
            _enter(index)
            status = driver.cuModuleLoadData(ctypes.byref(self._module), cubin)
        _check(status, title)

    def kernel(self, name: str, letters: str, shared: int = 0) -> "Kernel":
        """The kernel `name`, whose arguments are as `letters` say, with `shared` bytes.

        Args:
            name: as the source declares it, `extern "C"`.
            letters: one an argument: p a pointer, i and l integers of 4 and 8 bytes, f a float.
            shared: dynamic shared memory of a block, in bytes.

        Raises:
            ValueError: the source has no such kernel, or its arguments have other sizes.
            RunError: the device has less shared memory.
        """
        function = ctypes.c_void_p()
        found = self._driver.cuModuleGetFunction(
            ctypes.byref(function), self._module, name.encode()
        )
        if found:
            raise ValueError(f"{self.title}: no kernel {name!r}")
        self._check_sizes(name, function, letters)
        if shared:
            _check(
                self._driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared),
                f"{name}: {shared} bytes of dynamic shared memory",
            )
        return Kernel(self, name, function, letters, shared)

    def _check_sizes(self, name: str, function: ctypes.c_void_p, letters: str) -> None:
        if not hasattr(self._driver, "cuFuncGetParamInfo"):  # drivers before CUDA 12.4
            return
        sizes: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        while not self._driver.cuFuncGetParamInfo(
            function, ctypes.c_size_t(len(sizes)), ctypes.byref(offset), ctypes.byref(size)
        ):
            sizes.append(size.value)
        wanted = [struct.calcsize(FORMATS[letter]) for letter in letters]
        if sizes != wanted:
            raise ValueError(
                f"{name}: its arguments have {sizes} bytes, the caller's {letters!r} {wanted}"
            )


class _Memory(threading.local):
    """Room for the arguments of one launch, in each thread its own."""

    def __init__(self, letters: str):
        formats = [FORMATS[letter] for letter in letters]
        self.buffer = ctypes.create_string_buffer(max(1, struct.calcsize("".join(formats))))
        start = ctypes.addressof(self.buffer)
        ends = [struct.calcsize("".join(formats[: i + 1])) for i in range(len(formats))]
        begins = [end - struct.calcsize(f) for end, f in zip(ends, formats, strict=True)]
        self.slots = (ctypes.c_void_p * max(1, len(begins)))(*(start + i for i in begins))


class Kernel:
    """One kernel: called with grid and block (an int or up to three) and its arguments.

    Tensors stand for pointers to their first element, None for a null pointer. It runs on the
    current stream of the library's device, and can be captured in a CUDA graph.
    """

    def __init__(
        self, library: Library, name: str, function: ctypes.c_void_p, letters: str, shared: int
    ):
        self.name, self.letters, self.shared = name, letters, shared
        self._library = library  # its module must live as long
        self._index, self._function = library.index, function.value
        self._launch = library._driver.cuLaunchKernel
        self._pack = struct.Struct("".join(FORMATS[letter] for letter in letters)).pack_into
        self._memory = _Memory(letters)

    def __call__(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *arguments: Any,
    ) -> None:
        index, memory = self._index, self._memory
        if torch.cuda.current_device() != index:
            with torch.cuda.device(index):
                return self(grid, block, *arguments)
        try:
            values = [
                x if x.__class__ in NUMBERS else 0 if x is None else x.data_ptr() for x in arguments
            ]
            self._pack(memory.buffer, 0, *values)
        except (struct.error, AttributeError) as error:
            raise ValueError(f"{self.name}: arguments {self.letters!r}: {error}") from error
        launch = (
            self._function,
            *_three(grid),
            *_three(block),
            self.shared,
            torch._C._cuda_getCurrentRawStream(index),
            memory.slots,
            None,
        )
        status = self._launch(*launch)
        if status == INVALID_CONTEXT:  # a thread in which torch did nothing on this device yet
            _enter(index)
            status = self._launch(*launch)
        if status:
            _check(status, f"{self.name}: grid {grid}, block {block}, {self.shared} bytes")


def _three(sizes: int | Sequence[int]) -> tuple[int, ...]:
    return (sizes, 1, 1) if isinstance(sizes, int) else (*sizes, 1, 1)[:3]


def main(argv: Sequence[str] | None = None) -> int:
    """Print what each kernel of the named sources takes; all sources of cuda/ if none is named."""
    parser = Parser(
        prog="python -m rwkv.ops.cuda_build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="files of cuda/; default: all")
    parser.add_argument("--arch", help="default: the GPU's, without one sm_90a")
    parser.add_argument("-D", dest="macros", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args(argv)
    arch = options.arch or (arch_of(0) if torch.cuda.is_available() else "sm_90a")
    macros = dict(macro.split("=", 1) if "=" in macro else (macro, "1") for macro in options.macros)
    sources = options.sources or sorted(path.name for path in CUDA.glob("*.cu"))
    row = "{:32} {:>10} {:>14} {:>14}"
    print(row.format(f"kernel ({arch})", "registers", "spilled bytes", "shared bytes"))  # noqa: T201
    for source in sources:
        if not (CUDA / source).is_file():
            raise InputError(f"{source}: is not in {CUDA}; name one of its .cu files, or a path")
        for kernel in usage(source, macros, arch):
            print(row.format(*kernel))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
