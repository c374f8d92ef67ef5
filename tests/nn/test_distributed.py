"""Two processes that train together, over gloo on the CPU: data parallel, sharded, and tensors in parts."""

from functools import partial

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import torch_bp
import torch_bp.nn as ours
from tests import processes
from tests.nn.test_modules import TWINNED, build, run
from torch_bp import optim

WORLD = processes.WORLD
CASES = {}
cases = partial(processes.cases, CASES)
theirs = torch.nn
numbers = torch.Generator().manual_seed(0)
x = torch.randn(10, 12, 6, generator=numbers, dtype=torch.float64)  # step, example, feature
labels = torch.randint(3, (10, 12), generator=numbers)
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10)


def layers(module, norm="BatchNorm1d"):
    torch.manual_seed(0)
    hidden = [module.Linear(6, 8), *([getattr(module, norm)(8)] if norm else []), module.ReLU(), module.Dropout(0.0)]
    return torch.nn.Sequential(*hidden, module.Linear(8, 3)).double()


def mlp(module, norm="batch", sizes=(6, 8, 8, 3)):
    torch.manual_seed(0)
    return build(module, "MLP", {"sizes": sizes, "norm": norm}).double()


MODELS = {"layers": layers, "mlp": mlp}


def parts(rank):
    """The examples of one rank of each step, and all of them where rank is None."""
    mine = slice(None) if rank is None else slice(rank * 6, rank * 6 + 6)
    return [(x[step, mine], labels[step, mine]) for step in range(len(x))]


def train(module, model, batches, steps=10, clip=None):
    """Train, and return the norms of all gradients."""
    loss = module.CrossEntropyLoss()
    optimizer = (optim if module is ours else torch.optim).SGD(model.parameters(), lr=0.1, momentum=0.9)
    norms = []
    for inputs, target in batches[:steps]:
        optimizer.zero_grad()
        loss(model(inputs), target).backward()
        if clip is not None:
            norm = module.utils.clip_grad_norm_(model.parameters(), clip)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        optimizer.step()
    return norms


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state(model):
    return [whole(t).detach() for t in model.state_dict().values()]


def alike_everywhere(tensors):
    """True if every rank holds the same bits."""
    mine = torch.cat([tensor.detach().flatten() for tensor in tensors])
    others = [torch.empty_like(mine) for _ in range(WORLD)]
    distributed.all_gather(others, mine)
    return all(torch.equal(other, mine) for other in others)


DDP = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
}


@cases(**{f"{m} {o}": (MODELS[m], DDP[o]) for m in MODELS for o in DDP})
def data_parallel(choice, rank):
    """As torch's modules fare, batch statistics of each rank's part included; the same gradients everywhere."""
    make, options = choice
    models = [DistributedDataParallel(make(module), **options) for module in (ours, theirs)]
    for module, model in zip((ours, theirs), models):
        train(module, model, parts(rank))
    close(*map(state, models))
    assert alike_everywhere([p.grad for p in models[0].parameters()])
    assert alike_everywhere(models[0].parameters())


@cases(layers=layers, mlp=mlp)
def data_parallel_is_one_process(make, rank):
    """Without batch statistics the mean of the parts' gradients is the whole batch's."""
    model, alone = (make(ours, norm=None) for _ in range(2))
    train(ours, DistributedDataParallel(model), parts(rank))
    train(ours, alone, parts(None))
    close(state(model), state(alone))


@cases(layers=layers, mlp=mlp)
def data_parallel_without_sync(make, rank):
    """Two parts of a step are added up before the ranks talk."""
    found = []
    for module in (ours, theirs):
        model, loss = DistributedDataParallel(make(module)), module.CrossEntropyLoss()
        (first, second), *_ = zip(parts(rank)[::2], parts(rank)[1::2])
        with model.no_sync():
            loss(model(first[0]), first[1]).backward()
        assert not alike_everywhere([p.grad for p in model.parameters()])
        loss(model(second[0]), second[1]).backward()
        assert alike_everywhere([p.grad for p in model.parameters()])
        found.append([p.grad for p in model.parameters()])
    close(*found)


class Branches(torch.nn.Module):
    """Each rank takes one branch, the other has no gradient there."""

    def __init__(self, module, branch):
        super().__init__()
        self.body, self.branches, self.branch = mlp(module), torch.nn.ModuleList(), branch
        self.branches.extend([module.Linear(3, 3).double(), module.Linear(3, 3).double()])
        self.nobody = module.Linear(3, 3).double()

    def forward(self, input):
        return self.branches[self.branch](self.body(input))


@cases()
def data_parallel_with_unused_parameters(rank):
    models = [DistributedDataParallel(Branches(m, rank), find_unused_parameters=True) for m in (ours, theirs)]
    for module, model in zip((ours, theirs), models):
        train(module, model, parts(rank))
    close(*map(state, models))
    assert [p.grad is None for p in models[0].parameters()] == [p.grad is None for p in models[1].parameters()]


@cases()
def data_parallel_with_checkpoints(rank):
    """Computed twice, the batches count once."""
    models = [mlp(ours), mlp(ours)]
    models[0].forward = partial(checkpoint, models[0].forward, use_reentrant=False)
    for model in models:
        train(ours, DistributedDataParallel(model, static_graph=True), parts(rank))
    close(*map(state, models))


