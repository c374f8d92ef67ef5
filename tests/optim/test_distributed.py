"""Two processes whose optimizers make the steps of one: data parallel, sharded, resumed, and with state in parts."""

import copy
from functools import cache, partial

import pytest
import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tests import processes
from tests.optim.table import PAIRS, parameters
from torch_bp import optim
from torch_bp.kernels import use
from torch_bp.optim.shards import alike

WORLD, STEPS = processes.WORLD, 20
CASES = {}
cases = partial(processes.cases, CASES)
OPTIONS = {"SGD": {"momentum": 0.9, "nesterov": True}}
each = {name: name for name in PAIRS}
generator = torch.Generator().manual_seed(0)
x = torch.randn(STEPS, 12, 5, generator=generator)  # step, example, feature
labels = torch.randint(3, (STEPS, 12), generator=generator)
close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
same = partial(torch.testing.assert_close, rtol=0, atol=0)


def network():
    """One whose rows (7, 3) do not part evenly, and a vector that one rank has nothing of."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3)]
    return torch.nn.Sequential(*layers, torch.nn.PReLU(init=0.5))


def build(name, model, library=0):
    return PAIRS[name][library](model.parameters(), lr=1e-3, weight_decay=0.01, **OPTIONS.get(name, {}))


def train(model, optimizer, rank=None, steps=range(STEPS)):
    """Train on the examples of one rank, on all of them where rank is None."""
    mine = slice(None) if rank is None else slice(rank * 6, rank * 6 + 6)
    for step in steps:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[step, mine]), labels[step, mine]).backward()
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(model):
    return [whole(t).detach() for t in model.state_dict().values()]


@cache
def alone(name, library=0):
    """What one process makes of all examples."""
    model = network()
    train(model, build(name, model, library))
    return weights(model)


def sharded(parts=True):
    model = network()
    for layer in model if parts else []:
        if [*layer.parameters()]:
            fully_shard(layer)
    return fully_shard(model)


@cases(**each)
def data_parallel(name, rank):
    model = DistributedDataParallel(network())
    train(model, build(name, model), rank)
    close(weights(model), alone(name))


@cases(**{f"{name} parts": (name, True) for name in each}, root=("Adam", False))
def shards(choice, rank):
    """By list kernels over the local parts; the state is of DTensors."""
    name, parts = choice
    model = sharded(parts)
    optimizer = build(name, model)
    train(model, optimizer, rank)
    close(weights(model), alone(name))
    close(weights(model), alone(name, library=1))
    (share,) = optimizer._plan.shares.values()
    assert share.others == []
    assert sum(len(bucket.positions) for bucket in share.buckets) == len([*model.parameters()])
    for p, state in optimizer.state.items():
        for key, value in state.items():
            assert key == "step" or not value.dim() or (isinstance(value, DTensor) and value.placements == p.placements)


@cases()
def checkpoints_in_a_new_group_of_processes(rank):
    """Bitwise the same as without the interruption; all in one case, since a group takes long to make."""
    expected = {}
    for name in PAIRS:
        reference, model = sharded(), sharded()
        train(reference, build(name, reference), rank)
        expected[name] = weights(reference)
        optimizer = build(name, model)
        train(model, optimizer, rank, range(10))
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        checkpoint.save(state, checkpoint_id=str(processes.folder / name))
    distributed.barrier()
    distributed.destroy_process_group()
    processes.connect(rank, WORLD, "another store")
    for name in PAIRS:
        model = sharded()
        optimizer = build(name, model)
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        checkpoint.load(state, checkpoint_id=str(processes.folder / name))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        train(model, optimizer, rank, range(10, STEPS))
        same(weights(model), expected[name])


@cases(**each)
def whole_checkpoints_go_on_alone(name, rank):
    """Gathered from shards, loaded in one process by torch's optimizer of that name; and back."""
    options = StateDictOptions(full_state_dict=True)
    model = sharded()
    optimizer = build(name, model)
    train(model, optimizer, rank, range(10))
    model_state, state = get_state_dict(model, optimizer, options=options)
    other = network()
    theirs = build(name, other, library=1)
    set_state_dict(other, theirs, model_state_dict=model_state, optim_state_dict=copy.deepcopy(state))  # kept as it is
    train(other, theirs, None, range(10, STEPS))
    close(weights(other), alone(name))
    model = sharded()
    optimizer = build(name, model)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state, options=options)
    train(model, optimizer, rank, range(10, STEPS))
    close(weights(model), alone(name))


@cases(**each)
def state_of_shards_by_position_and_by_name(name, rank):
    reference = sharded()
    interrupted = build(name, reference)
    train(reference, interrupted, rank, range(5))
    results = []
    for by_name in (False, True):
        model = sharded()
        model.load_state_dict({key: t.clone() for key, t in reference.state_dict().items()})
        saved = interrupted.state_dict()
        saved["state"] = {i: {k: v.clone() for k, v in s.items()} for i, s in saved["state"].items()}
        optimizer = build(name, model)
        if by_name:
            saved["param_groups"][0]["param_names"] = [n for n, _ in reference.named_parameters()]
            assert not optim.load_state_dict_by_name(optimizer, saved, model=model)
        else:
            optimizer.load_state_dict(saved)
        train(model, optimizer, rank, range(5, 10))
        results.append(weights(model))
    train(reference, interrupted, rank, range(5, 10))
    same(results, [weights(reference)] * 2)


