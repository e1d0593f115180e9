"""Float32 masters: the steps of an optimizer in float32, rounded once for the model."""

import torch

from rwkv.training.optimizer import MasterWeights


def test_steps_are_those_of_float32_rounded_once():
    """Two bfloat16 parameters and a float32 one; updates far below a bfloat16 step add up."""
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
