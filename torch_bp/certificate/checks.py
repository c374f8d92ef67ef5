"""What is compared: each check runs one side and returns tensors by name.

Names are "kind: name", such as "gradient: 0.weight": kinds are measured on scales of their own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.utils import _pytree as pytree

from torch_bp.certificate.subject import (
    Subject,
    Tensors,
    differentiable,
    outputs,
    parameters,
    projection,
    scattered,
    weighed,
)

STEPS = 20
EXAMPLES = 8  # a gradient for every example takes that many times the memory of the parameters


@dataclass(frozen=True)
class Check:
    """`run(subject)` gives the tensors; `judge` the same ones, to see in float64 what rounding does to them."""

    name: str
    run: Callable[[Subject], Tensors]
    judge: Callable[[Subject], Tensors] | None = None
    autocast: bool = False
    exact: bool = False


def plain_outputs(side: Subject) -> Tensors:
    """Outputs without gradients, and the buffers that the call has left."""
    model = side.fresh()
    (args, kwargs), _ = side.arguments()
    with torch.no_grad():
        result = outputs(model(*args, **kwargs))
    return {**result, **_buffers(model)}


def gradients(side: Subject, wrap: Callable[..., Any] = lambda model: model, writable: bool = True) -> Tensors:
    """Outputs, buffers and the gradients of parameters and inputs, by `backward()`."""
    model = side.fresh()
    (args, kwargs), leaves = side.arguments(writable)
    result = wrap(model)(*args, **kwargs)
    projection(result).backward()
    found = {f"gradient: {name}": t.grad for name, t in {**parameters(model), **leaves}.items()}
    return {**outputs(result), **_buffers(model), **found}


def compiled(side: Subject) -> Tensors:
    """As `gradients`, of the model compiled whole, and its outputs without gradients, another way through Dynamo."""

    def wrap(model: torch.nn.Module) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            # Copied here and not before: of what is no leaf, Dynamo would ask for `.grad`, which warns.
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
            return model(*args, **kwargs)

        # Dynamo counts recompilations by code object, and gives up after eight: every call has one of its own
        fresh = FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)
        return torch.compile(fresh, fullgraph=True, backend="aot_eager")

    found = gradients(side, wrap, writable=False)
    (args, kwargs), _ = side.arguments(writable=False)
    with torch.no_grad():
        inference = outputs(wrap(side.fresh())(*args, **kwargs))
    return {**found, **{f"{name} without gradients": tensor for name, tensor in inference.items()}}


def autocast(side: Subject) -> Tensors:
    """As `gradients`, with the model's call under autocast to bfloat16."""

    def wrap(model: torch.nn.Module) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(side.tensors()[0].device.type, dtype=torch.bfloat16):
                return model(*args, **kwargs)

        return call

    return gradients(side, wrap)


def second_derivatives(side: Subject) -> Tensors:
    """The Hessian of the loss, over parameters and inputs together, times a vector."""
    model = side.fresh()
    (args, kwargs), leaves = side.arguments()
    variables = {**parameters(model), **leaves}
    slopes = _grad(projection(model(*args, **kwargs)), [*variables.values()], create_graph=True)
    products = [weighed(slope, start=3) for slope in slopes]
    seconds = _grad(sum(products[1:], products[0]), [*variables.values()])
    return {f"product: {name}": second for name, second in zip(variables, seconds)}


def forward_mode(side: Subject) -> Tensors:
    """The change of the outputs along a direction of parameters and inputs, by `torch.func.jvp`."""
    model = side.fresh()
    _, leaves = side.arguments()
    variables = {name: t.detach() for name, t in {**parameters(model), **leaves}.items()}

    def call(variables: dict[str, Tensor]) -> dict[str, Tensor]:
        result = _functional(model, variables, _replaced(side.inputs, variables))
        return {name: t for name, t in outputs(result).items() if differentiable(t)}

    directions = {name: scattered(t, 5) for name, t in variables.items()}
    changes = jvp(call, (variables,), (directions,))[1]
    return {f"tangent of {name}": change for name, change in changes.items()}


def per_example(side: Subject) -> Tensors:
    """The parameters' gradients for each of the first examples of the batch, dimension 0, by `vmap` of `grad`."""
    model = side.fresh()
    variables = {name: t.detach() for name, t in parameters(model).items()}
    if not variables:
        raise RuntimeError("no parameter requires grad")
    leaves, tree = pytree.tree_flatten(side.inputs)
    numbers = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def loss(variables: dict[str, Tensor], example: list[Tensor]) -> Tensor:
        inputs = list(leaves)
        for i, tensor in zip(numbers, example):
            inputs[i] = tensor.unsqueeze(0)
        return projection(_functional(model, variables, pytree.tree_unflatten(inputs, tree)))

    examples = [leaves[i].detach()[:EXAMPLES] for i in numbers]
    found = vmap(grad(loss), in_dims=(None, 0), randomness="different")(variables, examples)
    return {f"gradient: {name}": t for name, t in found.items()}


