"""An optimizer's state by the names of parameters: the same for every strategy and number of ranks.

DeepSpeed keeps the float32 weights and Adam's means in flat pieces, one a rank; here they are put
together into whole tensors and taken apart again.
"""

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwkv.training.optimizer import MasterWeights

Named = dict[str, nn.Parameter]


def read_state(trainer: pl.Trainer, parameters: Named) -> dict[str, dict[str, Any]] | None:
    """The weights that the optimizer steps, and what it keeps beside each of them.

    Args:
        trainer: of a run that has made a step. Every rank must call this.
        parameters: what trains, by name.

    Returns:
        name -> {"weight": float32 or the parameter's own dtype; "step": steps done; and what the
        optimizer keeps, such as "exp_avg"}; None on other ranks than the first. The tensors are
        the optimizer's own, on its device; under DeepSpeed copies, on the CPU.
    """
    optimizer = trainer.optimizers[0]
    if isinstance(optimizer, MasterWeights):
        return {n: _plain(optimizer, p) for n, p in parameters.items()} if _first(trainer) else None
    zero: Any = trainer.model.optimizer  # type: ignore[union-attr]
    return _gather(zero, parameters, keeps=_first(trainer))


@torch.no_grad()
def write_state(trainer: pl.Trainer, parameters: Named, state: dict[str, dict[str, Any]]) -> None:
    """Set parameters and optimizer to what `read_state` returned, perhaps under another strategy.

    Args:
        trainer: set up, before its first step. Every rank must call this.
        parameters: as for `read_state`.
        state: the same on every rank.
    """
    optimizer = trainer.optimizers[0]
    if isinstance(optimizer, MasterWeights):
        inner = optimizer.inner
        for name, parameter in parameters.items():
            master = optimizer.master(parameter)
            master.copy_(state[name]["weight"])
            parameter.copy_(master)
        names = {id(optimizer.master(p)): name for name, p in parameters.items()}
        listed = [p for group in inner.param_groups for p in group["params"]]
        inner.load_state_dict(
            {
                "state": {i: _beside(inner, state[names[id(p)]]) for i, p in enumerate(listed)},
                "param_groups": inner.state_dict()["param_groups"],
            }
        )
        return
    _scatter(trainer.model.optimizer, parameters, state)  # type: ignore[union-attr]


def _first(trainer: pl.Trainer) -> bool:
    return bool(trainer.is_global_zero)


def _plain(optimizer: MasterWeights, parameter: nn.Parameter) -> dict[str, Any]:
    master = optimizer.master(parameter)
    kept = optimizer.inner.state[master]
    return {"weight": master.detach(), **kept, "step": int(kept.get("step", 0))}


def _beside(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """What an optimizer keeps for one tensor; torch's own count steps in a tensor."""
    kept = {key: value for key, value in state.items() if key != "weight"}
    if isinstance(optimizer, torch.optim.AdamW):
        kept["step"] = torch.tensor(float(state["step"]))
    return kept


def _is_scattered(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")  # ZeRO-3


def _flat(zero: Any) -> list[Tensor]:
    """This rank's flat pieces of the float32 weights."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def _link(zero: Any) -> None:
    """Let each parameter find its part of the state under stages 1 and 2.

    DeepSpeed 0.19 does this once, when the first of several groups has made its first step and the
    others have no state yet.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _kept(state: dict[str, Any]) -> Iterable[str]:
    """The names of what is kept for every number of a weight."""
    return sorted(key for key, value in state.items() if torch.is_tensor(value) and value.ndim)


def _gather(zero: Any, parameters: Named, *, keeps: bool) -> dict[str, dict[str, Any]] | None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    flat = zero.optimizer.state[_flat(zero)[0]]
    _link(zero)
    gathered: dict[str, dict[str, Any]] = {}
    parameter: Any
    for name, parameter in parameters.items():
        whole = {"weight": safe_get_full_fp32_param(parameter)}
        for key in _kept(flat):
            whole[key] = safe_get_full_optimizer_state(parameter, key)
        if keeps:
            shape = parameter.ds_shape if _is_scattered(parameter) else parameter.shape
            gathered[name] = {
                "step": int(flat.get("step", 0)),
                **{key: value.reshape(shape).cpu() for key, value in whole.items()},
            }
    return gathered if keeps else None


def _scatter(zero: Any, parameters: Named, state: dict[str, dict[str, Any]]) -> None:
    some = next(iter(state.values()))
    kept = [key for key in _kept(some) if key != "weight"]
    for flat in _flat(zero):  # what the optimizer makes at its first step
        empty = {key: torch.zeros_like(flat) for key in kept}
        zero.optimizer.state[flat] = {**_beside(zero.optimizer, some), **empty}
    _link(zero)
    parameter: Any
    for name, parameter in parameters.items():
        if _is_scattered(parameter):
            _scatter_one(parameter, state[name], kept)
        else:
            parameter.copy_(state[name]["weight"])
            parameter.set_full_hp_param(state[name]["weight"])
            for key in kept:
                parameter.set_full_hp_param(state[name][key], key)


def _scatter_one(parameter: Any, state: dict[str, Any], kept: list[str]) -> None:
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    piece = parameter.ds_tensor
    first = torch.distributed.get_rank() * piece.numel()

    def mine(whole: Tensor) -> Tensor:
        """This rank's part; what is behind the end is filled up with zeros."""
        part = whole.flatten()[first : first + piece.numel()]
        return torch.nn.functional.pad(part, (0, piece.numel() - part.numel()))

    piece.copy_(mine(state["weight"]))
    safe_set_local_fp32_param(parameter, mine(state["weight"]))
    for key in kept:
        safe_set_local_optimizer_state(parameter, mine(state[key]), key)
