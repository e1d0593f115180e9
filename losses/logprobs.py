"""Log-probabilities of given tokens: the one definition that training, reference files and
evaluation share."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv.gradients import leaves
from rwkv.ops.logit_scores import LogitScores, logit_gradient, read_logits, without_copies
from rwkv.recompute import recomputed
from rwkv.scattered import is_scattered, most_of_all_ranks

MAX_LOGITS = 2**26  # logits alive at once: 256 MiB in float32


class LanguageModel(Protocol):
    """What losses need of a model: hidden states from tokens, logits from hidden states."""

    def __call__(
        self, tokens: Tensor, state: object = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, object]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class TokenScores(NamedTuple):
    """What the losses need of the logits at n positions, each [n], float32.

    log_prob: log-probability of the target, in nats.
    mean_log_prob: mean log-probability over the whole vocabulary (label smoothing's other part).
    max_logit: the largest logit (L2Wrap's).
    hit: 1 where the target has the largest logit, else 0; without gradient.
    """

    log_prob: Tensor
    mean_log_prob: Tensor
    max_logit: Tensor
    hit: Tensor


def score_logits(logits: Tensor, targets: Tensor) -> TokenScores:
    """Score targets [n] under logits [n, V]; the softmax runs in float32 at least.

    A target below 0 scores nothing: all its scores are 0.

    `targets` are the inputs moved one to the left: the logits at position t score the token that
    follows t. No function below this one shifts again.
    """
    return TokenScores(*_Scores.apply(logits, targets))


class _Scores(torch.autograd.Function):
    """Reads the logits once; the backward pass reads them again and writes their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        read = read_logits(logits, targets.clamp_min(0))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets, *read)
        scores = _token_scores(read, targets)
        ctx.mark_non_differentiable(scores.hit)
        return tuple(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        logits, targets, *read = ctx.saved_tensors
        out = logits.new_empty(logits.shape)
        return _logit_gradient(logits.contiguous(), targets, LogitScores(*read), grads, out), None


def _token_scores(read: LogitScores, targets: Tensor) -> TokenScores:
    """In new memory, for a function's outputs may not share any with what it saves."""
    hit = (read.target >= read.largest).to(read.lse.dtype)
    scores = (read.target - read.lse, read.mean - read.lse, read.largest, hit)
    return TokenScores(*(torch.where(targets >= 0, score, 0.0) for score in scores))


def _logit_gradient(
    logits: Tensor,
    targets: Tensor,
    read: LogitScores,
    grads: Sequence[Tensor | None],
    out: Tensor,
) -> Tensor:
    """The logits' gradient into `out`, from that of the TokenScores; None for none."""
    by_target, by_mean, by_largest = (
        torch.zeros_like(read.lse) if grad is None else torch.where(targets >= 0, grad, 0.0)
        for grad in grads[:3]
    )
    return logit_gradient(
        logits,
        targets.clamp_min(0),
        read,
        target=by_target,
        mean=by_mean,
        lse=-(by_target + by_mean),
        largest=by_largest,
        out=out,
    )


def score_tokens(model: LanguageModel, hidden: Tensor, targets: Tensor) -> TokenScores:
    """Score targets [n] from hidden states [n, C], without ever holding all n x V logits."""
    return TokenScores(*map_logits(model, hidden, (targets,), score_logits))


def sum_scores(
    model: LanguageModel,
    hidden: Tensor,
    targets: Tensor,
    sums: Callable[[TokenScores], Tensor],
) -> Tensor:
    """What `sums` makes of the scores of targets [n] under hidden states [n, C], added up.

    The value is that of `sums(score_tokens(model, hidden, targets))`. The gradient is made in the
    forward pass, while a piece's logits are there: each number's gradient is known up to the one
    factor that comes from behind, so that the head does not run a second time.

    Args:
        model: whose head.
        hidden, targets: as for `score_tokens`.
        sums: (scores of m tokens) -> quantities [K] that add up over tokens; only the first has a
            gradient.

    Returns:
        the quantities, [K].
    """
    if not torch.is_grad_enabled() or is_scattered(model):
        return sums(score_tokens(model, hidden, targets))
    with _kept_as_it_is():
        probe = model.logits(hidden[:0].detach())
    total: Tensor = _Sums.apply(hidden, targets, model, sums, probe.detach(), *leaves(probe))
    return total


class _Sums(torch.autograd.Function):
    """sum_scores with its gradient; `parameters` are what the head trains."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        model: LanguageModel,
        sums: Callable[[TokenScores], Tensor],
        probe: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        wants_hidden = ctx.needs_input_grad[0]
        d_hidden = hidden.new_empty(hidden.shape) if wants_hidden else None
        d_parameters = [_zeros_like(parameter) for parameter in parameters]
        rows = _rows_of_a_piece(probe)
        total: Tensor | None = None
        for number, (some, right) in enumerate(
            zip(hidden.split(rows), targets.split(rows), strict=True)
        ):
            with torch.enable_grad(), _kept_as_it_is():
                piece = some.detach().requires_grad_(wants_hidden)
                logits = model.logits(piece)
            values = logits.detach()
            read = read_logits(values, right.clamp_min(0))
            with torch.enable_grad(), _kept_as_it_is():
                scores = _token_scores(read, right)
                fields = [field.requires_grad_() for field in scores[:3]]
                quantities = sums(scores)
                first = quantities[0]
            total = quantities.detach() if total is None else total + quantities.detach()
            if not logits.requires_grad:
                continue
            flows = torch.autograd.grad(first, fields, allow_unused=True)
            # nothing reads the logits any more, so their gradient takes their place
            _logit_gradient(values, right, read, flows, values)
            wanted = [*([piece] if wants_hidden else []), *parameters]
            found = list(torch.autograd.grad(logits, wanted, values))
            if d_hidden is not None:
                d_hidden[number * rows : number * rows + len(some)] = found.pop(0)
            for held, more in zip(d_parameters, found, strict=True):
                held.add_(more)
        assert total is not None
        ctx.save_for_backward(d_hidden, *d_parameters)
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, *d_parameters = ctx.saved_tensors
        factor = grad[0]
        if d_hidden is not None:  # in float32: in fewer bits the factor itself would be rounded
            wide = torch.promote_types(d_hidden.dtype, torch.float32)
            d_hidden = (d_hidden.to(wide) * factor).to(d_hidden.dtype)
        scaled = [(d * factor).to(t) for d, t in zip(d_parameters, ctx.dtypes, strict=True)]
        return d_hidden, None, None, None, None, *scaled


def _zeros_like(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


def _rows_of_a_piece(probe: Tensor) -> int:
    """Rows of logits at a time: four times as many where 2 bytes a logit are all they take.

    probe: logits [0, V].
    """
    small = probe.dtype.itemsize == 2 and without_copies(probe)
    return max(1, (4 if small else 1) * MAX_LOGITS // probe.shape[-1])


def _kept_as_it_is() -> Any:
    """Within the block autograd keeps tensors themselves, also inside a checkpoint.

    A checkpoint around would put them off until its second run, and a gradient taken at once would
    start that run in the middle of the first.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def map_logits(
    model: LanguageModel,
    hidden: Tensor,
    arguments: Sequence[Tensor],
    function: Callable[..., Sequence[Tensor]],
) -> tuple[Tensor, ...]:
    """Apply a function to the logits at n positions, without ever holding all n x V of them.

    The head runs on a piece of the positions at a time and runs again in the backward pass.

    Args:
        model: whose head.
        hidden: hidden states, [n, C].
        arguments: what the function takes beside the logits, each [n, ...].
        function: (logits [m, V], *arguments [m, ...]) -> tensors [m, ...], for any m.

    Returns:
        the function's tensors, each [n, ...].
    """
    V = int(model.logits(hidden[:0]).shape[-1])
    rows = max(1, MAX_LOGITS // V)

    def piece(h: Tensor, *some: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(model.logits(h), *some))

    tensors = (hidden, *arguments)
    parts = list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
    missing = most_of_all_ranks(len(parts), model, hidden.device) - len(parts)
    parts += [tuple(tensor[:0] for tensor in tensors)] * missing
    pieces = [recomputed(piece, *part, model=model) for part in parts]
    return tuple(torch.cat(field) for field in zip(*pieces, strict=True))


def at_places(x: Tensor, places: Tensor) -> Tensor:
    """Of x [B, T, ...] what lies at `places` [n], indices into B * T, [n, ...].

    The gradient of an index list adds rows; that of a mask would sort them first.
    """
    return x.flatten(0, 1).index_select(0, places)
