"""Recomputation: the gradient of a plain call, with and without ZeRO-3's scattered parameters.

DeepSpeed itself is tried in test_deepspeed.py; here its mark on the parameters alone.
"""

import pytest
import torch
from test_sft import small_model
from torch import nn

from rwkv.recompute import recomputed
from rwkv.state import LayerState


def mark_scattered(model: nn.Module) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("scattered", [False, True], ids=["whole", "scattered"])
@pytest.mark.parametrize("trained", ["", "att.", "ln_out"], ids=["all", "time mix", "last norm"])
def test_recomputed_blocks_give_the_plain_gradient(version, scattered, trained):
    """Through hidden states and every state, for all parameters that train."""
    gradients = []
    for again in (False, True):
        model = small_model(version).double()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name and not name.startswith("head"))
        model.grad_cp = again
        if scattered and again:
            mark_scattered(model)
        tokens = torch.arange(14).view(2, 7)
        hidden, state = model(tokens)
        total = hidden.square().sum()
        for layer in state:
            total = total + sum(field.double().square().sum() for field in layer)
        total.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    plain, got = gradients
    assert plain.keys() == got.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("scattered", [False, True], ids=["whole", "scattered"])
def test_random_draws_are_repeated(scattered):
    """Were they not, the gradient of x dropped out would differ from the mask of the result."""
    layer = nn.Linear(4, 4)
    if scattered:
        mark_scattered(layer)
    x = torch.ones(64, requires_grad=True)
    dropped = recomputed(lambda t: nn.functional.dropout(t.exp(), 0.5).square(), x, model=layer)
    dropped.sum().backward()
    torch.testing.assert_close(x.grad, 2 * dropped.detach())


def test_results_keep_their_structure():
    layer = nn.Linear(3, 3)
    mark_scattered(layer)

    def run(x):
        return layer(x), [LayerState(x, layer(x), x.detach())], None, 7

    out, (state,), nothing, seven = recomputed(run, torch.ones(2, 3), model=layer)
    assert isinstance(state, LayerState) and nothing is None and seven == 7
    assert out.requires_grad and not state.ffn_shift.requires_grad
    (out.sum() + state.wkv.sum()).backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((3, 3), 4.0))
