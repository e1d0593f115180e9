"""Adding a product of low rank in one pass against torch: on a GPU, and in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="runs in another process")
pytestmark = pytest.mark.gpu if ON_GPU else []


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="runs the others where there is no GPU")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@kernels
@pytest.mark.parametrize("T, N, R", [(1, 16, 16), (130, 200, 64), (256, 128, 32), (3, 384, 128)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_added_in_place(T, N, R, transposed, dtype):
    from peft.lora import add_product

    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    g = torch.Generator().manual_seed(0)
    device = "cuda" if ON_GPU else "cpu"

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    out, low = draw(T, N), draw(T, R)
    factor = draw(N, R).T if transposed else draw(R, N)
    want = out.double() + low.double() @ factor.double()
    add_product(out, low, factor)
    assert_close("out", out, want, 1e-6 if dtype == torch.float32 else 4e-3)
