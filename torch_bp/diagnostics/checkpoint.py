"""What is wrong with a checkpoint: its weights, and what the optimizer has gathered."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_bp.diagnostics.finding import Finding, gravest_first
from torch_bp.diagnostics.remedy import EARLIER_CHECKPOINT, INIT

_MODELS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights")
_OPTIMIZERS = ("optimizer_states", "optimizer_state_dict", "optimizer", "optim", "optimizers")
_STEPS = ("global_step", "step", "steps", "iteration")
_EMBEDDINGS = ("emb", "wte", "wpe")  # whose rows are no weights of a sum
SCALE_LOW, SCALE_HIGH = 0.02, 50.0  # of rms(W) sqrt(fan_in): 0.58 as torch draws them, 1.4 as He et al. do
DEAD = 0.5  # share of units
FAR = 10.0  # norms of its weights by which a bias is beyond what they can make of standardized inputs
ADAPTIVE_RATE = 1.0  # in one step of Adam or RMSprop each weight changes by about the rate


@dataclass
class Checkpoint:
    """Its parts: tensors by name, states of optimizers as `Optimizer.state_dict` has them, and the step."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizers: list[Mapping[str, Any]] = field(default_factory=list)
    step: int = 0


def read_checkpoint(path: str | Path, trust: bool = False) -> Checkpoint:
    """A file that `torch.save` or Lightning wrote: a state_dict, or a dict with states of a model and its optimizers.

    Args:
        path: the file.
        trust: load Python objects too, which runs code that the file names.

    Raises:
        ValueError: it is no checkpoint, is half-written, holds Python objects and is not trusted, or has no tensors.
        OSError: it cannot be read.
    """
    if not Path(path).stat().st_size:
        raise ValueError(f"checkpoint: {path} must be a file of torch.save, got an empty one.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if trust or not _is_pickle(path):
            raise ValueError(f"checkpoint: {path} must be a file of torch.save, got something else.") from error
        raise ValueError(
            f"checkpoint: {path} must hold tensors and plain values alone, got Python objects. "
            "Pass --trust (trust=True) if you know who wrote it: loading them runs their code."
        ) from error
    except Exception as error:  # what the bytes of a foreign or torn file make the unpickler do has no bounds
        if not _is_pickle(path):
            raise ValueError(f"checkpoint: {path} must be a file of torch.save, got something else.") from error
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint: {path} must be a whole file of torch.save, got {reason}") from error
    found = _parts(content)
    if not (found.weights or found.optimizers):
        keys = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"checkpoint: {path} must hold a state_dict, got {keys[:120] or 'an empty dict'}.")
    return found


def _is_pickle(path: str | Path) -> bool:
    """Whether it is what `torch.save` makes: a zip file, or a pickle as of old."""
    with Path(path).open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def _parts(content: Any) -> Checkpoint:
    content = content.state_dict() if isinstance(content, torch.nn.Module) else content
    if not isinstance(content, Mapping):
        return Checkpoint()
    if "param_groups" in content and "state" in content:
        return Checkpoint(optimizers=[content])
    found = Checkpoint({name: value for name, value in content.items() if isinstance(value, Tensor)})
    for key in _MODELS:
        value = content.get(key)
        value = value.state_dict() if isinstance(value, torch.nn.Module) else value
        if isinstance(value, Mapping):
            found.weights = {name: each for name, each in value.items() if isinstance(each, Tensor)}
            break
    for key in _OPTIMIZERS:
        value = content.get(key)
        states = value if isinstance(value, list | tuple) else [value]
        found.optimizers += [s for s in states if isinstance(s, Mapping) and "param_groups" in s]
    steps = [int(content[key]) for key in _STEPS if isinstance(content.get(key), int | float)]
    found.step = steps[0] if steps else 0
    return found


def inspect_checkpoint(checkpoint: Checkpoint) -> list[Finding]:
    """What is wrong with it, the gravest first.

    Example:
        >>> weights = {"0.weight": torch.ones(3, 4), "0.bias": torch.zeros(3)}
        >>> for found in inspect_checkpoint(Checkpoint(weights)):
        ...     print(found.kind, "-", found.cause)
        bad initialization - all units have the same weights, so that they learn the same
    """
    findings: list[Finding] = []
    for name, weight in checkpoint.weights.items():
        findings += _of_weight(name, weight, checkpoint)
    for state in checkpoint.optimizers:
        findings += _of_optimizer(state, checkpoint.step)
    return gravest_first(findings)