@cases(**each)
def state_kept_by_one_rank_each(name, rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns, being imported, of what it uses

    model = network()
    wrapped = DistributedDataParallel(model)
    options = {"lr": 1e-3, "weight_decay": 0.01, **OPTIONS.get(name, {})}
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=PAIRS[name][0], **options)
    train(wrapped, optimizer, rank)
    close(weights(model), alone(name))


SHAPES = [(4, 6), (5,), (3, 2)]
PLACEMENTS = {
    "shard 0": (Shard(0), Shard(0)),
    "shard 1": (Shard(-1), Shard(-1)),
    "replicate": (Replicate(), Replicate()),
    "replicate from partial": (Replicate(), Partial()),
    "shard from replicate": (Shard(0), Replicate()),
    "replicate from shard": (Replicate(), Shard(0)),
}


@cases(**{f"{name} {how}": (name, how) for name in ("SGD", "Adam") for how in PLACEMENTS})
def placements(choice, rank):
    """The steps of one process, whichever way gradients are cut; by a list kernel if all is cut alike."""
    name, how = choice
    of_parameter, of_gradient = PLACEMENTS[how]
    mesh = init_device_mesh("cpu", (WORLD,))
    plain = parameters(torch.float32, SHAPES)
    cut = [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [of_parameter])) for p in plain]
    numbers = torch.Generator().manual_seed(1)
    optimizers = [PAIRS[name][0](params, lr=0.1, **OPTIONS.get(name, {})) for params in (plain, cut)]
    for _ in range(5):
        for p, q in zip(plain, cut):
            p.grad = torch.randn(p.shape, generator=numbers)
            if of_gradient.is_partial():
                q.grad = DTensor.from_local(p.grad / WORLD, mesh, [of_gradient], run_check=False)
            else:
                q.grad = distribute_tensor(p.grad, mesh, [of_gradient])
        for optimizer in optimizers:
            optimizer.step()
    close([whole(p).detach() for p in cut], [p.detach() for p in plain])
    by_kernel = sum(len(bucket.positions) for bucket in optimizers[1]._plan.shares[0].buckets)
    assert by_kernel == (len(SHAPES) if of_parameter == of_gradient else 0)


@cases()
def a_gradient_cut_differently_in_mid_training(rank):
    """At the same size on each rank: only the placement tells."""
    mesh = init_device_mesh("cpu", (WORLD,))
    p = torch.nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
    optimizer = optim.SGD([p], lr=1.0)
    for placement in (Replicate(), Partial(), Replicate()):
        p.grad = DTensor.from_local(torch.ones(4), mesh, [placement], run_check=False)
        optimizer.step()
    same(whole(p).detach(), torch.full((4,), -1.0 - WORLD - 1))


@cases()
def sums_that_are_yet_to_be_made_are_not_alike(rank):
    mesh = init_device_mesh("cpu", (WORLD,))
    for placement in (Partial(), Shard(0)):
        p, grad = (DTensor.from_local(torch.ones(4), mesh, [placement], run_check=False) for _ in range(2))
        assert alike(p, [grad]) is not placement.is_partial()
        assert not alike(p, [torch.ones(4)])


@cases(root=False, parts=True)
def shards_in_the_backward(parts, rank):
    model = sharded(parts)
    optimizer = build("Adam", model)
    with optim.apply_in_backward(model, optimizer) as handle:
        train(model, optimizer, rank)
        assert all(p.grad is None for p in model.parameters())
        with pytest.raises(ValueError, match="must be plain tensors for a backward that clips, got DTensors"):
            handle.backward(torch.ones((), requires_grad=True), 1.0)
    close(weights(model), alone("Adam"))


@cases()
def data_parallel_in_the_backward_is_refused(rank):
    """Its gradients are averaged later. The model may have been wrapped before or since."""
    model = network()
    optimizer = build("Adam", model)
    handle = optim.apply_in_backward(model, optimizer)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="gradients must be complete when they come, got DistributedDataParallel"):
        wrapped(x[0])
    handle.remove()
    wrapped(x[0])
    with pytest.raises(ValueError, match="gradients must be complete when they come, got DistributedDataParallel"):
        optim.apply_in_backward(wrapped, optimizer)


@cases()
def engines_agree(rank):
    found = []
    for engine in ("torch", "numba"):
        model = sharded()
        optimizer = build("Adam", model)
        with use(engine):
            train(model, optimizer, rank)
        found.append(weights(model))
    close(*found)


@cases()
def autograd_sees_the_write(rank):
    """What it has saved must not have changed: for a DTensor and for its part."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for of_part in (False, True):
        p = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
        optimizer = optim.SGD([p], lr=1.0)
        loss = (p.to_local().square() if of_part else p.square()).sum()
        p.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"modified .*inplace"):
            loss.backward()


def test_two_processes(tmp_path):
    """All cases in one test, so that no two runners start processes of their own."""
    processes.run(__name__, tmp_path, WORLD, seconds=100)