def state_dicts(side: Subject) -> Tensors:
    """Torch's state loaded into this side's model, and what that saves loaded into torch's, both strict."""
    here, there = side.fresh(), side.torchs.fresh()
    state = {name: _other(value) for name, value in there.state_dict().items()}
    here.load_state_dict(state, strict=True)
    saved = here.state_dict()
    there.load_state_dict(saved, strict=True)
    both = {"saved": saved, "loaded": there.state_dict()}
    return {f"{how}: {k}": v for how, states in both.items() for k, v in states.items() if isinstance(v, Tensor)}


def optimizer(side: Subject, name: str, options: dict[str, Any]) -> Tensors:
    """Parameters and state after steps of an optimizer, along torch's gradients at the start, of changing size.

    Both sides get the same gradients, so that the update rule alone is compared. With gradients of their own two right
    programs part: where a gradient is zero but for rounding, Adam divides the rounding by itself and moves by lr.
    """
    leader, model = side.torchs.fresh(), side.fresh()
    (args, kwargs), _ = side.arguments()
    projection(leader(*args, **kwargs)).backward()
    updates = getattr(side.optim, name)(model.parameters(), **options)
    found: Tensors = {}
    for step in range(1, STEPS + 1):
        for mine, its in zip(model.parameters(), leader.parameters()):
            mine.grad = None if its.grad is None else its.grad * (1 + math.cos(step * step) / 2)
        updates.step()
        if step in (1, STEPS):
            for key, p in parameters(model).items():
                found[f"parameter after step {step}: {key}"] = p.detach().clone()
                for state, value in updates.state[p].items():
                    found[f"{state} after step {step}: {key}"] = _state(state, value)
    return found


def training(side: Subject) -> Tensors:
    """Twenty steps of this side's model with this side's SGD and its own gradients.

    The first step has the length 1e-3, whatever the size of the gradient: far from where it started a model may
    amplify rounding without bound.
    """
    model = side.fresh()
    updates = side.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for step in range(1, STEPS + 1):
        updates.zero_grad()
        (args, kwargs), _ = side.arguments()
        result = model(*args, **kwargs)
        projection(result).backward()
        if step == 1:
            length = math.hypot(*(p.grad.norm().item() for p in model.parameters() if p.grad is not None))
            updates.param_groups[0]["lr"] /= length or 1.0
        updates.step()
    trained = {f"parameter: {name}": p.detach() for name, p in parameters(model).items()}
    return {**outputs(result), **trained, **_buffers(model)}


OPTIMIZERS = {
    "SGD momentum": ("SGD", {"lr": 1e-2, "momentum": 0.9}),
    "SGD Nesterov": ("SGD", {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "RMSprop": ("RMSprop", {"lr": 1e-3}),
    "Adagrad": ("Adagrad", {"lr": 1e-2}),
    "Adam": ("Adam", {"lr": 1e-3}),
    "AdamW": ("AdamW", {"lr": 1e-3}),
}
CHECKS = (
    Check("outputs", plain_outputs, plain_outputs),
    Check("gradients", gradients, gradients),
    Check("second derivatives", second_derivatives, second_derivatives),
    Check("forward mode", forward_mode, forward_mode),
    Check("per-example gradients", per_example, per_example),
    Check("compile", compiled, gradients),
    Check("autocast", autocast, autocast, autocast=True),
    Check("state_dict", state_dicts, exact=True),
    Check("training", training, training),
    *(Check(key, partial(optimizer, name=name, options=o)) for key, (name, o) in OPTIMIZERS.items()),
)


def _functional(model: torch.nn.Module, variables: dict[str, Tensor], inputs: Any) -> Any:
    """Call the model with other parameters, and with copies of its buffers, which a transform must not write to."""
    state = {name: b.clone() for name, b in model.named_buffers()}
    state |= {name: t for name, t in variables.items() if not name.startswith("input ")}
    args, kwargs = inputs
    return functional_call(model, state, args, kwargs)


def _replaced(inputs: Any, variables: dict[str, Tensor]) -> Any:
    """Return the inputs with those that are variables in their places; the rest as copies."""
    those = iter([t for name, t in variables.items() if name.startswith("input ")])

    def replace(value: Tensor) -> Tensor:
        return (next(those) if differentiable(value) else value).clone()

    return pytree.tree_map_only(Tensor, replace, inputs)


def _grad(loss: Tensor, variables: list[Tensor], **options: Any) -> list[Tensor]:
    """Return gradients, zeros where there are none."""
    if not variables:
        raise RuntimeError("neither a parameter nor an input can be differentiated")
    found: Any = [None] * len(variables)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, variables, allow_unused=True, **options)
    return [torch.zeros_like(v) if g is None else g for v, g in zip(variables, found)]


def _state(name: str, value: Any) -> Tensor:
    """Return one entry of an optimizer's state. The count of steps is a float in torch, whatever the model's dtype."""
    tensor = torch.as_tensor(value).detach().clone()
    return tensor.long() if name == "step" else tensor


def _buffers(model: torch.nn.Module) -> Tensors:
    return {f"buffer: {name}": b.detach().clone() for name, b in model.named_buffers()}


def _other(value: Any) -> Any:
    """Return a tensor with other numbers than the model's, of the same shape and dtype."""
    return scattered(value, 7).abs() if isinstance(value, Tensor) and differentiable(value) else value
