"""What every adapter shares: it takes over a layer's frozen weight and can be switched off."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from rwkv.errors import InputError
from rwkv.linear import Linear


class AdapterLinear(Linear):
    """A Linear whose weight is changed by a few trained parameters.

    A subclass adds the parameters named in PARTS, `adapted_output`, `merged_weight` and `sizes`;
    it reads the base only through `base_output`, `dense_weight`, `product` and `gradient`, so it
    works over any WeightStore.

    Attributes:
        MODE: the adapter's word in a layer profile.
        PARTS: its parameters, as named in adapter files.
        WIDE: those of them that are float32 in a model of any dtype.
        active: whether the adapter acts; see `adapters_off`.
    """

    MODE: ClassVar[str]
    PARTS: ClassVar[tuple[str, ...]]
    WIDE: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base: Linear):
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features)
        self.weight, self.store, self.active = base.weight, base.store, True
        self.closes, self.gives_logits = base.closes, base.gives_logits
        if self.weight is not None:
            self.weight.requires_grad_(False)

    @staticmethod
    def sizes(out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        """The shape of each part over a weight [out, in].

        Raises:
            InputError: the weight cannot be cut up so.
        """
        raise NotImplementedError

    @classmethod
    def check_new(cls, out_features: int, in_features: int, rank: int) -> None:
        """Stop at a rank that no adapter which is begun over a weight [out, in] shall have.

        One from a file may have it: PiSSA's export is of twice the rank that trained.

        Raises:
            InputError: it is outside 1 .. the smaller side, or `sizes` says why.
        """
        check_rank(cls.MODE, out_features, in_features, rank)
        cls.sizes(out_features, in_features, rank)

    @classmethod
    def exported_sizes(
        cls, out_features: int, in_features: int, rank: int
    ) -> dict[str, tuple[int, ...]]:
        """The shapes of what `exported` gives."""
        return cls.sizes(out_features, in_features, rank)

    def adapted_output(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out], with the adapter, added to `residual` if there is one.

        Where `is_unread` says so the result may be left out, unless its gradient reads it.
        """
        raise NotImplementedError

    def original_output(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out], as the layer was before the adapter."""
        return self.base_output(x, residual, unread=self.is_unread())

    def output(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return (self.adapted_output if self.active else self.original_output)(x, residual)

    def add_parts(self, rank: int, fill: Callable[[str, Tensor], Tensor]) -> None:
        """Make the parameters, on the base's device, in its dtype or that of WIDE.

        Args:
            rank: as in `sizes`.
            fill: from a part's name and a float32 tensor of zeros on the CPU to its first value.
        """
        device, dtype = _home(self)
        for part, shape in self.sizes(self.out_features, self.in_features, rank).items():
            first = fill(part, torch.zeros(shape))
            own = torch.float32 if part in self.WIDE else dtype
            setattr(self, part, nn.Parameter(first.to(device, own)))

    def exported(self) -> dict[str, Tensor]:
        """The parts as an adapter file holds them."""
        return {part: getattr(self, part) for part in self.PARTS}

    def why_not(self, parts: dict[str, Tensor]) -> str | None:
        """Why parts of the right names and shapes cannot be loaded; None if they can."""
        return None

    def load(self, parts: dict[str, Tensor]) -> None:
        """Take over parts that `exported` gave; names, shapes and `why_not` have been checked."""
        with torch.no_grad():
            for part, value in parts.items():
                getattr(self, part).copy_(value)


def _home(layer: Linear) -> tuple[torch.device, torch.dtype]:
    """Where a layer's new parameters belong, and in which dtype."""
    if layer.weight is not None:
        return layer.weight.device, layer.weight.dtype
    assert isinstance(layer.store, nn.Module)
    return next(layer.store.buffers()).device, layer.store.dtype


def check_rank(mode: str, out_features: int, in_features: int, rank: int) -> None:
    """Stop at a rank outside 1 .. the smaller side of the weight."""
    largest = min(out_features, in_features)
    if not 0 < rank <= largest:
        raise InputError(
            f"{mode}: rank {rank} is outside 1 to {largest}, the smaller side of a "
            f"[{out_features}, {in_features}] weight; choose another rank"
        )


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base: DPO's reference model for free.

    True only where nothing but adapters trains; `only_adapters_train` says whether that is so.
    """
    layers = [m for m in model.modules() if isinstance(m, AdapterLinear) and m.active]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def only_adapters_train(model: nn.Module) -> bool:
    """Whether `adapters_off` gives the model as it was before training."""
    parts = {
        id(getattr(layer, part))
        for layer in model.modules()
        if isinstance(layer, AdapterLinear)
        for part in layer.PARTS
    }
    return all(id(p) in parts for p in model.parameters() if p.requires_grad)
