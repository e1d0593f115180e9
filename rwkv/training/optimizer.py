"""The optimizer of a run, and float32 masters for parameters of fewer bits."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkv.errors import RunError
from rwkv.ops.fused import has_kernels, uses_kernels
from rwkv.training.flags import OptimizerFlags

BITSANDBYTES = ("adamw8bit", "adam8bit", "lion")  # optimizers that come from there
SLICE = 2**25  # numbers that are stepped at once: 128 MiB of gradients in float32


class MasterWeights(Optimizer):
    """Runs an optimizer on float32 copies of bfloat16 parameters.

    A bfloat16 weight has 8 bits of mantissa, so that an update below 1/256 of it is lost; the
    copy keeps it. Float32 parameters are handed to the optimizer as they are. `FusedAdamW` reads
    the gradients as they are and writes the parameters. With any other optimizer a step goes slice
    by slice, for only one slice's gradients then lie in float32; it must treat each tensor by
    itself.

    Args:
        groups: parameter groups, as for any torch optimizer.
        make: builds the inner optimizer from groups of float32 tensors.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], make: Callable[[list[dict[str, Any]]], Optimizer]
    ):
        groups = [dict(group, params=list(group["params"])) for group in groups]
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._masters: dict[int, Tensor] = {}
        self._own: list[Tensor] = []
        self._factor: Tensor | None = None
        inner_groups = []
        for group in groups:
            copies = [self._master(parameter) for parameter in group["params"]]
            inner_groups.append(dict(group, params=copies))
        self.inner = make(inner_groups)
        super().__init__(groups, {})
        # one object, so that a rate set here is the rate used there
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            for key, value in inner.items():
                if key != "params":
                    outer.setdefault(key, value)

    def _master(self, parameter: Tensor) -> Tensor:
        if parameter.dtype == torch.float32:
            self._own.append(parameter)
            return parameter
        copy = parameter.detach().float().requires_grad_()
        self._pairs.append((parameter, copy))
        self._masters[id(parameter)] = copy
        return copy

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner["lr"] = outer["lr"]
        factor, self._factor = self._factor, None
        if isinstance(self.inner, FusedAdamW):
            self.inner.step_along([group["params"] for group in self.param_groups], factor)
        else:
            self._step_slices(factor)
        return loss

    def _step_slices(self, factor: Tensor | None) -> None:
        own = [p.grad for p in self._own if p.grad is not None]
        if own and factor is not None:
            torch._foreach_mul_(own, factor)
        for pairs in slices([pair for pair in self._pairs if pair[0].grad is not None]):
            wide = [torch.empty_like(copy) for _, copy in pairs]
            grads = [p.grad for p, _ in pairs if p.grad is not None]
            _copy_all(zip(wide, grads, strict=True))
            if factor is not None:
                torch._foreach_mul_(wide, factor)
            for _, copy in pairs:
                copy.grad = wide.pop(0)
            with self._own_at_rest():
                self.inner.step()
            for _, copy in pairs:
                copy.grad = None
            _copy_all(pairs)
        if own:
            self.inner.step()

    def clip(self, norm: Tensor, limit: float) -> None:
        """Let the next step shorten the gradients to a norm of `limit`.

        They are multiplied in float32, on their way to the optimizer.

        Args:
            norm: of all gradients, a float32 scalar.
        """
        self._factor = (limit / (norm + 1e-6)).clamp(max=1.0)

    @contextlib.contextmanager
    def _own_at_rest(self) -> Iterator[None]:
        """Within the block parameters without a copy have no gradient: nothing steps them."""
        held = [p.grad for p in self._own]
        for p in self._own:
            p.grad = None
        yield
        for p, grad in zip(self._own, held, strict=True):
            p.grad = grad

    def master(self, parameter: Tensor) -> Tensor:
        """The tensor that the inner optimizer steps for a parameter: its copy, or itself."""
        return self._masters.get(id(parameter), parameter)


