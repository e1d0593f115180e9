"""The emulator that runs CUDA sources on the CPU: its tensor-core products and matrix loads against
torch, its numbers against torch's, and that it finds what a kernel must not do."""

from pathlib import Path

import emulate
import pytest
import torch

PROBES = Path(__file__).parent / "cuda_probes.cu"

pytestmark = pytest.mark.skipif(bool(emulate.why_not()), reason=str(emulate.why_not()))


@pytest.fixture(scope="module")
def probes(emulated) -> emulate.Library:
    return emulated(PROBES, {})


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_products_of_16_bit_fragments_equal_torch(probes, dtype):
    a, b, c = draw(16, 16).to(dtype), draw(16, 8, seed=1).to(dtype), draw(16, 8, seed=2)
    want = a.double() @ b.double() + c.double()
    probes.kernel(f"probe_mma_{'f16' if dtype == torch.float16 else 'bf16'}", "ppp")(1, 32, a, b, c)
    torch.testing.assert_close(c.double(), want, rtol=1e-6, atol=1e-6)


def test_products_of_tf32_fragments_equal_torch(probes):
    a, b, c = draw(16, 8), draw(8, 8, seed=1), draw(16, 8, seed=2)
    cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b)]
    want = cut[0] @ cut[1] + c.double()
    probes.kernel("probe_mma_tf32", "ppp")(1, 32, a, b, c)
    torch.testing.assert_close(c.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("count", [2, 4])
def test_matrix_loads_give_each_lane_its_pair(probes, count, transposed):
    matrices = torch.arange(count * 64, dtype=torch.int16).view(count, 8, 8)
    out = torch.full((count, 32, 2), -1, dtype=torch.int16)
    suffix = "_trans" if transposed else ""
    probes.kernel(f"probe_ldmatrix_x{count}{suffix}", "pp")(1, 32, matrices, out)
    want = matrices.mT if transposed else matrices
    assert torch.equal(out, want.reshape(count, 32, 2))


@pytest.mark.parametrize("stride, conflicts", [(64, 28), (72, 0)])
def test_bank_conflicts_of_matrix_loads_are_counted(probes, stride, conflicts):
    """Rows of 128 bytes lie in the same banks: seven of eight wait; 144 bytes spread them."""
    rows = torch.zeros(32, stride, dtype=torch.int16)
    probes.kernel("probe_conflicts", "pi", shared=32 * stride * 2)(1, 32, rows, stride)
    assert probes.conflicts == conflicts


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
    bits, back = torch.empty(n, dtype=dtype), torch.empty(n)
    pairs, unpacked = torch.empty(n, 2, dtype=dtype), torch.empty(n, 2)
    name = "probe_f16" if dtype == torch.float16 else "probe_bf16"
    probes.kernel(name, "pppppi")(4, 64, ROUNDED, bits, back, pairs, unpacked, n)
    want = ROUNDED.to(dtype)
    assert torch.equal(bits.view(torch.int16), want.view(torch.int16))
    assert torch.equal(back, want.float())
    assert torch.equal(pairs, torch.stack([want, -want], 1))
    assert torch.equal(unpacked, pairs.float())


def test_nan_stays_nan(probes):
    x = torch.full((1,), float("nan"))
    for name, dtype in (("probe_f16", torch.float16), ("probe_bf16", torch.bfloat16)):
        bits, back = torch.zeros(1, dtype=dtype), torch.zeros(1)
        pairs, unpacked = torch.zeros(1, 2, dtype=dtype), torch.zeros(1, 2)
        probes.kernel(name, "pppppi")(1, 32, x, bits, back, pairs, unpacked, 1)
        assert all(y.isnan().all() for y in (bits, back, pairs, unpacked))


@pytest.mark.parametrize("threads", [64, 256])
def test_a_block_reduces_with_shuffles_and_barriers(probes, threads):
    x, sums = draw(3, 1000), torch.zeros(3)
    probes.kernel("probe_sum", "ppi", shared=threads // 32 * 4)(3, threads, x, sums, 1000)
    torch.testing.assert_close(sums, x.sum(1), rtol=1e-5, atol=1e-5)


def test_each_shuffle_reads_the_lane_it_should(probes):
    out = torch.full((6, 32), -1, dtype=torch.int32)
    probes.kernel("probe_shuffles", "p")(1, 32, out)
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
    x, y = draw(8, 64), torch.zeros(8, 64)
    probes.kernel("probe_pipeline", "ppi", shared=64 * 4)(1, 128, x, y, 8)
    assert torch.equal(y, 2 * x)


def test_copies_arrive_and_fill_with_zeros(probes):
    x, y = draw(128), torch.full((256,), -1.0)
    probes.kernel("probe_copy", "ppii", shared=1024)(1, 64, x, y, 128, 1)
    assert torch.equal(y, torch.cat([x, torch.zeros(128)]))


def test_indices_of_threads_and_blocks(probes):
    out = torch.zeros(3, 2, 2, 2, 4, 8, dtype=torch.int32)
    probes.kernel("probe_indices", "p")((2, 2, 3), (8, 4, 2), out)
    want = torch.arange(out.numel()).view(-1).to(torch.int32)
    assert torch.equal(out.view(-1), want)


def test_dynamic_and_static_shared_memory_start_as_nan(probes):
    out = torch.zeros(2, 2, 32)
    probes.kernel("probe_uninitialised", "p", shared=128)(2, 32, out)
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
def test_what_a_kernel_must_not_do_is_told(probes, case, shared, text):
    x = torch.zeros(64)
    kernel = probes.kernel("probe_wrong", "ipi", shared=shared)
    with pytest.raises(emulate.EmulationError, match=text):
        kernel(1, 64, case, x, shared)


def test_copies_read_before_they_were_waited_for_are_nan(probes):
    x, y = draw(128), torch.zeros(256)
    probes.kernel("probe_copy", "ppii", shared=1024)(1, 64, x, y, 128, 0)
    assert y.isnan().all()


def test_a_wrong_argument_list_is_refused(probes):
    with pytest.raises(ValueError, match="its arguments are 'ppi', the caller says 'pp'"):
        probes.kernel("probe_sum", "pp")
    with pytest.raises(ValueError, match="no kernel 'probe_none'"):
        probes.kernel("probe_none", "")
    kernel = probes.kernel("probe_sum", "ppi")
    with pytest.raises(ValueError, match="takes 3 arguments, got 2"):
        kernel(1, 32, draw(1), draw(1))
    with pytest.raises(ValueError, match="argument 2 is to be 'i'"):
        kernel(1, 32, draw(1), draw(1), draw(1))


def test_a_library_is_compiled_once(tmp_path):
    before = emulate.load(PROBES, {}, tmp_path).path.stat().st_mtime_ns
    assert emulate.load(PROBES, {}, tmp_path).path.stat().st_mtime_ns == before
    assert len(list(tmp_path.glob("*.so"))) == 1
    emulate.load(PROBES, {"UNUSED": 1}, tmp_path)
    assert len(list(tmp_path.glob("*.so"))) == 2
