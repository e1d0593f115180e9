"""cuda/mma.cuh on the CPU's emulator and on a GPU: tensor-core products, those of cuda/tiles.cuh
too, matrix loads, numbers and barriers against torch; and that the emulator finds what a kernel
must not do."""

from pathlib import Path
from typing import NamedTuple

import emulate
import pytest
import torch

from rwkv.ops import cuda_build

compiles = pytest.mark.skipif(bool(emulate.why_not()), reason=str(emulate.why_not()))
PROBES = Path(__file__).parent / "cuda_probes.cu"
TILE_PROBES = Path(__file__).parent / "tile_probes.cu"

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


class Probes(NamedTuple):
    """The probes' kernels, and what runs them."""

    library: emulate.Library | cuda_build.Library
    device: str

    def run(self, name, letters, grid, block, *arguments, shared=0):
        """Launch a kernel on the device and return its tensor arguments, on the CPU again."""
        moved = [x.to(self.device) if isinstance(x, torch.Tensor) else x for x in arguments]
        self.library.kernel(name, letters, shared)(grid, block, *moved)
        return [x.cpu() for x in moved if isinstance(x, torch.Tensor)]


@pytest.fixture(scope="module")
def emulated_probes(emulated) -> emulate.Library:
    return emulated(PROBES, {})


@pytest.fixture(scope="module", params=["cpu", GPU])
def probes(request) -> Probes:
    if request.param == "cpu":
        return Probes(request.getfixturevalue("emulated_probes"), "cpu")
    return Probes(cuda_build.load(str(PROBES), {}, torch.device("cuda")), "cuda")


@pytest.fixture(params=["cpu", GPU])
def tile_probes(request) -> Probes:
    if request.param == "cpu":
        return Probes(request.getfixturevalue("emulated")(TILE_PROBES, {}), "cpu")
    return Probes(cuda_build.load(str(TILE_PROBES), {}, torch.device("cuda")), "cuda")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_products_of_16_bit_fragments_equal_torch(probes, dtype):
    a, b, c = draw(16, 16).to(dtype), draw(16, 8, seed=1).to(dtype), draw(16, 8, seed=2)
    want = a.double() @ b.double() + c.double()
    name = "probe_mma_f16" if dtype == torch.float16 else "probe_mma_bf16"
    *_, got = probes.run(name, "ppp", 1, 32, a, b, c)
    # tensor cores cut what they add to the exponent of the largest, here up to 8
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


def test_products_of_tf32_fragments_equal_torch(probes):
    a, b, c = draw(16, 8), draw(8, 8, seed=1), draw(16, 8, seed=2)
    cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b)]
    want = cut[0] @ cut[1] + c.double()
    *_, got = probes.run("probe_mma_tf32", "ppp", 1, 32, a, b, c)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_products_of_tiles_equal_torch(tile_probes, dtype):
    a, b = draw(64, 64).to(dtype), draw(64, 64, seed=1).to(dtype)
    A, B = a.double(), b.double()
    want = torch.stack([A @ B.T, A @ B.T, A @ B, 2 * A @ B, A.T @ B, 2 * A.T @ B])
    name = "probe_tiles_f16" if dtype == torch.float16 else "probe_tiles_bf16"
    *_, got = tile_probes.run(name, "ppp", 1, 128, a, b, torch.zeros(6, 64, 64), shared=16384)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("count", [2, 4])
def test_matrix_loads_give_each_lane_its_pair(probes, count, transposed):
    matrices = torch.arange(count * 64, dtype=torch.int16).view(count, 8, 8)
    out = torch.full((count, 32, 2), -1, dtype=torch.int16)
    suffix = "_trans" if transposed else ""
    _, got = probes.run(f"probe_ldmatrix_x{count}{suffix}", "pp", 1, 32, matrices, out)
    want = matrices.mT if transposed else matrices
    assert torch.equal(got, want.reshape(count, 32, 2))


@pytest.mark.parametrize("stride, conflicts", [(64, 28), (72, 0)])
def test_bank_conflicts_of_matrix_loads_are_counted(emulated_probes, stride, conflicts):
    """Rows of 128 bytes lie in the same banks: seven of eight wait; 144 bytes spread them."""
    rows = torch.zeros(32, stride, dtype=torch.int16)
    emulated_probes.kernel("probe_conflicts", "pi", 32 * stride * 2)(1, 32, rows, stride)
    assert emulated_probes.conflicts == conflicts