class FusedAdamW(Optimizer):
    """AdamW for MasterWeights in one kernel; see rwkv/ops/many_tensors_triton.py.

    For each number that trains in bfloat16 a step moves 28 bytes: float32 weight and means in and
    out, the gradient in, the parameter out.

    Args:
        groups: of float32 tensors.
        lr, betas, eps: AdamW's; `lr` and `weight_decay` may be in the groups too.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError("FusedAdamW steps along with MasterWeights' parameters")

    @torch.no_grad()
    def step_along(self, owners: Sequence[Sequence[Tensor]], factor: Tensor | None) -> None:
        """Step all that have a gradient.

        Args:
            owners: of each group, the parameters that have the gradients and are written, in the
                order of the group's tensors.
            factor: what gradients are multiplied by, a float32 scalar; None for 1.
        """
        from rwkv.ops.many_tensors_triton import Moments, adamw

        betas, eps = self.defaults["betas"], self.defaults["eps"]
        work: dict[torch.dtype, list[Moments]] = {}
        for group, parameters in zip(self.param_groups, owners, strict=True):
            lr, decay = group["lr"], 1.0 - group["lr"] * group["weight_decay"]
            factors: dict[int, tuple[float, float, float]] = {}
            for parameter, master in zip(parameters, group["params"], strict=True):
                if parameter.grad is None:
                    continue
                state = self.state[master]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(master)
                    state["exp_avg_sq"] = torch.zeros_like(master)
                state["step"] = step = state["step"] + 1
                if step not in factors:
                    first, second = (1.0 - beta**step for beta in betas)
                    factors[step] = (lr / first, second**-0.5, decay)
                work.setdefault(parameter.dtype, []).append(
                    Moments(
                        parameter,
                        parameter.grad.contiguous(),
                        master,
                        state["exp_avg"],
                        state["exp_avg_sq"],
                        *factors[step],
                    )
                )
        for some in work.values():
            adamw(some, factor, betas=betas, eps=eps)


def slices(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Neighbouring pairs of together at most SLICE numbers, or one larger pair."""
    some: list[tuple[Tensor, Tensor]] = []
    size = 0
    for pair in pairs:
        more = pair[0].numel()
        if some and size + more > SLICE:
            yield some
            some, size = [], 0
        some.append(pair)
        size += more
    if some:
        yield some


def _copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first, all in a few kernels."""
    pairs = list(pairs)
    if pairs:  # torch refuses empty lists
        torch._foreach_copy_([into for into, _ in pairs], [source for _, source in pairs])


def make_optimizer(
    groups: Sequence[dict[str, Any]], flags: OptimizerFlags, *, strategy: str, on_gpu: bool
) -> Optimizer:
    """Build the optimizer that the flags and the strategy ask for.

    Args:
        groups: dicts with `params`, `lr`, `weight_decay` and what callbacks add.
        flags: --optim and its numbers.
        strategy: under DeepSpeed its own Adam is used: fused, or on the CPU with offload.
        on_gpu: whether the parameters lie on a GPU.

    Raises:
        RunError: the package that the optimizer needs is missing.
    """
    make = _maker(flags, strategy=strategy, on_gpu=on_gpu)
    if strategy.startswith("deepspeed"):  # keeps float32 masters itself
        return make(list(groups))
    return MasterWeights(groups, make)


def _maker(
    flags: OptimizerFlags, *, strategy: str, on_gpu: bool
) -> Callable[[list[dict[str, Any]]], Optimizer]:
    betas, eps = (flags.beta1, flags.beta2), flags.adam_eps
    kind = flags.optim.lower()
    if kind in BITSANDBYTES:
        try:
            import bitsandbytes.optim as bnb
        except ImportError as error:
            raise _missing(flags, error) from None
        if kind == "lion":
            return lambda groups: bnb.Lion(groups, lr=flags.lr_init, betas=betas)
        cls = bnb.AdamW8bit if kind == "adamw8bit" else bnb.Adam8bit
        return lambda groups: cls(groups, lr=flags.lr_init, betas=betas, eps=eps)
    if strategy.endswith("offload"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return lambda groups: DeepSpeedCPUAdam(
            groups, lr=flags.lr_init, betas=betas, eps=eps, adamw_mode=True
        )
    if strategy.startswith("deepspeed") and on_gpu and kind == "":
        from deepspeed.ops.adam import FusedAdam

        return lambda groups: FusedAdam(
            groups, lr=flags.lr_init, betas=betas, eps=eps, adam_w_mode=True
        )
    if on_gpu and has_kernels(torch.device("cuda", torch.cuda.current_device())):
        return lambda groups: FusedAdamW(groups, lr=flags.lr_init, betas=betas, eps=eps)
    return lambda groups: torch.optim.AdamW(
        groups, lr=flags.lr_init, betas=betas, eps=eps, fused=on_gpu or None
    )


def check_optimizer(flags: OptimizerFlags) -> None:
    """Whether the package that --optim needs is installed; asked before long work.

    Raises:
        RunError: it is not.
    """
    if flags.optim.lower() in BITSANDBYTES and find_spec("bitsandbytes") is None:
        raise _missing(flags, "it is not installed")


def _missing(flags: OptimizerFlags, why: object) -> RunError:
    return RunError(f"--optim {flags.optim}: needs bitsandbytes ({why}); pip install bitsandbytes")


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients together, a float32 scalar."""
    gradients: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            gradients.setdefault(parameter.dtype, []).append(parameter.grad)
    if not gradients:
        return torch.zeros(())
    if all(uses_kernels(some[0]) for some in gradients.values()):
        from rwkv.ops.many_tensors_triton import squares

        parts = [squares([x.contiguous() for x in some]) for some in gradients.values()]
        return torch.cat(parts).sum().sqrt()
    return sum_of_squares([x for some in gradients.values() for x in some]).sqrt()


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Of all numbers of some tensors, on one device, a float32 scalar."""
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).square().sum()