def _of_weight(name: str, weight: Tensor, checkpoint: Checkpoint) -> Iterator[Finding]:
    layer, _, part = name.rpartition(".")
    if not weight.is_floating_point() or not weight.numel():
        return
    weight = weight.detach().float()
    if bad := int((~weight.isfinite()).sum()):
        cause = f"{bad} of {weight.numel()} values of {name} are NaN or infinite"
        yield Finding("NaN or Inf", layer, checkpoint.step, float(bad), 0.0, cause, EARLIER_CHECKPOINT, "error")
    elif part == "weight" and weight.dim() > 1 and not any(word in name for word in _EMBEDDINGS):
        yield from _of_matrix(layer, weight.flatten(1), checkpoint)


def _of_matrix(layer: str, weight: Tensor, checkpoint: Checkpoint) -> Iterator[Finding]:
    """Of a linear map or a convolution: a row of weights a unit."""
    step = checkpoint.step
    scale = float(weight.square().mean().sqrt()) * math.sqrt(weight.shape[1])
    if scale == 0:
        cause = "all weights are 0"
        yield Finding("bad initialization", layer, step, 0.0, SCALE_LOW, cause, INIT, "error", action="init")
        return
    if len(weight) > 1 and bool((weight[1:] == weight[:1]).all()):
        cause = "all units have the same weights, so that they learn the same"
        yield Finding("bad initialization", layer, step, 0.0, 0.0, cause, INIT, "error", action="init")
    elif not SCALE_LOW <= scale <= SCALE_HIGH:
        large = scale > SCALE_HIGH
        cause = f"a unit multiplies the scale of its input by {scale:.2g}: its weights are too "
        cause += "large" if large else "small"
        limit = SCALE_HIGH if large else SCALE_LOW
        yield Finding("bad initialization", layer, step, scale, limit, cause, INIT, action="init")
    bias = checkpoint.weights.get(f"{layer}.bias" if layer else "bias")
    norms = weight.norm(dim=1)
    dead = norms == 0
    if bias is not None and bias.shape == norms.shape:
        dead |= bias.float() < -FAR * norms
    share = float(dead.float().mean())
    if share >= DEAD:
        cause = f"{int(dead.sum())} of {len(dead)} units have no weights, or a bias far below what these can lift: "
        cause += "before a rectifier they are dead"
        yield Finding("dead units", layer, step, share, DEAD, cause, INIT, action="init")


def _of_optimizer(state: Mapping[str, Any], step: int) -> Iterator[Finding]:
    names = _parameter_names(state)
    for group in state["param_groups"]:
        rate = float(group.get("lr", 1e-3))
        if rate == 0:
            yield Finding("rate too low", "", step, 0.0, 0.0, "the learning rate is 0", "set lr, such as lr=1e-3")
        elif not rate < ADAPTIVE_RATE and ("betas" in group or "alpha" in group):
            cause = f"a rate of {rate:g} changes each weight by about as much in a step"
            yield Finding("rate too high", "", step, rate, ADAPTIVE_RATE, cause, f"lr={rate / 1000:g}", action="lr*0.1")
    held = {index: of for index, of in state.get("state", {}).items() if isinstance(of, Mapping)}
    for index, of in held.items():
        for key, value in of.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                cause = f"{key} of {names.get(index, index)} has NaN or infinite values: its next step has, too"
                cure = "go back to a checkpoint before it, or begin with a new optimizer"
                yield Finding("NaN or Inf", _layer(names, index), step, 1.0, 0.0, cause, cure, "error")
        squares = of.get("exp_avg_sq", of.get("square_avg"))
        if isinstance(squares, Tensor) and squares.numel() and not bool(squares.any()):
            cause = f"the gradients of {names.get(index, index)} have been 0 in all steps"
            yield Finding("no gradient", _layer(names, index), step, 0.0, 0.0, cause, INIT)
    if held and (without := [index for index in names if index not in held]):
        shown = ", ".join(names[index] for index in without[:4])
        cause = f"{shown} never had a gradient: the loss does not depend on them"
        cure = "call the layer in forward, without .detach() or torch.no_grad()"
        yield Finding("unused parameters", _layer(names, without[0]), step, float(len(without)), 0.0, cause, cure)


def _parameter_names(state: Mapping[str, Any]) -> dict[Any, str]:
    """By index: as the optimizer was told, else "parameter 3"."""
    names: dict[Any, str] = {}
    for group in state["param_groups"]:
        given = group.get("param_names") or [f"parameter {index}" for index in group["params"]]
        names |= dict(zip(group["params"], given))
    return names


def _layer(names: Mapping[Any, str], index: Any) -> str:
    return names.get(index, "").rpartition(".")[0]
