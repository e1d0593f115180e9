"""Results of a part that runs again in the backward pass, kept so that they are computed once."""

import functools
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from enum import IntEnum
from typing import Any, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")
Results = tuple[Tensor, ...]


class Kept(IntEnum):
    """How much a recomputed part keeps, the cheapest for its size first."""

    LAST = 0  # products of low rank of the layer that is left out in the second run
    SMALL = 1  # and all others of low rank
    PRODUCTS = 2  # and the results of its large products
    ALL = 3  # and those of wkv


class Keeper:
    """What one recomputed part hands from its first run to its second one.

    The values are detached and taken in the order in which they were kept, each freed as it is
    taken. A third run, of a graph that was retained, finds none and computes. Where the part lies
    within another one that is recomputed, values are kept as that one keeps what autograd saves,
    so that they live no longer than its own activations.

    Args:
        most: what is kept.
    """

    def __init__(self, most: Kept):
        self.most = most
        self._kept: deque[list[Any]] = deque()
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._pack, self._unpack = hooks or (_same, _same)

    def keep(self, results: Results) -> Results:
        """Keep the next results, and return them."""
        self._kept.append([self._pack(x.detach()) for x in results])
        return results

    def take(self) -> Results | None:
        """The next results; None where there are no more."""
        return tuple(self._unpack(x) for x in self._kept.popleft()) if self._kept else None

    def empty(self) -> None:
        """Free what was not taken."""
        self._kept.clear()


class first_run:  # noqa: N801  # a context manager, named like those of contextlib
    """Within the block, which runs a part for the first time, results are kept."""

    second = False

    def __init__(self, keeper: Keeper):
        self.keeper = keeper

    def __enter__(self) -> None:
        self._before = _run.set(self)

    def __exit__(self, *_: object) -> None:
        _run.reset(self._before)


class second_run(first_run):  # noqa: N801
    """Within the block they are taken in place of being computed. It may be entered again."""

    second = True

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.keeper.empty()


_run: ContextVar[first_run | None] = ContextVar("run", default=None)


def kept_results(compute: Callable[[], Results], kept: Kept) -> Results:
    """compute(), or what it gave in the first run of the part that is being recomputed.

    To be called where nothing has a history, as in the forward pass of an autograd function: the
    values carry none. Nobody may write to them.

    Args:
        compute: gives new tensors, the same in both runs.
        kept: from where on they are.
    """
    run = _run.get()
    if run is None or run.keeper.most < kept:
        return compute()
    if not run.second:
        return run.keeper.keep(compute())
    taken = run.keeper.take()
    return compute() if taken is None else taken


def in_second_run() -> bool:
    """Whether a part runs again: the values of this run go nowhere but into gradients."""
    run = _run.get()
    return run is not None and run.second


def kept_result(compute: Callable[[], Tensor], kept: Kept = Kept.PRODUCTS) -> Tensor:
    """`kept_results` of one tensor."""
    (result,) = kept_results(lambda: (compute(),), kept)
    return result


def keeping(function: Callable[P, Results]) -> Callable[P, Results]:
    """A wkv operator, giving y, S_T and more, whose results are kept as by `kept_results`.

    Of S_T only the shape is kept: in the second run something of that shape stands in its place,
    for nothing reads it there.
    """

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> Results:
        computed: list[Results] = []

        def compute() -> Results:
            computed.append(function(*args, **options))
            y, final, *own = computed[0]
            return y, final.new_empty(()).expand_as(final), *own

        taken = kept_results(compute, Kept.ALL)
        return computed[0] if computed else taken

    return run


def _same(x: Tensor) -> Tensor:
    return x
