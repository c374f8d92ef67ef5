"""What a loop does around its steps, heard in the first of them."""

import pytest
import torch
from torch import nn

from torch_bp.diagnostics import Circumstances


def setting(loss_fn=None):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, loss_fn or nn.CrossEntropyLoss()


def backward(model, loss_fn):
    loss_fn(model(torch.randn(5, 3)), torch.randint(2, (5,))).backward()


@pytest.mark.parametrize("place", ["before", "between", "after", "never"])
def test_zero_grad_is_heard_wherever_it_stands(place):
    model, optimizer, loss_fn = setting()
    heard = Circumstances(model, optimizer, loss_fn)
    norms = [0.0]
    for _ in range(3):
        if place == "before":
            optimizer.zero_grad()
        loss = loss_fn(model(torch.randn(5, 3)), torch.randint(2, (5,)))
        if place == "between":
            optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
        if place == "after":
            optimizer.zero_grad()
    carried = [heard.facts[step]["carried"] for step in range(3)]
    assert carried == (pytest.approx(norms[:3]) if place == "never" else [0.0] * 3)


def test_micro_batches_and_validation_are_no_forgotten_gradients():
    model, optimizer, loss_fn = setting()
    heard = Circumstances(model, optimizer, loss_fn)
    for _ in range(2):
        for _ in range(3):
            backward(model, loss_fn)
            with torch.no_grad():
                loss_fn(model(torch.randn(5, 3)), torch.randint(2, (5,)))
        optimizer.step()
        optimizer.zero_grad()
    assert [facts["carried"] for facts in heard.facts.values()] == [0.0, 0.0]


def test_what_is_not_used_and_what_the_loss_is_given():
    model, optimizer, loss_fn = setting()
    model[0].extra = nn.Linear(2, 2)
    model[1].bias.requires_grad_(False)
    heard = Circumstances(model, optimizer, loss_fn)
    output = model(torch.randn(5, 3))
    loss_fn(output, torch.randint(2, (5,))).backward()
    optimizer.step()
    facts = heard.facts[0]
    assert facts["unused"] == ("0.extra.weight", "0.extra.bias")
    assert facts["loss_function"] == "CrossEntropyLoss"
    assert facts["output"].count == 10
    assert facts["output"].mean == pytest.approx(output.mean().item())
    assert facts["output"].std == pytest.approx(output.std(correction=0).item())
    assert (facts["output"].min, facts["output"].max) == pytest.approx((output.min().item(), output.max().item()))


def test_a_few_steps_are_enough_and_nothing_stays():
    model, optimizer, loss_fn = setting()
    heard = Circumstances(model, optimizer, loss_fn, steps=2)
    for _ in range(4):
        backward(model, loss_fn)
        optimizer.step()
    assert sorted(heard.facts) == [0, 1]
    assert not loss_fn._forward_hooks
    heard.close()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_without_a_loss_module_the_rest_is_heard():
    model, optimizer, loss_fn = setting()
    heard = Circumstances(model, optimizer)
    backward(model, loss_fn)
    optimizer.step()
    assert heard.facts == {0: {"unused": ()}}
