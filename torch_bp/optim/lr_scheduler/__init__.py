"""As `torch.optim.lr_scheduler`, with each schedule stated as one curve of `torch_bp.optim.curves`.

The classes subclass torch's of the same name: constructors, errors, `isinstance` are torch's, and so are the rates,
step for step. Their t is `last_epoch`, the number of steps taken, in epochs or batches. A rate is moved or set:

- `StepLR MultiStepLR ConstantLR LinearLR ExponentialLR PolynomialLR CosineAnnealingLR MultiplicativeLR` *move* the rate
  in force by curve(t) / curve(t - 1), so that others may change it in between.
- `LambdaLR CosineAnnealingWarmRestarts CyclicLR OneCycleLR` *set* it; `ReduceLROnPlateau` cuts it when a metric stands
  still; `SequentialLR`, `ChainedScheduler` and `warmup`, which torch has not, compose.

What differs from torch:

- **Loading.** `load_state_dict` also writes the saved rates, and what else schedules keep in parameter groups,
  into the optimizer, whose own state may be loaded before the schedule is constructed, later, or not at all.
  They travel under one more key, `"_param_groups"`, which torch's classes ignore. Without it (torch's states) all
  but `ReduceLROnPlateau` write their last rates, unless the optimizer has loaded since. Groups match in order.
- **`rescale(total_steps)`** goes on to another length. A state brings its own length back, as torch's does, with a
  warning where the schedule was constructed with another: call it after loading. It refuses, and says what to set
  instead, where there is no length: `StepLR MultiStepLR ExponentialLR MultiplicativeLR LambdaLR CyclicLR
  CosineAnnealingWarmRestarts ReduceLROnPlateau`, and composites of these.
- **Groups added later** with `add_param_group` join every schedule. Their base rate is their `"initial_lr"`
  or, without one, the rate they have at the next step. `OneCycleLR` takes that rate for their `"max_lr"`.
- **Where torch divides by zero** the schedule is defined: see `curves.move` and `curves.one_cycle`.
- **Composites nest**: a sequence or a chain does the same as a part of a sequence as it does alone. So does
  `ConstantLR(total_iters=0)`, which has no end: torch's, as a later part, has ended when it begins.
- **`ReduceLROnPlateau` takes `last_epoch`** as the others do, by keyword.
- **Copies** of a schedule and its optimizer, by `deepcopy` or pickle, step without a warning.
- **A first step that a GradScaler skips** gives no warning about the order of `optimizer.step()`.

`SWALR` is torch's own, as all of `torch.optim.swa_utils` is.
"""

from torch.optim import lr_scheduler as _theirs

from torch_bp._mirror import mirror
from torch_bp.optim.lr_scheduler.composite import ChainedScheduler, SequentialLR, warmup
from torch_bp.optim.lr_scheduler.direct import CosineAnnealingWarmRestarts, CyclicLR, LambdaLR, OneCycleLR
from torch_bp.optim.lr_scheduler.factor import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    PolynomialLR,
    StepLR,
)
from torch_bp.optim.lr_scheduler.plateau import ReduceLROnPlateau

__getattr__, __dir__, __all__ = mirror(globals(), _theirs)
