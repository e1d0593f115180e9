"""logit_scores in Triton: a program reads one row, or writes a block of one row's gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkv.ops.logit_scores import Few, LogitScores
from rwkv.ops.triton_chunks import narrow, widen

BLOCK = 8192  # logits at a time: four accesses of 16 bytes a thread
FIELDS = 5  # without a temperature


def read_logits(logits: Tensor, targets: Tensor, temperature: float | None) -> Tensor:
    """lse, target, mean, largest, ties and, at a temperature, tempered, [5 or 6, n], float32."""
    logits, targets = logits.contiguous(), targets.contiguous()
    n, V = logits.shape
    tempered = temperature is not None
    found = torch.empty(FIELDS + tempered, n, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _read_kernel[(n,)](
            logits,
            targets,
            found,
            n,
            V,
            1 / (temperature or 1.0),
            TEMPERED=tempered,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return found


def logit_gradient(
    logits: Tensor,
    targets: Tensor,
    scores: LogitScores,
    weights: Tensor,
    few: Few | None,
    out: Tensor,
) -> Tensor:
    """Write the gradient into `out`, which may be `logits`.

    weights: at the target, everywhere, by share, at the largest and, where there is `few`, by the
        share at the temperature, [4 or 5, n], float32.
    """
    if not (logits.is_contiguous() and out.is_contiguous()):
        raise ValueError("logit_gradient: logits and out must be contiguous; call contiguous()")
    n, V = logits.shape
    targets, lse = targets.contiguous(), scores.lse.contiguous()
    weights = weights.float().contiguous()
    # without `few` the kernel reads none of these
    tempered, ids, chosen, temperature, k = lse, targets, weights, 1.0, 0
    if few is not None:
        assert scores.tempered is not None
        tempered, temperature, k = scores.tempered.contiguous(), few.temperature, few.ids.shape[1]
        ids, chosen = few.ids.contiguous(), few.logits.float().contiguous()
    with torch.cuda.device_of(logits):
        _gradient_kernel[(n, triton.cdiv(V, BLOCK))](
            logits,
            targets,
            lse,
            scores.largest.contiguous(),
            weights,
            tempered,
            ids,
            chosen,
            out,
            n,
            V,
            k,
            1 / temperature,
            TEMPERED=few is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return out


@triton.jit
def _read_kernel(
    logits, targets, found, n, V, inverse, TEMPERED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * V
    largest, ties, share, total, tempered = -float("inf"), 0.0, 0.0, 0.0, 0.0
    for first in range(0, V, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < V
        z = widen(tl.load(start + at, mask=inside, other=-float("inf")))
        here = tl.max(z, axis=0)
        above = tl.maximum(largest, here)
        # of two equal infinities the difference would be NaN
        shift = tl.where(above == -float("inf"), 0.0, above)
        ties = tl.where(above > largest, 0.0, ties) + tl.sum(
            tl.where(inside & (z == above), 1.0, 0.0), axis=0
        )
        share = share * tl.exp(largest - shift) + tl.sum(tl.exp(z - shift), axis=0)
        if TEMPERED:
            tempered = tempered * tl.exp((largest - shift) * inverse) + tl.sum(
                tl.exp((z - shift) * inverse), axis=0
            )
        total += tl.sum(tl.where(inside, z, 0.0), axis=0)
        largest = above
    target = tl.load(start + tl.load(targets + row)).to(tl.float32)
    tl.store(found + row, largest + tl.log(share))
    tl.store(found + n + row, target)
    tl.store(found + 2 * n + row, total / V)
    tl.store(found + 3 * n + row, largest)
    tl.store(found + 4 * n + row, ties)
    if TEMPERED:
        tl.store(found + 5 * n + row, largest * inverse + tl.log(tempered))


@triton.jit
def _gradient_kernel(
    logits,
    targets,
    lse,
    largest,
    weights,
    tempered,
    ids,
    chosen,
    out,
    n,
    V,
    k,
    inverse,
    TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < V
    z = widen(tl.load(logits + row * V + at, mask=inside, other=0.0))
    at_target = tl.load(weights + row)
    everywhere = tl.load(weights + n + row)
    by_share = tl.load(weights + 2 * n + row)
    at_largest = tl.load(weights + 3 * n + row)
    gradient = everywhere + by_share * tl.exp(z - tl.load(lse + row))
    gradient += tl.where(z == tl.load(largest + row), at_largest, 0.0)
    gradient += tl.where(at == tl.load(targets + row), at_target, 0.0)
    if TEMPERED:
        by_tempered = tl.load(weights + 4 * n + row)
        gradient += by_tempered * tl.exp(z * inverse - tl.load(tempered + row))
        for i in range(0, k):
            token = tl.load(ids + row * k + i)
            if (token >= first) & (token < first + BLOCK):  # each token is in one block
                gradient += tl.where(at == token, tl.load(chosen + row * k + i), 0.0)
    tl.store(out + row * V + at, narrow(gradient, out.dtype.element_ty), mask=inside)
