"""Micro-batches as CUDA graphs: all kernels of a forward and backward pass in one launch.

A small micro-batch takes a GPU less time than Python takes to launch its kernels one by one. So
each shape of a micro-batch is run once as usual, recorded at its second coming, and replayed from
then on: the same kernels on the same numbers. To keep the shapes few, `padded` rounds up what
differs from one batch to the next: packed rows are full to some percent.

Graphs keep their memory, beside which shapes that are not recorded take theirs: so nothing is
recorded where a step's memory is not free once more.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rwkv.batch import TokenBatch
from rwkv.cli import say
from rwkv.gradients import leaves
from rwkv.offload import HostBuffers
from rwkv.ops.packing import remember_lengths, text_lengths

MOST = 16  # shapes that are recorded; others run as usual
SHARES = 8  # scored tokens are rounded up to an eighth of all
LEVELS, LARGEST_STEP = 8, 512  # tokens: to an eighth of the power of two below, or such a step
FEWEST_TEXTS = 8  # packed texts are rounded up to a power of two from here
UNSCORED = -1  # a target that scores nothing: see losses.logprobs


class _Recorded(NamedTuple):
    """A graph, where it reads its batch, the loss and metrics it writes, and what it trains."""

    graph: torch.cuda.CUDAGraph
    batch: TokenBatch
    loss: Tensor
    metrics: dict[str, Tensor]
    trained: list[nn.Parameter]


class GraphedSteps:
    """Runs `objective(model, batch)` and its backward pass as graphs, for TokenBatches.

    Every parameter's gradient is summed in a tensor that stays, for the graphs write to it. The
    graphs share their memory, on the device and of what is kept on the host, and run one after
    another.

    Args:
        model: on the GPU on which it trains, without random draws.
        objective: as LitModel has it.

    Attributes:
        failed: why nothing more is recorded; "" as long as all goes well.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]],
    ):
        self._model, self._objective = model, objective
        self._seen: set[Any] = set()
        self._recorded: dict[Any, _Recorded] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._pool: Any = None
        self._host = HostBuffers()
        self.failed = ""

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """What the objective gives for a micro-batch.

        After a replay the gradients are there already; the loss's backward pass, whose own
        gradient must be 1, hands them over to the parameters.
        """
        if self.failed and not self._recorded:
            return self._objective(self._model, batch)
        batch = padded(batch)
        recorded = self._recording(batch)
        if recorded is None:
            # nothing can be pinned while a graph is recorded: it finds this
            with contextlib.nullcontext() if self.failed else self._host:
                return self._objective(self._model, batch)
        for into, field in zip(recorded.batch, batch, strict=True):
            if into is not None and field is not None:
                into.copy_(field)
        self._begin(recorded.trained)
        recorded.graph.replay()
        metrics = {name: value.clone() for name, value in recorded.metrics.items()}
        anchor = recorded.loss.new_zeros((), requires_grad=True)
        loss: Tensor = _HandOver.apply(anchor, recorded.loss, self._sums, recorded.trained)
        return loss, metrics

    def _recording(self, batch: TokenBatch) -> _Recorded | None:
        """The graph of a batch's shape; None where it is to be run as usual."""
        key = tuple(None if field is None else field.shape for field in batch)
        if batch.places is None:
            return None
        if key in self._seen and key not in self._recorded and self._may_record():
            recorded = self._record(batch)
            if recorded is not None:
                self._recorded[key] = recorded
        self._seen.add(key)
        return self._recorded.get(key)

    def _may_record(self) -> bool:
        """Whether there is room for one more graph.

        What the first one takes is known at the beginning of the second step, when the optimizer
        has all that it holds.
        """
        if self.failed:
            return False
        if self._pool is not None:
            return len(self._recorded) < MOST
        if any(p.grad is not None for p in self._model.parameters()):
            return False
        self.failed = memory_missing()
        if self.failed:
            say(f"--cuda_graphs: {self.failed}; going on kernel by kernel")
        return not self.failed

    def _record(self, batch: TokenBatch) -> _Recorded | None:
        """Record the work on a batch, without doing it."""
        fields = batch._asdict().items()
        held = batch._replace(**{name: x.clone() for name, x in fields if x is not None})
        if held.cu_seqlens is not None and batch.cu_seqlens is not None:
            remember_lengths(held.cu_seqlens, text_lengths(batch.cu_seqlens))
        for parameter in self._model.parameters():
            if parameter.requires_grad and parameter not in self._sums:
                self._sums[parameter] = torch.zeros_like(parameter)
        before = {parameter: parameter.grad for parameter in self._sums}
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            for parameter, own in self._sums.items():
                parameter.grad = own
            # other threads, which load data, may pin memory meanwhile
            recording = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
            with self._host, recording:
                loss, metrics = self._objective(self._model, held)
                trained = [p for p in leaves(loss) if p in self._sums]
                loss.backward()
        except RuntimeError as error:
            self.failed = str(error).splitlines()[0]
            say(f"--cuda_graphs: this step cannot be recorded ({self.failed}); going on without")
            with torch.cuda.graph(torch.cuda.CUDAGraph()):  # lets go of the random generators
                torch.empty(1, device=batch.inputs.device)
            return None
        finally:
            for parameter, grad in before.items():
                parameter.grad = grad
        return _Recorded(graph, held, loss.detach(), metrics, trained)

    def _begin(self, trained: Sequence[nn.Parameter]) -> None:
        """Let the sums hold what the step's earlier micro-batches gave."""
        empty = []
        for parameter in trained:
            own = self._sums[parameter]
            if parameter.grad is None:
                empty.append(own)
            elif parameter.grad is not own:
                own.copy_(parameter.grad)
        if empty:
            torch._foreach_zero_(empty)


