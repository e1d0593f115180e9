"""Sources of cuda/ on the CPU: compiled with g++ on tests/cuda_emulator.h and launched on tensors.

A `Library` here and one of `rwkv.ops.cuda_build` are used alike, so that what launches kernels can
be tested without a GPU too.
"""

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

CUDA = Path(__file__).parent.parent / "cuda"
HEADER = Path(__file__).parent / "cuda_emulator.h"
# -O1 and no contraction: products and sums are rounded as written; the checks trap (SIGILL).
OPTIONS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-gnu-unique",
    "-U_FORTIFY_SOURCE",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-Wno-unused-variable",
    "-Wno-psabi",
    "-fsanitize=alignment,bounds,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
]
KERNEL = re.compile(
    r'extern\s+"C"\s+__attribute__\s*\(\(visibility\("default"\), noinline\)\)\s*void\s+(\w+)\s*\('
)
VALUES = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int32,
    "l": ctypes.c_int64,
    "f": ctypes.c_float,
}


class EmulationError(RuntimeError):
    """A kernel did what no kernel may: the text says what, and in which thread."""


def why_not() -> str | None:
    """Why no kernel can be emulated here, or None."""
    return None if shutil.which("g++") else "needs g++ to compile CUDA sources for the CPU"


def load(
    source: str | Path,
    macros: Mapping[str, int | str],
    folder: Path,
    *,
    check_order: bool = True,
) -> "Library":
    """A source compiled for the CPU, as a shared library in `folder`; made anew if it changed.

    Args:
        source: a file of cuda/, or a path.
        macros: what -D defines.
        folder: where libraries are kept.
        check_order: launch twice, threads in ascending and in descending order, and fail unless
            both give the same bits. Twice the time; wrong for kernels with floating-point atomics.
    """
    text, names = preprocess(source, macros)
    text += "".join(
        f'\nextern "C" void emulated_{name}(void** values) {{ emulator::call({name}, values); }}'
        f'\nextern "C" const char* signature_{name}() {{ return emulator::signature({name}); }}\n'
        for name in names
    )
    key = hashlib.sha256("\0".join([*OPTIONS, text]).encode()).hexdigest()[:16]
    built = folder / f"{Path(source).stem}-{key}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        whole = built.with_suffix(".ii")
        whole.write_text(text)
        beside = built.with_suffix(".part")
        _run(["g++", *OPTIONS, "-shared", "-x", "c++-cpp-output", str(whole), "-o", str(beside)])
        beside.replace(built)
    return Library(built, names, check_order)


def preprocess(source: str | Path, macros: Mapping[str, int | str]) -> tuple[str, list[str]]:
    """A source as g++ sees it, and the names of its kernels."""
    defined = [f"-D{name}={value}" for name, value in macros.items()]
    command = ["g++", *OPTIONS, *defined, "-E", "-include", str(HEADER), "-x", "c++"]
    text = _run([*command, str(CUDA / source)])
    return text, KERNEL.findall(text)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EmulationError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


class Library:
    """The kernels of one source; `conflicts` are those of the last launch's matrix loads."""

    def __init__(self, path: Path, names: list[str], check_order: bool):
        self.path, self.names, self.check_order = path, names, check_order
        self.conflicts = 0
        self._library = ctypes.CDLL(str(path))
        self._library.emulator_launch.restype = ctypes.c_char_p
        self._library.emulator_place.restype = ctypes.c_char_p
        self._library.emulator_guarded.restype = ctypes.c_void_p
        self._library.emulator_conflicts.restype = ctypes.c_ulonglong

    def kernel(self, name: str, letters: str, shared: int = 0) -> "Kernel":
        """The kernel `name`, whose arguments are as `letters` say, with `shared` bytes.

        Raises:
            ValueError: the source has no such kernel, or its arguments are others.
        """
        if name not in self.names:
            raise ValueError(f"{self.path.name}: no kernel {name!r}, only {self.names}")
        signature = self._library[f"signature_{name}"]
        signature.restype = ctypes.c_char_p
        found = signature().decode()
        if found != letters:
            raise ValueError(f"{name}: its arguments are {found!r}, the caller says {letters!r}")
        return Kernel(self, name, letters, shared)


