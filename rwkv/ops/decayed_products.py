"""Products between the tokens of a chunk, each weighted by the decay between the two.

For a reader x that sees the state before its own token, and for one that sees it after,

    before:  products[t, s] = sum_n x[t, n] z[s, n] d[s + 1, n] ... d[t - 1, n]    for s < t
    after:   products[t, s] = sum_n x[t, n] z[s, n] d[s + 1, n] ... d[t, n]        for s <= t

and 0 elsewhere. A matrix product needs the weight as a factor of t times a factor of s. Relative
to one point of the chunk, one of the two grows as exp(|log decay|) and overflows where decay is
strong. Here a chunk is halved again and again: for t in the upper and s in the lower half the
weight is (from the middle to t) times (from s to the middle), both at most 1. The halving ends at
blocks so short that one point serves; a single token in the worst case. No decay overflows or
loses digits, nor does the gradient of a decay, to which only pairs on both sides of it add.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv.ops.chunk_layout import ChunkLayout, Part, Room

# The most that a block around one point may use up: its factors stay within exp(20). In the
# gradient of its decays, terms of pairs on one side cancel, and leave exp(rate) times a float's
# last digit; so no block is shorter than 8 tokens (rates up to 2.5), but for single ones.
SPREAD, SHORTEST = 20.0, 8
LOG2_E = math.log2(math.e)  # on a CPU exp2 takes a fifth of the time of exp
NOTICED = 0.05  # of the rates' norm, that of rate exp(-rate): the error is then about 1e-6


def decay_rate(layout: ChunkLayout, part: Part, w: Tensor, room: Room) -> Tensor:
    """exp(w) of a part, 0 where not real, at most what makes exp(-exp(w)) 0, [P, C, N]."""
    P, C, N = part.rows.stop - part.rows.start, layout.C, w.shape[-1]
    rate = layout.chunks(w, part, room(P, C, N))
    limits = torch.finfo(rate.dtype)
    nothing = 1 - math.log(limits.tiny * limits.eps)
    rate.mul_(LOG2_E).exp2_().clamp_(max=nothing)
    if layout.real is not None:
        rate *= layout.real[part.rows]
    return rate


def decayed_products(
    readers: Tensor, written: Tensor, rate: Tensor, room: Room
) -> "CentredProducts | HalvedProducts":
    """The products of P chunks of C tokens, with their gradient, in the quickest right form.

    Args:
        readers: the reader of the state before its own token, and maybe after it the reader of the
            state after its own token, [P, X C, N], C a power of two; overwritten.
        written: what tokens add to the state, Z times, [P, Z C, N]; overwritten.
        rate: minus the natural log of what each token keeps, [P, C, N], >= 0, finite.
        room: for what the products need.
    """
    steps = _bounded(rate)
    if steps is None:
        return HalvedProducts(readers, written, rate)
    return CentredProducts(readers, written, rate, steps, room)


def _bounded(rate: Tensor) -> Tensor | None:
    """The rates, each at most as large as matters, if one point serves for a whole chunk.

    A share of exp(-LARGE) that a token keeps is nothing beside what it writes itself. Half a chunk
    may use up HALF: the factors then leave room for the values. And what is left of the decays'
    gradient where terms cancel, rate times a float's last digit, must be small beside the gradient
    itself, rate exp(-rate) and less: where nearly every rate is large it is not.
    """
    large, half = (20.0, 60.0) if rate.dtype == torch.float32 else (40.0, 500.0)
    C = rate.shape[1]
    if C == 1:
        return None
    if rate.max().item() <= SPREAD / C:
        return rate
    steps = rate.clamp(max=large)
    if steps.unflatten(1, (2, C // 2)).sum(2).max().item() > half:
        return None
    sample = steps.flatten()[:: max(1, steps.numel() // 8192)]
    sample = sample * (sample < large)
    left = sample * torch.exp(-sample)
    return steps if left.norm() > NOTICED * sample.norm() else None


class CentredProducts:
    """The products of chunks whose middle serves as the one point; attributes as HalvedProducts.

    steps: the rates as all but `kept` sees them; the gradient is that of these.
    """

    def __init__(self, readers: Tensor, written: Tensor, rate: Tensor, steps: Tensor, room: Room):
        P, C, N = rate.shape
        self.rate, self._C, self._room = steps, C, room
        up = room(P, C + 1, N)
        up[:, 0] = 0
        torch.cumsum(steps, 1, out=up[:, 1:])
        up.sub_(up[:, C // 2].unsqueeze(1).clone()).mul_(-LOG2_E).exp2_()
        self._x, self._z = readers, written
        self._ups = [up[:, :-1], up[:, 1:]][: readers.shape[1] // C]
        self._down = torch.reciprocal(up[:, 1:], out=room(P, C, N))
        self._start, self._end = up[:, :1].reciprocal(), up[:, -1:].clone()
        self._weigh(readers, written)
        products = torch.bmm(readers, written.mT, out=room(P, readers.shape[1], written.shape[1]))
        self.products = self._masked(products)
        self.entry = torch.mul(readers, self._start, out=room(*readers.shape))
        self.exit = torch.mul(written, self._end, out=room(*written.shape))
        self.kept = rate.sum(1).neg_().exp_()

    def backward(
        self, products: Tensor, entry: Tensor, exit: Tensor, kept: Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """As HalvedProducts; the arguments are overwritten, and `entry` and `exit` of this object.

        What is overwritten is in the caches still, new memory would not be.
        """
        products = self._masked(products)
        exit.mul_(self._end)
        total = (kept * self.kept).add_(torch.linalg.vecdot(exit, self._z, dim=1)).unsqueeze(1)
        dx = entry.mul_(self._start).baddbmm_(products, self._z)
        dz = exit.baddbmm_(products.mT, self._x)
        # A token's decay is in what all later tokens read, in what all earlier ones wrote, in the
        # total, and in what its own reader after read.
        reads = torch.mul(self._x, dx, out=self.entry).split(self._C, 1)
        own, *writes = torch.mul(self._z, dz, out=self.exit).split(self._C, 1)
        for write in writes:
            own.add_(write)
        if len(reads) > 1:
            own.sub_(reads[1])
        balance = reads[0].sub_(own)
        rate = torch.cumsum(balance, 1, out=self._room(*balance.shape))
        total += rate[:, -1:]
        rate.add_(own).sub_(total)
        self._weigh(dx, dz)
        return list(dx.split(self._C, 1)), list(dz.split(self._C, 1)), rate

    def _weigh(self, x: Tensor, z: Tensor) -> None:
        """Multiply readers and written, or their gradients, with their weights, in place."""
        for part, weight in zip(x.split(self._C, 1), self._ups, strict=True):
            part.mul_(weight)
        for part in z.split(self._C, 1):
            part.mul_(self._down)

    def _masked(self, products: Tensor) -> Tensor:
        """Zero where no pair is, also instead of infinity; in place."""
        C = self._C
        for i, rows in enumerate(products.split(C, 1)):
            for block in rows.split(C, 2):
                block.tril_(i - 1)
        return products


class HalvedProducts:
    """The products of chunks with any decay.

    Args:
        readers, written, rate: as of decayed_products; kept as they are.

    Attributes:
        products: as above, [P, X C, Z C], the reader before first.
        entry: the readers, weighted by the decay since the chunk's start, [P, X C, N]: what reads
            the state at the start.
        exit: the written, weighted by the decay until the chunk's end, [P, Z C, N]: what is left
            of them in the state at the end.
        kept: the share of the state that the whole chunk keeps, [P, N].
        rate: what the gradient of the rate is multiplied with for that of its logarithm, [P, C, N].
    """

    def __init__(self, readers: Tensor, written: Tensor, rate: Tensor):
        P, C, N = rate.shape
        self.rate = rate
        self._x, self._z = list(readers.split(C, 1)), list(written.split(C, 1))
        self._leaf = size = _leaf_size(rate)
        shape = P, len(self._x) * C, len(self._z) * C
        self.products = rate.new_empty(shape) if size == C else rate.new_zeros(shape)

        used = rate.unflatten(1, (-1, size)).cumsum(2)  # [P, blocks, size, N]
        middle = used[:, :, (size - 1) // 2]
        up = (middle.unsqueeze(2) - used).exp_()
        down = up.reciprocal()
        to_middle = torch.exp(-middle)  # [P, blocks, N]
        since = up * to_middle.unsqueeze(2)  # from the block's start through each token
        until = down * up[:, :, -1:]  # after each token to the block's end
        kept = since[:, :, -1].clone()
        self._within: _Pairs | None = None
        if size > 1 or len(self._x) > 1:
            # A block of one token may have a huge weight before it; its product is masked.
            up_before = _moved(up, to_middle.reciprocal().clamp_(max=math.exp(SPREAD)))
            self._within = _Pairs(
                _blocks(self._x, size),
                self._weights(up_before, up),
                _blocks(self._z, size),
                down,
            )
            self._mask = rate.new_ones(len(self._x), size, 1, size, 1)
            self._mask[0, :, 0, :, 0].tril_(-1)
            self._mask[1:, :, 0, :, 0].tril_()
            torch.mul(self._within.products(), self._mask, out=self._spots(self.products, size))

        entry = self._weights(_moved(since, torch.ones_like(kept)), since)
        self._across: list[_Pairs] = []
        while size < C:
            *entry, until, kept = (w.unflatten(1, (-1, 2)) for w in (*entry, until, kept))
            upper, lower = [weight[:, :, 1] for weight in entry], until[:, :, 0]
            pairs = _Pairs(
                _upper(self._x, size),
                [weight.clone() for weight in upper],
                _lower(self._z, size),
                lower.clone(),
            )
            self._spots(self.products, size, halves=True).copy_(pairs.products())
            self._across.append(pairs)
            for weight in upper:
                weight *= kept[:, :, :1]
            lower *= kept[:, :, 1:]
            *entry, until = (weight.flatten(2, 3) for weight in (*entry, until))
            kept = kept.prod(2)
            size *= 2

        self.kept = kept.squeeze(1)
        self._entry, self._exit = [weight.squeeze(1) for weight in entry], until.squeeze(1)
        self.entry = rate.new_empty(P, len(self._x) * C, N)
        self.exit = rate.new_empty(P, len(self._z) * C, N)
        for x, weight, out in zip(self._x, self._entry, self.entry.split(C, 1), strict=True):
            torch.mul(x, weight, out=out)
        for z, out in zip(self._z, self.exit.split(C, 1), strict=True):
            torch.mul(z, self._exit, out=out)

    def backward(
        self, products: Tensor, entry: Tensor, exit: Tensor, kept: Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The gradients of the readers, the written and the rate, from those of the attributes.

        The gradients of products that are 0 by definition are ignored.
        """
        C, size = entry.shape[1] // len(self._x), self._leaf
        dx = [d * weight for d, weight in zip(entry.split(C, 1), self._entry, strict=True)]
        dz = [d * self._exit for d in exit.split(C, 1)]
        # What hangs on the decays of a whole block: what comes into it and goes through it, then,
        # level by level, what goes from the upper into the lower half's tokens.
        total = (kept * self.kept).unsqueeze(1)  # [P, blocks, N]
        for level, pairs in reversed(list(enumerate(self._across))):
            half = size << level
            dx_upper, x_upper = _upper(dx, half), _upper(self._x, half)
            dz_lower, z_lower = _lower(dz, half), _lower(self._z, half)
            crossing = [_dot(dx_upper, x_upper).sum(2), _dot(dz_lower, z_lower).sum(2)]
            total = (total.unsqueeze(2) + torch.stack(crossing, dim=2)).flatten(1, 2)
            pairs.backward(self._spots(products, half, halves=True), dx_upper, dz_lower)
        if size == 1:
            total += self._own(dx)
        else:
            until = _dot(dz, self._z).unflatten(1, (-1, size)).sum(2)
        if self._within is not None:
            spots = self._spots(products, size) * self._mask
            self._within.backward(spots, _blocks(dx, size), _blocks(dz, size))
        if size == 1:  # where the pairs within blocks have no decay
            return dx, dz, total.neg_()
        # A token's decay is in what all later tokens read, in what all earlier tokens wrote, in the
        # total, and in what its own reader after read.
        read = _dot(dx, self._x).unflatten(1, (-1, size))
        written = _dot(dz, self._z).unflatten(1, (-1, size))
        balance = read - written
        total = (total + until + balance.sum(2)).unsqueeze(2)
        rate = balance.cumsum(2).add_(written).sub_(total).flatten(1, 2)
        return dx, dz, rate.sub_(self._own(dx))

    def _own(self, dx: list[Tensor]) -> Tensor | float:
        """The gradient of each log decay from the reader after that same token."""
        return _dot(dx[1:], self._x[1:]) if len(dx) > 1 else 0.0

    def _weights(self, before: Tensor, after: Tensor) -> list[Tensor]:
        """One a reader."""
        return [before, after][: len(self._x)]

    def _spots(self, products: Tensor, size: int, *, halves: bool = False) -> Tensor:
        """Where the pairs within blocks lie in `products`, or of upper with lower halves:
        [P, X, size, Z, size, blocks]."""
        split = (-1, 2, size) if halves else (-1, size)
        products = products.unflatten(2, (len(self._z), *split))
        products = products.unflatten(1, (len(self._x), *split))
        if halves:
            products = products[:, :, :, 1, :, :, :, 0]
        return products.diagonal(dim1=2, dim2=5)


