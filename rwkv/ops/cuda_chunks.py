"""What the CUDA kernels of wkv6 and wkv7 share: sizes of chunks, where they lie, what they need."""

import torch
from torch import Tensor

from rwkv.ops import cuda_build
from rwkv.ops.packing import known

C = N = 64  # tokens of a chunk, channels of a head: cuda/tiles.cuh
TILE = 2 * C * N  # bytes
STAGES = 3  # chunks of a scan under way
# Below it a block of a scan owns 16 rows or columns of a head's state, from it on all 64: of the
# small blocks three share a multiprocessor, and four times 99 are all that run at once on 132.
FEW_HEADS = 100


def why_not(sample: Tensor, source: str, shared: int) -> str | None:
    """Why kernels cannot run, or None.

    Args:
        sample: one input.
        source: their file of cuda/, which is compiled where nothing else speaks against it.
        shared: bytes of shared memory of their largest block.
    """
    if sample.device.type != "cuda":
        return f"needs a GPU, the tensors are on {sample.device}"
    if sample.dtype != torch.bfloat16:
        return f"computes in bfloat16, the tensors are {sample.dtype}"
    if sample.shape[-1] != N:
        return f"handles heads of {N} channels, not {sample.shape[-1]}"
    if torch.cuda.get_device_capability(sample.device) < (8, 0):
        return "needs compute capability 8.0 or more"
    if reason := cuda_build.why_not():
        return reason
    if reason := cuda_build.too_small(sample.device, shared):
        return reason
    return cuda_build.refusal(source, cuda_build.index_of(sample.device))


def slot_owners(cu_seqlens: Tensor | None, slots: int) -> Tensor | None:
    """The text of every slot, [slots], int32, made on the device; None unless packed."""
    if cu_seqlens is None:
        return None

    def make() -> Tensor:
        texts = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
        starts = cu_seqlens[:-1] // C + texts
        slot = torch.arange(slots, device=cu_seqlens.device)
        return torch.searchsorted(starts, slot, right=True, out_int32=True) - 1

    return known(cu_seqlens, ("owners of slots", slots), make)
