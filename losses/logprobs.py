"""Log-probabilities of given tokens: the one definition that training, reference files and
evaluation share."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv.gradients import leaves
from rwkv.ops.logit_scores import Few, LogitScores, logit_gradient, read_logits, without_copies
from rwkv.recompute import recomputed
from rwkv.scattered import is_scattered, most_of_all_ranks

MAX_LOGITS = 2**26  # logits alive at once: 256 MiB in float32


class LanguageModel(Protocol):
    """What losses need of a model: hidden states from tokens, logits from hidden states."""

    def __call__(
        self,
        tokens: Tensor,
        state: object = None,
        cu_seqlens: Tensor | None = None,
        *,
        final_states: int | None = None,
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


class FewScores(NamedTuple):
    """What a divergence over few tokens needs of the logits at n positions, in float32.

    logits: of the few tokens, [n, k].
    tempered: log-sum-exp over the vocabulary of the logits divided by `temperature`, [n].
    temperature: a number.
    """

    logits: Tensor
    tempered: Tensor
    temperature: float


def score_logits(logits: Tensor, targets: Tensor, *, given_up: bool = False) -> TokenScores:
    """Score targets [n] under logits [n, V]; the softmax runs in float32 at least.

    A target below 0 scores nothing: all its scores are 0.

    `targets` are the inputs moved one to the left: the logits at position t score the token that
    follows t. No function below this one shifts again.

    Args:
        logits, targets: see above.
        given_up: write the gradient over the logits, which nothing else reads then; a second
            backward pass is an error.
    """
    return TokenScores(*_Scores.apply(logits, targets, None, None, given_up))


def score_few(
    logits: Tensor, targets: Tensor, ids: Tensor, temperature: float, *, given_up: bool = False
) -> tuple[TokenScores, FewScores]:
    """`score_logits` and the scores of some tokens [n, k] at each position, in one pass."""
    *scores, few, tempered = _Scores.apply(logits, targets, ids, temperature, given_up)
    return TokenScores(*scores), FewScores(few, tempered, temperature)


class _Scores(torch.autograd.Function):
    """Reads the logits once; the backward pass reads them again and writes their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        ids: Tensor | None,
        temperature: float | None,
        given_up: bool,
    ) -> tuple[Tensor, ...]:
        read = read_logits(logits, targets.clamp_min(0), temperature)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, targets, ids, *read)
        ctx.temperature, ctx.given_up = temperature, given_up
        scores = _token_scores(read, targets)
        ctx.mark_non_differentiable(scores.hit)
        if ids is None:
            return tuple(scores)
        assert read.tempered is not None
        return *scores, logits.gather(-1, ids).to(read.lse.dtype), read.tempered.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, targets, ids, *saved = ctx.saved_tensors
        read, logits = LogitScores(*saved), logits.detach().contiguous()
        by_target, by_mean, by_largest = (
            torch.zeros_like(read.lse) if grad is None else torch.where(targets >= 0, grad, 0.0)
            for grad in grads[:3]
        )
        few = None if ids is None else _few(read, ids, ctx.temperature, *grads[4:])
        gradient = logit_gradient(
            logits,
            targets.clamp_min(0),
            read,
            target=by_target,
            mean=by_mean,
            lse=-(by_target + by_mean),
            largest=by_largest,
            few=few,
            out=logits if ctx.given_up else torch.empty_like(logits),
        )
        if ctx.given_up:
            torch.autograd.graph.increment_version(logits)  # kernels write past autograd's eyes
        return gradient, None, None, None, None


def _token_scores(read: LogitScores, targets: Tensor) -> TokenScores:
    """In new memory, for a function's outputs may not share any with what it saves."""
    hit = (read.target >= read.largest).to(read.lse.dtype)
    scores = (read.target - read.lse, read.mean - read.lse, read.largest, hit)
    return TokenScores(*(torch.where(targets >= 0, score, 0.0) for score in scores))