ROUNDED = torch.cat(
    [
        torch.tensor([0.0, -0.0, 1.0, 65504.0, 65519.0, 65520.0, 1e9, -1e9, 1e-8, 6e-8]),
        torch.tensor([float("inf"), -float("inf"), 2049.0, 2051.0, 3e-5, 6.2e-5, 1e-40]),
        torch.tensor([3.3895314e38, 3.4e38, 1.00390625, 1.01171875]),
        draw(1000),
        draw(500, seed=1) * 1e-6,
        draw(500, seed=2) * 1e-4,
    ]
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_16_bit_numbers_are_rounded_as_torch_does(probes, dtype):
    n = ROUNDED.numel()
    outputs = torch.empty(n, dtype=dtype), torch.empty(n)
    outputs += torch.empty(n, 2, dtype=dtype), torch.empty(n, 2)
    name = "probe_f16" if dtype == torch.float16 else "probe_bf16"
    _, bits, back, pairs, unpacked = probes.run(name, "pppppi", 4, 64, ROUNDED, *outputs, n)
    want = ROUNDED.to(dtype)
    assert torch.equal(bits.view(torch.int16), want.view(torch.int16))
    assert torch.equal(back, want.float())
    assert torch.equal(pairs, torch.stack([want, -want], 1))
    assert torch.equal(unpacked, pairs.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_nan_stays_nan(probes, dtype):
    x = torch.full((1,), float("nan"))
    outputs = torch.zeros(1, dtype=dtype), torch.zeros(1)
    outputs += torch.zeros(1, 2, dtype=dtype), torch.zeros(1, 2)
    name = "probe_f16" if dtype == torch.float16 else "probe_bf16"
    for got in probes.run(name, "pppppi", 1, 32, x, *outputs, 1):
        assert got.isnan().all()


def test_tf32_numbers_are_rounded_to_nearest_and_ties_away_from_zero(probes):
    x = torch.cat([draw(500), torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-12, 0.0])])
    scale = torch.exp2(x.abs().clamp_min(1e-30).log2().floor() - 10)
    want = (x.double() / scale).abs().add(0.5).floor() * scale * x.sign()
    _, _, got = probes.run("probe_floats", "pppi", 1, 64, x, x.clone(), x.clone(), x.numel())
    looked_at = (got.view(torch.int32) & ~0x1FFF).view(torch.float32)
    assert torch.equal(looked_at.double(), want)


def test_exp2_is_that_of_torch(probes):
    x = torch.cat([draw(500) * 30, torch.tensor([0.0, 1.0, -126.0, -127.0, -200.0, 200.0])])
    _, got, _ = probes.run("probe_floats", "pppi", 1, 64, x, x.clone(), x.clone(), x.numel())
    want = torch.exp2(x)
    want[want < 2**-126] = 0
    torch.testing.assert_close(got, want, rtol=3e-7, atol=0)


