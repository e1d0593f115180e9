"""Run a part of the model again in the backward pass instead of keeping its activations."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from rwkv.keeper import Keeper, Kept, first_run, second_run
from rwkv.offload import HostPlace
from rwkv.scattered import is_scattered


def recomputed(
    function: Callable[..., Any],
    *args: Any,
    model: Any,
    closed: bool = False,
    draws: bool = True,
    kept: Kept = Kept.SMALL,
    place: HostPlace | None = None,
) -> Any:
    """Return function(*args), keeping for the backward pass no more than the arguments.

    The gradient is that of a plain call: through all tensors in `args` (in named tuples and lists
    too), all that `function` reads besides, and all results. Calls may be nested. Without
    gradients this is the plain call.

    Args:
        function: what to run; random draws are repeated when it runs again.
        args: its arguments; the tensors among them stay alive until the backward pass.
        model: the module whose parameters `function` reads.
        closed: in the second run, leave out the results of linear layers that close their part:
            for a function in which nothing but the stream reads them.
        draws: whether `function` may draw random numbers; keeping the generators' states takes the
            host longer than launching some kernels.
        kept: of a closed function, results that are kept and not computed again. Not under ZeRO-3,
            which runs all of it again.
        place: where args[0] waits, in place of the device.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    # Given one by one: of tensors within other arguments a checkpoint keeps the first values alive
    # even where it is itself recomputed, or where hooks put what is kept elsewhere.
    flat, form = tree_flatten(args)

    def call(*again: Any) -> Any:
        return function(*tree_unflatten(list(again), form))

    contexts = _plain_contexts
    if closed:  # made before the hooks of `place` act: what the keeper keeps stays on the device
        contexts = partial(_closed_contexts, Keeper(kept))
    waiting: AbstractContextManager[Any] = contextlib.nullcontext()
    if place is not None:
        waiting = place.of_piece(*(x for x in tree_flatten(args[1:])[0] if isinstance(x, Tensor)))
    if not is_scattered(model):
        with waiting:
            return checkpoint(
                call, *flat, use_reentrant=False, context_fn=contexts, preserve_rng_state=draws
            )

    def run(*again: Any) -> Any:
        results, structure = tree_flatten(call(*again))
        places = [n for n, x in enumerate(results) if isinstance(x, Tensor) and x.requires_grad]
        if places:
            through = _RecomputeFirst.apply(*(results[n] for n in places))
            for n, x in zip(places, through, strict=True):
                results[n] = x
        return tree_unflatten(results, structure)

    # Stopping early would jump over DeepSpeed's hooks behind each module.
    with waiting:
        return checkpoint(
            run, *flat, use_reentrant=False, early_stop=False, context_fn=_scattered_contexts
        )


class _RecomputeFirst(torch.autograd.Function):
    """The identity; its backward pass asks for a saved tensor and so begins the recomputation.

    DeepSpeed gathers a module's parameters when the module's backward pass begins. A
    recomputation after that would run the module's forward pass in between, behind which
    DeepSpeed empties the parameters that the backward pass still has to read.
    """

    @staticmethod
    def forward(ctx: Any, *results: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(results[0])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        assert len(ctx.saved_tensors) == 1
        return grads


def _plain_contexts() -> tuple[Any, Any]:
    """What the first run and the second one are wrapped in."""
    return contextlib.nullcontext(), contextlib.nullcontext()


def _closed_contexts(keeper: Keeper) -> tuple[Any, Any]:
    return first_run(keeper), second_run(keeper)


def _scattered_contexts() -> tuple[Any, Any]:
    return contextlib.nullcontext(), _saving_values()


@contextlib.contextmanager
def _saving_values() -> Iterator[None]:
    """Within the block autograd saves what parameters hold now, not the parameters themselves.

    torch 2.13's checkpoint keeps frozen parameters as they are, and ZeRO-3 empties those again
    as soon as their module has run, before the backward pass reads them.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    assert hooks is not None
    pack, unpack = hooks
    with torch.autograd.graph.saved_tensors_hooks(lambda x: pack(x.detach()), unpack):
        yield
