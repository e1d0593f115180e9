"""Which learning rate and weight decay each trained parameter gets."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from peft.plan import PREFIX, STATE, Plan, trained_sizes
from peft.registry import ADAPTERS
from rwkv.errors import InputError
from rwkv.init import is_decayed, learning_rate_factor
from rwkv.training.flags import OptimizerFlags


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one schedule.

    name: what they are, for logs: emb, head, weights, adapters, small, state, prefix.
    names, params: full names and the parameters, in one order.
    lr_init, lr_final, weight_decay: as the optimizer and its schedule take them.
    """

    name: str
    names: Sequence[str]
    params: Sequence[nn.Parameter]
    lr_init: float
    lr_final: float
    weight_decay: float


def nothing_trains(plan: Plan) -> InputError:
    """The error of a plan under which there is nothing to do."""
    return InputError(
        f"{plan.flags.layer_profile or 'no profile'}: nothing trains; "
        "set a mode other than freeze for some layer, or tune the state"
    )


def parameter_groups(model: nn.Module, plan: Plan, flags: OptimizerFlags) -> list[ParameterGroup]:
    """Sort what trains into groups of equal rates.

    A layer's rates are its profile's where it has them and --lr_advanced holds, else the flags'.
    The decay's offset learns twice as fast, lora_B --lora_plus_ratio times as fast. Weight decay
    applies to matrices and adapters, never to norms, vectors, a tuned state or a prefix, which has
    the rates of the first block's state.

    Raises:
        InputError: nothing trains.
    """
    found: dict[tuple[float, float, float], list[tuple[str, str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind, rates = _rates(name, parameter, plan, flags)
            found.setdefault(rates, []).append((kind, name, parameter))
    if not found:
        raise nothing_trains(plan)
    groups = []
    for (lr_init, lr_final, decay), members in found.items():
        kinds, names, params = zip(*members, strict=True)
        label = "+".join(dict.fromkeys(kinds))
        groups.append(ParameterGroup(label, names, params, lr_init, lr_final, decay))
    return groups


def unheard_rates(plan: Plan, flags: OptimizerFlags, *, tuned_state: bool) -> list[str]:
    """A line for each rate of the flags that the profile overrules for all that trains.

    tuned_state: states train too, or a prefix, which are of no weight decay.
    """
    if not flags.lr_advanced:
        return []
    trained = [plan.plans[name] for name in plan.layers if trained_sizes(plan, name)]
    states = [plan.plans[name] for name in plan.layers if plan.layers[name].kind == "state"]
    lines = []
    for rate in ("lr_init", "lr_final", "weight_decay"):
        value = getattr(flags, rate)
        own = [getattr(mine, rate) for mine in trained]
        if tuned_state and rate != "weight_decay":
            own += [getattr(mine, f"state_{rate}") for mine in states]
        if value != getattr(OptimizerFlags, rate) and None not in own:
            lines.append(
                f"--{rate} {value:g}: has no effect, for {plan.flags.layer_profile} has this rate "
                "for all that trains; change it there, or add --lr_advanced 0"
            )
    return lines


def _rates(
    name: str, parameter: nn.Parameter, plan: Plan, flags: OptimizerFlags
) -> tuple[str, tuple[float, float, float]]:
    """The parameter's kind, and its lr_init, lr_final and weight decay."""
    if name == PREFIX:
        _, rates = _rates(f"blocks.0.att.{STATE}", parameter, plan, flags)
        return PREFIX, rates
    owner, _, part = name.rpartition(".")
    layer_name = owner if owner in plan.layers else name
    kind, mine = plan.layers[layer_name].kind, plan.plans[layer_name]
    advanced = flags.lr_advanced
    if part == STATE:
        first, last, decay = mine.state_lr_init, mine.state_lr_final, 0.0
    else:
        first, last = mine.lr_init, mine.lr_final
        own = mine.weight_decay if advanced and mine.weight_decay is not None else None
        decay = flags.weight_decay if own is None else own
    adapter = mine.mode in ADAPTERS
    if not (adapter or is_decayed(name, parameter)):
        decay = 0.0
    factor = learning_rate_factor(name) if plan.flags.layerwise_lr else 1.0
    factor *= plan.flags.lora_plus_ratio if part == "lora_B" else 1.0
    lr_init = first if advanced and first is not None else flags.lr_init
    lr_final = last if advanced and last is not None else flags.lr_final
    words = {"linear": "weights", "embedding": "emb", "small": "small", "state": "state"}
    label = "adapters" if adapter else "head" if layer_name == "head" else words[kind]
    return label, (lr_init * factor, lr_final * factor, decay)