def _few(
    read: LogitScores,
    ids: Tensor,
    temperature: float,
    by_logits: Tensor | None,
    by_tempered: Tensor | None,
) -> Few:
    """The gradients of FewScores as `logit_gradient` takes them; None for zeros."""
    if by_logits is None:
        by_logits = read.lse.new_zeros(ids.shape)
    return Few(
        torch.zeros_like(read.lse) if by_tempered is None else by_tempered,
        temperature,
        ids,
        by_logits,
    )


def score_tokens(model: LanguageModel, hidden: Tensor, targets: Tensor) -> TokenScores:
    """Score targets [n] from hidden states [n, C], without ever holding all n x V logits.

    The head runs again in the backward pass.
    """
    score = partial(score_logits, given_up=True)
    pieces = map_logits(model, hidden, (targets,), score)
    return TokenScores(*(torch.cat(field) for field in zip(*pieces, strict=True)))


def token_log_probs(model: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of targets [n] under hidden states [n, C], [n], in nats.

    Where the head does not train it runs once: each log-probability's gradient for its hidden
    state, [n, C], is made in the forward pass and kept for the factor from behind.
    """
    if torch.is_grad_enabled() and not is_scattered(model):
        probe = _probe(model, hidden)
        if not leaves(probe):
            log_prob = partial(_log_prob, given_up=True)
            rows = _rows_of_a_piece(probe, copies=False)
            found: Tensor = _AlongTheWay.apply(
                hidden, _Walk(model, (targets,), log_prob, rows, adds_up=False)
            )
            return found
    return score_tokens(model, hidden, targets).log_prob


def _log_prob(logits: Tensor, targets: Tensor, *, given_up: bool) -> Tensor:
    return score_logits(logits, targets, given_up=given_up).log_prob


def sum_over_tokens(
    model: LanguageModel,
    hidden: Tensor,
    arguments: Sequence[Tensor],
    function: Callable[..., Tensor],
    *,
    copies: bool = False,
) -> Tensor:
    """What a function makes of the logits at n positions, added up over pieces of them.

    The gradient is made in the forward pass, while a piece's logits are there: it is known up to
    the one factor that comes from behind, so that the head does not run a second time.

    Args:
        model: whose head.
        hidden: hidden states, [n, C].
        arguments: what the function takes beside the logits, each [n, ...].
        function: (logits [m, V], *arguments [m, ...]) -> quantities [K] that add up over
            positions, for any m; only the first has a gradient. The logits are the function's own:
            it may give them up, see `score_logits`.
        copies: whether the function copies its logits into float32, so that pieces are smaller.

    Returns:
        the quantities, [K].
    """
    if not torch.is_grad_enabled() or is_scattered(model):
        pieces = map_logits(model, hidden, arguments, function, copies=copies)
        return torch.stack(pieces).sum(dim=0)
    probe = _probe(model, hidden)
    walk = _Walk(model, arguments, function, _rows_of_a_piece(probe, copies), adds_up=True)
    total: Tensor = _AlongTheWay.apply(hidden, walk, *leaves(probe))
    return total


class _Walk(NamedTuple):
    """A walk over the positions, some at a time.

    model, arguments, function: as in `sum_over_tokens`; or, where nothing adds up, the function
        gives a number for each position, [m].
    rows: positions at a time.
    adds_up: whether the pieces' results are added, or joined.
    """

    model: LanguageModel
    arguments: Sequence[Tensor]
    function: Callable[..., Tensor]
    rows: int
    adds_up: bool


class _AlongTheWay(torch.autograd.Function):
    """A walk that makes its gradient as it goes; `parameters` are what the head trains.

    The gradient of a sum is known up to one factor, that of joined numbers up to one for each
    position: then the head may train nothing.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, walk: _Walk, *parameters: Tensor) -> Tensor:
        d_hidden = hidden.new_empty(hidden.shape) if ctx.needs_input_grad[0] else None
        d_parameters = [_zeros_like(parameter) for parameter in parameters]
        results = []
        tensors = (hidden, *walk.arguments)
        parts = zip(*(tensor.split(walk.rows) for tensor in tensors), strict=True)
        for number, (some, *given) in enumerate(parts):
            some = some.detach().requires_grad_(d_hidden is not None)
            result, gradients = _piece(walk, some, given, parameters)
            results.append(result)
            if d_hidden is not None:
                d_hidden[number * walk.rows :][: len(some)] = gradients[0]
            if gradients:
                for held, more in zip(d_parameters, gradients[d_hidden is not None :], strict=True):
                    held.add_(more)
        ctx.save_for_backward(d_hidden, *d_parameters)
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        ctx.adds_up = walk.adds_up
        return torch.stack(results).sum(dim=0) if walk.adds_up else torch.cat(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, *d_parameters = ctx.saved_tensors
        factor = grad[0] if ctx.adds_up else grad
        scaled = [(d * factor).to(t) for d, t in zip(d_parameters, ctx.dtypes, strict=True)]
        if d_hidden is None:
            return None, None, *scaled
        # a matrix, for by a number torch would multiply in the fewer bits of d_hidden
        out = torch.mul(d_hidden, factor.view(-1, 1), out=d_hidden.new_empty(d_hidden.shape))
        return out, None, *scaled


def _piece(
    walk: _Walk, hidden: Tensor, given: Sequence[Tensor], parameters: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """A piece's result, and the gradients of `hidden`, where it wants one, and the parameters."""
    with torch.enable_grad(), _kept_as_it_is():
        logits = walk.model.logits(hidden)
        values = logits.detach().requires_grad_(logits.requires_grad)
        result = walk.function(values, *given)
        counted = result[0] if walk.adds_up else result.sum()
    if not logits.requires_grad:
        return result, []
    (flow,) = torch.autograd.grad(counted, values)
    wanted = [x for x in (hidden, *parameters) if x.requires_grad]
    return result.detach(), list(torch.autograd.grad(logits, wanted, flow))


def _zeros_like(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


def _probe(model: LanguageModel, hidden: Tensor) -> Tensor:
    """Logits [0, V], whose history is the head's alone."""
    with _kept_as_it_is():
        return model.logits(hidden[:0].detach())


def _rows_of_a_piece(probe: Tensor, copies: bool) -> int:
    """Rows of logits at a time: four times as many where 2 bytes a logit are all they take.

    Args:
        probe: logits [0, V].
        copies: whether they are copied into float32.
    """
    small = probe.dtype.itemsize == 2 and not copies and without_copies(probe)
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
    function: Callable[..., Any],
    *,
    copies: bool = False,
) -> list[Any]:
    """What a function makes of the logits at n positions, piece by piece of them.

    The head runs on a piece of the positions at a time and runs again in the backward pass.

    Args:
        model, hidden, arguments, copies: as for `sum_over_tokens`.
        function: (logits [m, V], *arguments [m, ...]) -> any tensors, for any m; the logits are its
            own.

    Returns:
        what the function gave for each piece, in their order.
    """
    rows = _rows_of_a_piece(model.logits(hidden[:0]), copies)

    def piece(h: Tensor, *some: Tensor) -> Any:
        return function(model.logits(h), *some)

    tensors = (hidden, *arguments)
    parts = list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))
    missing = most_of_all_ranks(len(parts), model, hidden.device) - len(parts)
    parts += [tuple(tensor[:0] for tensor in tensors)] * missing
    return [recomputed(piece, *part, model=model) for part in parts]


def at_places(x: Tensor, places: Tensor) -> Tensor:
    """Of x [B, T, ...] what lies at `places` [n], indices into B * T, [n, ...].

    The gradient of an index list adds rows; that of a mask would sort them first.
    """
    return x.flatten(0, 1).index_select(0, places)
