"""The parts that stand alone, in a user's own Horovod loop."""

import copy

import pytest
import torch

from hvdlarge import LAMB, LARS, parameter_groups


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    ).double()


def loss_of(model, rank, step):
    generator = torch.Generator().manual_seed(1000 * rank + step)
    inputs = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return model(inputs).square().mean()


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_a_closure_under_distributed_optimizer_is_refused(control, tensors, kind):
    import horovod.torch as hvd

    model = net()
    before = copy.deepcopy(model.state_dict())
    optimizer = hvd.DistributedOptimizer(
        kind(model.parameters(), lr=0.1), named_parameters=model.named_parameters()
    )
    loss_of(model, control.rank, 0).backward()
    with pytest.raises(ValueError, match="takes no closure under hvd.DistributedOptimizer"):
        optimizer.step(lambda: loss_of(model, control.rank, 0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [LARS, LAMB])
@pytest.mark.parametrize("measured", [False, True])
def test_optimizer_inside_distributed_optimizer_follows_the_mean_gradient(
    control, tensors, kind, measured
):
    import horovod.torch as hvd

    model = net()
    reference = copy.deepcopy(model)
    optimizer = hvd.DistributedOptimizer(
        kind(parameter_groups(model, weight_decay=0.01), lr=0.1),
        named_parameters=model.named_parameters(),
    )
    alone = kind(parameter_groups(reference, weight_decay=0.01), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, control.rank, step).backward()
        if measured:
            optimizer.synchronize()
            optimizer.update(optimizer.measure().clipped(1e9), 0.1)
        else:
            optimizer.step()
        alone.zero_grad()
        ranks = range(control.size)
        (sum(loss_of(reference, rank, step) for rank in ranks) / control.size).backward()
        alone.step()
    for weight, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=0)