class Kernel:
    """One kernel: called with grid and block (an int or up to three) and its arguments.

    Tensors stand for pointers to their first element, None for a null pointer. What lies around a
    tensor is out of bounds for the kernel, even where it belongs to the same storage.
    """

    def __init__(self, library: Library, name: str, letters: str, shared: int):
        self.library, self.name, self.letters, self.shared = library, name, letters, shared

    def __call__(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *arguments: Tensor | float | None,
    ) -> None:
        if len(arguments) != len(self.letters):
            raise ValueError(
                f"{self.name}: takes {len(self.letters)} arguments, got {len(arguments)}"
            )
        tensors = {}  # by address: one tensor passed twice is one memory
        for i, x in enumerate(arguments):
            if isinstance(x, Tensor) and x.numel():
                old = tensors.setdefault(x.data_ptr(), (i, x))[1]
                if _extent(x) > _extent(old):
                    tensors[x.data_ptr()] = i, x
        first = self._launch(grid, block, arguments, tensors, descending=False)
        if self.library.check_order:
            second = self._launch(grid, block, arguments, tensors, descending=True)
            for address, (i, _) in tensors.items():
                if first[address] != second[address]:
                    raise EmulationError(
                        f"{self.name}: argument {i} depends on the order in which threads run;"
                        " a barrier is missing, or two threads write one place"
                    )
        for address, after in first.items():
            ctypes.memmove(address, after, len(after))

    def _launch(self, grid, block, arguments, tensors, *, descending) -> dict[int, bytes]:
        """What the memory of each tensor holds after the launch, by address."""
        library = self.library._library
        memory = {}
        try:
            for address, (i, x) in tensors.items():
                title = f"argument {i} of {self.name} ({str(x.dtype)[6:]} {list(x.shape)})"
                size = _extent(x)
                memory[address] = library.emulator_guarded(ctypes.c_size_t(size), title.encode())
                ctypes.memmove(memory[address], address, size)
            values = [
                VALUES[letter](self._value(i, letter, x, memory))
                for i, (letter, x) in enumerate(zip(self.letters, arguments, strict=True))
            ]
            slots = (ctypes.c_void_p * max(1, len(values)))(*map(ctypes.addressof, values))
            error = library.emulator_launch(
                library[f"emulated_{self.name}"],
                slots,
                _three(grid),
                _three(block),
                ctypes.c_size_t(self.shared),
                ctypes.c_int(descending),
            )
            if error is not None:
                raise EmulationError(f"{self.name}: {error.decode()}{self._place()}")
            self.library.conflicts = library.emulator_conflicts()
            return {
                address: ctypes.string_at(memory[address], _extent(x))
                for address, (_, x) in tensors.items()
            }
        finally:
            for low in memory.values():
                library.emulator_release(ctypes.c_void_p(low))

    def _value(self, i, letter, x, memory):
        kinds = {"p": (Tensor, type(None)), "i": int, "l": int, "f": (int, float)}
        if not isinstance(x, kinds[letter]):
            raise ValueError(f"{self.name}: argument {i} is to be {letter!r}, got {type(x)}")
        if not isinstance(x, Tensor):
            return x
        if x.device.type != "cpu":
            raise ValueError(f"{self.name}: argument {i} is on {x.device}, the emulator on a CPU")
        return memory[x.data_ptr()] if x.numel() else None

    def _place(self) -> str:
        """File and line where a fault happened, if binutils can tell."""
        address = self.library._library.emulator_place().decode()
        if not address or not shutil.which("addr2line"):
            return ""
        start = min(
            int(line.split("-")[0], 16)
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(self.library.path))
        )
        offset = hex(int(address, 16) - start)
        found = _run(["addr2line", "-e", str(self.library.path), "-i", offset])
        return " at " + " < ".join(Path(line).name for line in found.splitlines())


def _extent(x: Tensor) -> int:
    """Bytes from the first to the last element."""
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (1 + steps) * x.element_size()


def _three(sizes: int | Sequence[int]):
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return (ctypes.c_uint * 3)(*sizes, *(1,) * (3 - len(sizes)))