@pytest.mark.parametrize("threads", [64, 256])
def test_a_block_reduces_with_shuffles_and_barriers(probes, threads):
    x, sums = draw(3, 1000), torch.zeros(3)
    _, got = probes.run("probe_sum", "ppi", 3, threads, x, sums, 1000, shared=threads // 8)
    torch.testing.assert_close(got, x.sum(1), rtol=1e-5, atol=1e-5)


def test_each_shuffle_reads_the_lane_it_should(probes):
    (out,) = probes.run("probe_shuffles", "p", 1, 32, torch.zeros(6, 32, dtype=torch.int32))
    lane = torch.arange(32)
    want = [
        torch.full((32,), 5),
        lane ^ 3,
        torch.where(lane < 28, lane + 4, lane),
        torch.where(lane >= 4, lane - 4, lane),
        lane // 8 * 8 + 2,
        torch.where(lane < 16, lane ^ 1, lane),
    ]
    assert torch.equal(out.long(), torch.stack(want))


def test_half_a_block_hands_over_to_the_other_at_named_barriers(probes):
    x = draw(8, 64)
    _, y = probes.run("probe_pipeline", "ppi", 1, 128, x, torch.zeros(8, 64), 8, shared=256)
    assert torch.equal(y, 2 * x)


def test_copies_arrive_and_fill_with_zeros(probes):
    x, y = draw(128), torch.full((256,), -1.0)
    _, y = probes.run("probe_copy", "ppii", 1, 64, x, y, 128, 1, shared=1024)
    assert torch.equal(y, torch.cat([x, torch.zeros(128)]))


def test_groups_of_copies_are_waited_for_one_by_one(probes):
    x = draw(16, 128)
    _, y = probes.run("probe_groups", "ppi", 1, 32, x, torch.zeros(16, 128), 16, shared=1536)
    assert torch.equal(y, x)


def test_indices_of_threads_and_blocks(probes):
    out = torch.zeros(3 * 2 * 2 * 2 * 4 * 8, dtype=torch.int32)
    (got,) = probes.run("probe_indices", "p", (2, 2, 3), (8, 4, 2), out)
    assert torch.equal(got.long(), torch.arange(out.numel()))


def test_dynamic_and_static_shared_memory_start_as_nan(emulated_probes):
    out = torch.zeros(2, 2, 32)
    emulated_probes.kernel("probe_uninitialised", "p", 128)(2, 32, out)
    assert out.isnan().all()


@pytest.mark.parametrize(
    "case, shared, text",
    [
        (
            0,
            0,
            r"threads wait for ever: 32 \(first: 0\) wait at __syncthreads \(line \d+\); 32 have",
        ),
        (1, 0, r"thread \(16, 0, 0\): the warp diverges: this lane is at __syncthreads"),
        (
            2,
            0,
            r"the warp diverges: this lane is at mma_f16 \(line \d+\), others are at __syncwarp",
        ),
        (3, 64, r"writes byte 64 of the dynamic shared memory, which has 64"),
        (3, 128, r"accesses byte 128 of the dynamic shared memory, which has 128.*probes.cu:\d+"),
        (4, 0, r"accesses byte 256 of argument 1 of probe_wrong \(float32 \[64\]\), which has 256"),
        (5, 0, r"argument 1 depends on the order in which threads run"),
        (
            6,
            1024,
            r"ldmatrix_x4 \(line \d+\): an address of shared memory that is no multiple of 16",
        ),
        (7, 0, r"ldmatrix_x4 \(line \d+\): the address is not in shared memory"),
        (8, 0, r"named_barrier_sync \(line \d+\): barrier 1 of 48 threads"),
        (9, 0, r"barrier 1 of 32 threads, others say 64"),
        (10, 0, r"misaligned access, a local array index out of bounds.*cuda_probes.cu:\d+"),
        (11, 0, r"__shfl_sync \(line \d+\): reads lane 20, which the mask 0x0000ffff lacks"),
        (12, 0, r"argument 1 depends on the order"),
    ],
)
def test_what_a_kernel_must_not_do_is_told(emulated_probes, case, shared, text):
    x = torch.zeros(64)
    kernel = emulated_probes.kernel("probe_wrong", "ipi", shared=shared)
    with pytest.raises(emulate.EmulationError, match=text):
        kernel(1, 64, case, x, shared)


def test_copies_read_before_they_were_waited_for_are_nan(emulated_probes):
    x, y = draw(128), torch.zeros(256)
    emulated_probes.kernel("probe_copy", "ppii", shared=1024)(1, 64, x, y, 128, 0)
    assert y.isnan().all()


def test_a_wrong_argument_list_is_refused(emulated_probes):
    with pytest.raises(ValueError, match="its arguments are 'ppi', the caller says 'pp'"):
        emulated_probes.kernel("probe_sum", "pp")
    with pytest.raises(ValueError, match="no kernel 'probe_none'"):
        emulated_probes.kernel("probe_none", "")
    kernel = emulated_probes.kernel("probe_sum", "ppi")
    with pytest.raises(ValueError, match="takes 3 arguments, got 2"):
        kernel(1, 32, draw(1), draw(1))
    with pytest.raises(ValueError, match="argument 2 is to be 'i'"):
        kernel(1, 32, draw(1), draw(1), draw(1))


@compiles
def test_a_library_is_compiled_once_for_each_text(tmp_path):
    source = tmp_path / "a.cu"
    source.write_text('extern "C" __global__ void f(int* x) { *x = N; }')
    first = emulate.load(source, {"N": 1}, tmp_path).path
    before = first.stat().st_mtime_ns
    assert emulate.load(source, {"N": 1}, tmp_path).path.stat().st_mtime_ns == before
    assert emulate.load(source, {"N": 2}, tmp_path).path != first
    assert len(list(tmp_path.glob("*.so"))) == 2
