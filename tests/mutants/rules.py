"""The update rules of `torch_bp.optim` by file: torch's optimizers tell their faults."""

import warnings
from dataclasses import dataclass

import torch

from tests.mutants.mutation import RAISED, WRONG, Namespace
from tests.optim.table import INPUTS, PAIRS, parameters, train

_BY_TORCH = {"foreach", "fused", "capturable", "differentiable"}
_STEPS = 7  # RAdam rectifies from the sixth on
_MORE = [
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.5, "weight_decay": 0.1, "eps": 0.01}),
    ("Adam", {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1, "weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    ("AdamW", {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1, "weight_decay": 0.1}),
    ("Adamax", {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1, "weight_decay": 0.1}),
    ("NAdam", {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RMSprop", {"lr": 0.1, "alpha": 0.5, "eps": 0.1, "weight_decay": 0.1, "momentum": 0.5, "centered": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.5, "nesterov": True}),
    ("Adadelta", {"lr": 0.5, "rho": 0.5, "eps": 0.1, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.1, "alpha": 0.5, "eps": 0.1, "eps_inside_sqrt": True}),
    *((name, {"weight_decay": 1.0}) for name in PAIRS),
]


class InsideSqrt(torch.optim.Optimizer):
    """RMSprop with `eps_inside_sqrt`, which torch does not have, in operations of torch."""

    def __init__(self, params, lr, alpha, eps, eps_inside_sqrt):
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("square_avg", torch.zeros_like(p))
                average.lerp_(p.grad.square(), 1 - group["alpha"])
                p.sub_(group["lr"] * p.grad / average.add(group["eps"]).sqrt())


@dataclass(frozen=True)
class Target:
    """A file, functions in it, the optimizers that use them, and files built on it."""

    file: str
    functions: set[str]
    optimizers: tuple[str, ...]
    dependents: tuple[str, ...] = ()

    @property
    def path(self):
        return f"torch_bp.optim.{self.file}"


def _rule(file, name, *more):
    return Target(file, {file, f"{name}.scalars"}, (name, *more), tuple(m.lower() for m in more))


_ALL = ("SGD", "RMSprop", "Adagrad", "Adam", "NAdam", "RAdam", "Adamax", "Adadelta")
TARGETS = [
    _rule("sgd", "SGD"),
    _rule("rmsprop", "RMSprop"),
    _rule("adagrad", "Adagrad"),
    _rule("adam", "Adam", "AdamW"),
    Target("nadam", {"nadam", "_momentum", "NAdam.scalars", "NAdam.advance"}, ("NAdam",)),
    _rule("radam", "RAdam"),
    _rule("adamax", "Adamax"),
    _rule("adadelta", "Adadelta"),
    _rule("lion", "Lion"),
    Target("terms", {"with_decay", "moments"}, _ALL, tuple(name.lower() for name in _ALL)),
]


def caught(target, mutant):
    """Return WRONG if some steps differ from torch's, RAISED if they fail, else ""."""
    try:
        paths = (target.file, *target.dependents)
        namespace = Namespace(mutant, tuple(f"torch_bp.optim.{name}" for name in paths))
        differ = any(_differ(getattr(namespace, name), name, options) for name, options in _options(target))
    except Exception:
        return RAISED
    return WRONG if differ else ""


def _options(target):
    for name, options in (*_MORE, *INPUTS):
        if name in target.optimizers and not options.keys() & _BY_TORCH:
            yield name, options


def _differ(ours, name, options):
    ended = []
    for made in (ours, InsideSqrt if "eps_inside_sqrt" in options else PAIRS[name][1]):
        tensors = parameters(shapes=[(3, 4), ()])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = made(tensors, **options)
        train(optimizer, tensors, _STEPS)
        kept = [
            v for state in optimizer.state.values() for k, v in sorted(state.items()) if k != "step" and v is not None
        ]
        ended.append(torch.cat([t.detach().reshape(-1).double() for t in (*tensors, *kept)]))
    return not torch.allclose(*ended, rtol=1e-10, atol=1e-12)
