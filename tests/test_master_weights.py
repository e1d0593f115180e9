"""Float32 masters: the steps of an optimizer in float32, rounded once for the model."""

import pytest
import torch

from rwkv.training import optimizer as training_optimizer
from rwkv.training.optimizer import MasterWeights, slices


@pytest.mark.parametrize("slice_of", [2**25, 20, 1], ids=["one", "some", "each"])
def test_steps_are_those_of_float32_rounded_once(slice_of, monkeypatch):
    """Two bfloat16 parameters and a float32 one; updates far below a bfloat16 step add up."""
    monkeypatch.setattr(training_optimizer, "SLICE", slice_of)
    draw = torch.Generator().manual_seed(0)
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32)
    params = [torch.randn(5, 3, generator=draw).to(t).requires_grad_() for t in dtypes]
    twins = [p.detach().float().requires_grad_() for p in params]

    def make(groups):
        return torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.1)

    optimizer, exact = MasterWeights([{"params": params}], make), make(twins)
    for _ in range(20):
        for p, twin in zip(params, twins, strict=True):
            p.grad = torch.randn(5, 3, generator=draw).to(p.dtype)
            twin.grad = p.grad.float()
        optimizer.step()
        exact.step()
    for p, twin in zip(params, twins, strict=True):
        assert torch.equal(p, twin.to(p.dtype))


def test_a_parameter_without_gradient_stays():
    still, moved = (torch.ones(4, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    optimizer = MasterWeights(
        [{"params": [still, moved]}], lambda groups: torch.optim.SGD(groups, lr=0.5)
    )
    optimizer.step()
    moved.grad = torch.ones_like(moved)
    optimizer.step()
    assert still.tolist() == [1.0] * 4 and moved.tolist() == [0.5] * 4
    assert optimizer.master(moved).grad is None


def test_no_more_than_a_slice_of_gradients_is_in_float32(monkeypatch):
    """15 numbers each: two fit into 30, and the last is alone."""
    monkeypatch.setattr(training_optimizer, "SLICE", 30)
    params = [torch.zeros(5, 3, dtype=torch.bfloat16, requires_grad=True) for _ in range(5)]
    assert [len(part) for part in slices([(p, p) for p in params])] == [2, 2, 1]
    alive = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            alive.append(sum(p.grad is not None for p in self.param_groups[0]["params"]))
            return super().step(closure)

    optimizer = MasterWeights([{"params": params}], lambda groups: Watched(groups, lr=1.0))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert alive == [2, 2, 1] and all((p == -1).all() for p in params)