def memory_missing() -> str:
    """Why the memory of a step is not free once more, "" if it is; after a step that ran as usual.

    That step's memory is what torch holds for the next one.
    """
    held = torch.cuda.memory_reserved()
    step = held - torch.cuda.memory_allocated()
    free, total = torch.cuda.mem_get_info()
    free = min(free, int(total * torch.cuda.get_per_process_memory_fraction()) - held)
    if free >= step:
        return ""
    return f"a graph takes {step / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"


class _HandOver(torch.autograd.Function):
    """The loss of a replay; its backward pass lets parameters have the sums as gradients.

    Not before, for Lightning forgets all gradients between a step's first forward and backward
    pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        loss: Tensor,
        sums: dict[nn.Parameter, Tensor],
        trained: list[nn.Parameter],
    ) -> Tensor:
        ctx.sums, ctx.trained = sums, trained
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        for parameter in ctx.trained:
            parameter.grad = ctx.sums[parameter]
        return None, None, None, None


def padded(batch: TokenBatch) -> TokenBatch:
    """The batch with tokens and empty texts behind its texts, and places that score nothing.

    It gives the same loss and gradients. The numbers of tokens, of texts and of places are rounded
    up, so that few shapes are left.
    """
    if batch.places is None:
        return batch
    batch = _with_tokens(batch)
    places, borders, targets = batch.places, batch.cu_seqlens, batch.targets
    assert places is not None
    tokens = batch.inputs.numel()
    room = min(_rounded_up(len(places), -(-tokens // SHARES)), tokens)
    if room > len(places):
        unscored = (~batch.mask).flatten().to(torch.uint8).argmax()
        places = torch.cat([places, unscored.expand(room - len(places))])
        targets = torch.where(batch.mask, targets, UNSCORED)
    if borders is not None:
        texts = len(borders) - 1
        more = max(FEWEST_TEXTS, 1 << (texts - 1).bit_length()) - texts
        if more:
            lengths = text_lengths(borders)
            borders = torch.cat([borders, borders[-1:].expand(more)])
            remember_lengths(borders, lengths)
    return batch._replace(places=places, cu_seqlens=borders, targets=targets)


def _with_tokens(batch: TokenBatch) -> TokenBatch:
    """The batch with tokens behind each row, which are a text of their own where it is packed."""
    T = batch.inputs.shape[1]
    length = _rounded_up(T, max(1, min((1 << (T.bit_length() - 1)) // LEVELS, LARGEST_STEP)))
    if length == T:
        return batch
    inputs, targets, mask = (F.pad(field, (0, length - T)) for field in batch[:3])
    assert batch.places is not None
    borders, places = batch.cu_seqlens, batch.places
    if borders is None:
        places = places + places // T * (length - T)
    else:
        lengths = text_lengths(borders)
        borders = torch.cat([borders, borders[-1:] + (length - T)])
        remember_lengths(borders, [*lengths, length - T])
    return batch._replace(
        inputs=inputs, targets=targets, mask=mask, cu_seqlens=borders, places=places
    )


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