@cases()
def data_parallel_with_uneven_inputs(rank):
    found = []
    for module in (ours, theirs):
        model = DistributedDataParallel(mlp(module, norm="layer"))
        with model.join():
            train(module, model, parts(rank), steps=5 + rank)
        found.append(state(model))
    close(*found)


def sharded(model, each=False, **options):
    for layer in [*model] if each else []:
        if [*layer.parameters()]:
            fully_shard(layer, **options)
    return fully_shard(model, **options)


SHARDS = {
    "root": {},
    "each": {"each": True},
    "kept": {"each": True, "reshard_after_forward": False},
}


@cases(**{f"{m} {o}": (MODELS[m], SHARDS[o]) for m in MODELS for o in SHARDS})
def shards(choice, rank):
    """Against torch's modules, sharded alike; and against one process where there are no batch statistics."""
    make, options = choice
    models = [sharded(make(module), **options) for module in (ours, theirs)]
    norms = [train(module, model, parts(rank), 5, clip=0.5) for module, model in zip((ours, theirs), models)]
    assert all(isinstance(p, DTensor) for p in models[0].parameters())
    close(*norms)
    close(*map(state, models))
    model, alone = sharded(make(ours, norm=None), **options), make(ours, norm=None)
    norms = [train(ours, model, parts(rank), 5, clip=0.5), train(ours, alone, parts(None), 5, clip=0.5)]
    close(*norms)
    close(state(model), state(alone))


@cases(batch=("BatchNorm1d", torch.float32), layer=("LayerNorm", torch.bfloat16), none=(None, torch.bfloat16))
def shards_in_bfloat16(choice, rank):
    """Parameters are cast when they are gathered; torch's batch norm takes no bfloat16 beside float32 statistics."""
    norm, dtype = choice
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    models = []
    for module in (ours, theirs):
        model = layers(module, norm).float()
        fully_shard(model[1], mp_policy=MixedPrecisionPolicy(param_dtype=dtype, output_dtype=torch.bfloat16))
        models.append(sharded(model, mp_policy=policy))
        train(module, model, [(inputs.float(), target) for inputs, target in parts(rank)], 5)
    torch.testing.assert_close(*map(state, models), rtol=2e-2, atol=2e-2)


@cases(two=2.0, inf=float("inf"), one=1.0)
def norms_of_shards(norm_type, rank):
    found = []
    for module in (ours, theirs):
        model = sharded(layers(module))
        module.CrossEntropyLoss()(model(x[0, :6] + rank), labels[0, :6]).backward()
        grads = [p.grad for p in model.parameters()]
        total = module.utils.get_total_norm(grads, norm_type)
        clipped = module.utils.clip_grad_norm_(model.parameters(), 1e-2, norm_type)
        found.append([whole(t) for t in (total, clipped, *grads)])
        module.utils.clip_grad_value_(model.parameters(), 1e-4)
        found[-1] += [whole(g) for g in grads]
    close(*found)


@cases(layers=False, mlp=True)
def tensors_in_columns_and_rows(fused, rank):
    """Tensor parallel: the first layer by its outputs, the last by its inputs; what is between them are DTensors."""
    found = []
    for module in (ours, theirs):
        model = mlp(module, norm=None, sizes=[6, 8, 3])
        model = model if fused else torch.nn.Sequential(*model)
        alone = torch_bp.to_torch(model)
        parallelize_module(model, init_device_mesh("cpu", (WORLD,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
        train(module, model, parts(None), 5)
        train(theirs, alone, parts(None), 5)
        found.append([state(model), state(alone)])
    close(*found)
    close(*found[0])


# torch's own value is wrong where a mean is over labels that weigh differently: it is the mean of the parts' means
DIVISIBLE = [row for row in TWINNED if not row[1].get("inplace") and "ignore_index" not in row[1]]


@cases(**{f"{row[0]} {i}": row for i, row in enumerate(DIVISIBLE)})
def distributed_tensors(row, rank):
    """One part of the batch on each rank, parameters on both: the numbers of one process, which torch's losses miss."""
    name, kwargs, inputs = row
    mesh = init_device_mesh("cpu", (WORLD,))

    def scattered(tensor, placement=Replicate()):  # noqa: B008
        return distribute_tensor(tensor.detach(), mesh, [placement])

    module = build(ours, name, kwargs)
    for part in module.modules():
        part._parameters.update(
            {k: torch.nn.Parameter(scattered(p)) for k, p in part._parameters.items() if p is not None}
        )
        part._buffers.update({k: scattered(b) for k, b in part._buffers.items() if b is not None})
    leaf, *others = (scattered(i, Shard(0)) for i in inputs)
    got = run(module, (leaf, *others))
    close([whole(t) for t in got], list(run(build(theirs, name, kwargs), inputs)), rtol=1e-5, atol=1e-6)


def test_two_processes(tmp_path):
    """All cases in one test, so that no two runners start processes of their own."""
    processes.run(__name__, tmp_path, WORLD)
