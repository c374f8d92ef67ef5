"""A `Reading` of one step of a `Sequential`, by plain autograd: what rules are judged on needs no hooks."""

import torch
from torch import nn

from torch_bp.diagnostics import Finiteness, Labels, LayerReading, Reading, Spread

SATURATED = 0.01  # derivatives below this, as `torch_bp.diagnostics.derivative` has it


class Observed:
    """One forward and backward pass with every z and a kept."""

    def __init__(self, model, x):
        self.layers, self.output, self.input = [], x, x
        for name, module in model.named_children():
            self.output = module(self.output)
            if isinstance(module, nn.Linear):
                self.layers.append([name, module, self.output, None, None])
                if self.output.requires_grad:
                    self.output.retain_grad()
            elif not isinstance(module, nn.BatchNorm1d | nn.Dropout | nn.Flatten) and self.layers:
                self.layers[-1][3:] = [module, self.output]
                if self.output.requires_grad:
                    self.output.retain_grad()

    def reading(self, step, loss, optimizer, before, target, **more):
        """After the optimizer's step; `before` are the parameters before it."""
        parameters = dict.fromkeys(p for _, module, *_ in self.layers for p in module.parameters())
        rows = [self._layer(entry, before) for entry in self.layers]
        for entry, row, following, ahead in zip(self.layers, rows, rows[1:], self.layers[1:]):
            self._ratios(entry, row, following, ahead)
        layers = {row["name"]: LayerReading(**row) for row in rows}
        return Reading(
            step,
            loss=float(loss),
            lr=tuple(group["lr"] for group in optimizer.param_groups),
            grad_norm=norm([p.grad for p in parameters if p.grad is not None]),
            batch=len(self.input),
            layers=layers,
            input=spread(self.input),
            labels=None if target.is_floating_point() else labels(target),
            **more,
        )

    def _layer(self, entry, before):
        name, module, z, activation, a = entry
        parameters = list(module.parameters())
        grads = [p.grad for p in parameters if p.grad is not None]
        weight_norm = norm([before[p] for p in parameters])
        update_norm = norm([p.detach() - before[p] for p in parameters])
        seen = (z if a is None else a).detach()
        row = {"name": name, "kind": "Linear", "units": z.shape[-1], "weight_norm": weight_norm}
        row |= {"update_norm": update_norm, "update_ratio": update_norm / weight_norm if weight_norm else None}
        row |= {"grad_norm": norm(grads) if grads else None, "activation": activation and type(activation).__name__}
        row |= {"activation_mean": float(seen.mean()), "activation_var": float(seen.var(correction=0))}
        row |= {"forward": finiteness(seen), "weight": finiteness(torch.cat([before[p].flatten() for p in parameters]))}
        if z.grad is not None:
            row |= {"signal_norm": norm([z.grad]), "backward": finiteness(z.grad)}
        if activation is not None and not isinstance(activation, nn.Softmax | nn.LogSoftmax):
            leaf = z.detach().requires_grad_()
            small = torch.autograd.grad(activation(leaf).sum(), leaf)[0].abs() < SATURATED
            row |= {"saturated": float(small.float().mean()), "dead_units": int(small.all(0).sum())}
        return row

    def _ratios(self, entry, row, following, ahead):
        a = entry[4] if entry[4] is not None else entry[2]
        if entry[2].grad is None or a.grad is None or not following.get("signal_norm"):
            return
        row["signal_ratio"] = row["signal_norm"] / following["signal_norm"]
        row["weight_factor"] = norm([a.grad]) / following["signal_norm"]
        row["derivative_factor"] = row["signal_norm"] / norm([a.grad]) if norm([a.grad]) else None


def norm(tensors):
    return float(torch.stack([t.detach().double().square().sum() for t in tensors]).sum().sqrt()) if tensors else 0.0


def finiteness(x):
    return Finiteness(x.numel(), int(x.isnan().sum()), int(x.isinf().sum()))


def spread(x):
    return Spread(x.numel(), *(float(v) for v in (x.mean(), x.std(correction=0), x.min(), x.max())))


def labels(target):
    counts = torch.bincount(target)
    changes = float((target[1:] != target[:-1]).float().mean()) if len(target) > 1 else 0.0
    return Labels(len(target), int((counts > 0).sum()), float(counts.max()) / len(target), changes)