class _Pairs:
    """Products of the tokens of some blocks with those of as many others.

    Args:
        x, z: the blocks, X and Z tensors [P, blocks, size, N].
        up, down: their weights; an `up` for each x.
    """

    def __init__(self, x: list[Tensor], up: list[Tensor], z: list[Tensor], down: Tensor):
        P, blocks, size, N = down.shape
        self._up, self._down = up, down
        self._x = down.new_empty(P, blocks, len(x), size, N)
        self._z = down.new_empty(P, blocks, len(z), size, N)
        for one, weight, out in zip(x, up, self._x.unbind(2), strict=True):
            torch.mul(one, weight, out=out)
        for one, out in zip(z, self._z.unbind(2), strict=True):
            torch.mul(one, down, out=out)

    def products(self) -> Tensor:
        """[P, X, size, Z, size, blocks]."""
        products = self._x.flatten(2, 3) @ self._z.flatten(2, 3).mT
        products = products.unflatten(3, self._z.shape[2:4]).unflatten(2, self._x.shape[2:4])
        return products.permute(0, 2, 3, 4, 5, 1)

    def backward(self, spots: Tensor, dx: list[Tensor], dz: list[Tensor]) -> None:
        """Add the gradients of x and z to dx and dz, from those of the products."""
        products = spots.permute(0, 5, 1, 2, 3, 4).flatten(4, 5).flatten(2, 3)
        x = (products @ self._z.flatten(2, 3)).view(self._x.shape).unbind(2)
        z = (products.mT @ self._x.flatten(2, 3)).view(self._z.shape).unbind(2)
        for total, one, weight in zip(dx, x, self._up, strict=True):
            total.addcmul_(one, weight)
        for total, one in zip(dz, z, strict=True):
            total.addcmul_(one, self._down)


def _leaf_size(rate: Tensor) -> int:
    """The longest halving of a chunk that may be a block around one point."""
    size, strongest = rate.shape[1], rate.max().item()
    while size * strongest > SPREAD and size > 1:
        size = size // 2 if size > SHORTEST else 1
    return size


def _moved(weight: Tensor, first: Tensor) -> Tensor:
    """Each token of a block gets the weight of the token before it, the first one `first`."""
    return torch.cat([first.unsqueeze(2), weight[:, :, :-1]], dim=2)


def _blocks(tensors: list[Tensor], size: int) -> list[Tensor]:
    return [x.unflatten(1, (-1, size)) for x in tensors]


def _upper(tensors: list[Tensor], size: int) -> list[Tensor]:
    return [x.unflatten(1, (-1, 2, size))[:, :, 1] for x in tensors]


def _lower(tensors: list[Tensor], size: int) -> list[Tensor]:
    return [x.unflatten(1, (-1, 2, size))[:, :, 0] for x in tensors]


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The sum of the products of the pairs, element by element."""
    total = one[0] * other[0]
    for x, y in zip(one[1:], other[1:], strict=True):
        total.addcmul_(x, y)
    return total
