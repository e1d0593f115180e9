"""What every store shares: a frozen weight in fewer bits, as buffers that no cast can change."""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from rwkv.cli import say
from rwkv.linear import matrix_product, rows_at_once


class Store(nn.Module):
    """A frozen weight [out, in] kept as codes and scales.

    A subclass gives `size`, `quantize` and `dense`; it may replace the two products by ones that
    work on the codes. Codes and scales are buffers of at least one dimension, outside the
    state_dict, listed by `tensors`.

    Attributes:
        kind: the word for its format, such as nf4.
        shape: of the weight, [out, in].
        dtype: of the weight it was made from.
        GROUP: consecutive weights that share a scale. Where a row is a whole number of groups,
            its codes and scales lie by themselves.
    """

    GROUP: int

    def __init__(self, kind: str, weight: Tensor):
        super().__init__()
        self.kind, self.shape, self.dtype = kind, tuple(weight.shape), weight.dtype
        self.keep(self.quantize(weight.detach()))

    @classmethod
    def restored(
        cls, kind: str, buffers: dict[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype
    ) -> "Store":
        """The store that `tensors` were taken from."""
        store = cls.__new__(cls)
        nn.Module.__init__(store)
        store.kind, store.shape, store.dtype = kind, shape, dtype
        store.keep(buffers)
        return store

    @staticmethod
    def size(kind: str, out_features: int, in_features: int) -> int:
        """Bytes that a weight [out, in] will occupy."""
        raise NotImplementedError

    @staticmethod
    def check_package() -> None:
        """Whether what the store needs is installed; asked before long work.

        Raises:
            RunError: it is not.
        """

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Codes and scales of a weight, by name."""
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], dequantized."""
        raise NotImplementedError

    def slices(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight, dequantized, [n, in], its rows in order and some at a time.

        All at once where a row is no whole number of groups.
        """
        height, width = self.shape
        count = height if width % self.GROUP else rows_at_once(width)
        if count >= height:
            yield self.dense(dtype)
            return
        for index in torch.arange(height, device=next(self.buffers()).device).split(count):
            yield self.some_rows(index).dense(dtype)

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the weight, dequantized to its dtype, [...] -> [..., in]."""
        width = self.shape[1]
        if width % self.GROUP:
            return self.dense(self.dtype)[index]
        return self.some_rows(index.flatten()).dense(self.dtype).view(*index.shape, width)

    def some_rows(self, index: Tensor) -> "Store":
        """A store of n rows, [n] -> [n, in], each a whole number of groups."""
        out_features, width = self.shape
        parts = {
            name: part.view(out_features, -1)[index].view(-1, *part.shape[1:])
            for name, part in self.tensors().items()
        }
        return self.restored(self.kind, parts, shape=(len(index), width), dtype=self.dtype)

    def adds_freely(self, x: Tensor) -> bool:
        """Whether products of x's kind add to a tensor without another pass over it."""
        return True

    def forward_product(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """x W^T, without history, [..., in] -> [..., out]: a new tensor, or `into` += it."""
        return matrix_product(x, self.dense(x.dtype).T, into)

    def backward_product(
        self, grad: Tensor, into: Tensor | None = None, *, of_logits: bool = False
    ) -> Tensor:
        """grad W, the gradient of the input, [..., out] -> [..., in]: likewise.

        of_logits: grad is that of logits: a row has one number near -1 and tens of thousands of
            small ones that together weigh as much.
        """
        return matrix_product(grad, self.dense(grad.dtype), into)

    def bytes(self) -> int:
        """Bytes that codes and scales occupy."""
        return sum(b.numel() * b.element_size() for b in self.buffers())

    def tensors(self) -> dict[str, Tensor]:
        """Codes and scales by name: all that a file needs to hold."""
        return dict(self.named_buffers())

    def keep(self, buffers: dict[str, Tensor]) -> None:
        """Hold codes and scales."""
        for name, value in buffers.items():
            self.register_buffer(name, value.contiguous(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Store":
        """Follow a move to a device, but no change of dtype.

        Lightning's bf16-true casts every float of a model; a rounded scale would change the
        weight. So each buffer is moved as bytes.
        """
        for name, value in self._buffers.items():
            assert value is not None
            self._buffers[name] = fn(value.view(torch.uint8)).view(value.dtype)
        return self

    def extra_repr(self) -> str:
        return f"{self.kind}, {list(self.shape)}"


def best_scale(tried: Tensor, wrong: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the scales tried for each block the one with the least squared error, [blocks, 1].

    Summed in float64, so that a GPU and a CPU choose alike.

    Args:
        tried: [blocks, scales].
        wrong: from one scale a block, [blocks, 1], to what each weight is off, [blocks, weights].
    """
    errors = [
        torch.linalg.vector_norm(wrong(scale), dim=1, keepdim=True, dtype=torch.float64)
        for scale in tried.split(1, dim=1)
    ]
    return tried.gather(1, torch.cat(errors, dim=1).argmin(dim=1, keepdim=True))


def fill(outs: Sequence[Tensor], parts: Iterable[Sequence[Tensor]]) -> None:
    """Write parts into `outs` along the first side, one behind the other, as they are made.

    Args:
        outs: what is to be filled.
        parts: the next of each, in their order; cast where dtypes differ.
    """
    places = [0] * len(outs)
    for made in parts:
        for i, (out, part) in enumerate(zip(outs, made, strict=True)):
            out[places[i] : places[i] + len(part)] = part
            places[i] += len(part)
        del made, part  # else they are there beside the next ones


def triton_kernels(module: str, kind: str, x: Tensor) -> ModuleType | None:
    """A module of Triton kernels for x's device; None on a CPU, and where Triton is missing.

    That is said once: plain torch then does the same on a GPU in more passes over the weight.

    Args:
        module: its full name.
        kind: the storage that needs it, for the message.
        x: what the kernels shall read.
    """
    return _imported(module, kind) if x.is_cuda else None


@cache
def _imported(module: str, kind: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        say(f"{kind}: runs slower without its Triton kernels ({error}); pip install triton")
        return None
