"""What a recipe measures and keeps while it trains."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer

from torch_bp import nn


class Norms(Callback):
    """Learning rates, and the 2-norms of each weight and of its gradient, every `log_every_n_steps` steps.

    Tags are `lr/group<i>`, `weight/<layer>`, `grad/<layer>`, and `grad/total` over all parameters with their
    biases. Gradients are read after mixed precision has unscaled them and before they are clipped. All norms
    reach the host in one copy.
    """

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # which Lightning sets at run time
        if not trainer.loggers or not every or (trainer.global_step + 1) % every:
            return
        grads = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        weights = {name: p for name, p in pl_module.named_parameters() if p.ndim > 1 and name in grads}
        norms = torch._foreach_norm([*weights.values(), *(grads[name] for name in weights)])
        total = nn.utils.get_total_norm(grads.values())

        layers = [name.removeprefix("model.").removesuffix(".weight") for name in weights]
        tags = [f"{kind}/{layer}" for kind in ("weight", "grad") for layer in layers] + ["grad/total"]
        scalars = dict(zip(tags, torch.stack([*norms, total]).tolist()))
        scalars |= {f"lr/group{i}": float(group["lr"]) for i, group in enumerate(optimizer.param_groups)}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)


class Checkpoint(ModelCheckpoint):
    """As Lightning's. A class of its own keeps its state apart from that of any `ModelCheckpoint` a user adds."""
