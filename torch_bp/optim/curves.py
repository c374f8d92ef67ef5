"""Learning-rate curves: pure functions of the step count `t` and of a schedule's constants.

Most give a *factor*, the share of the base rate that is in force at step t; `one_cycle` gives the rate (or
momentum) itself. Steps are counted from 0, in the unit in which the schedule is stepped: epochs or batches.
Nothing here knows of optimizers: `torch_bp.optim.lr_scheduler` applies these curves to parameter groups.

Rates are floats, or one-element tensors, which give new tensors.

Sources: the report's sec. 7 (step and exponential decay, cosine annealing, 1cycle); Loshchilov and Hutter,
"SGDR", arXiv:1608.03983 (cosine annealing, warm restarts); Smith and Topin, "Super-Convergence",
arXiv:1708.07120 (1cycle); Smith, "Cyclical Learning Rates", arXiv:1506.01186 (cyclic).
"""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

Rate = float | Tensor


def exponential(t: float, gamma: float) -> float:
    """gamma^t: one decay by the factor `gamma` in every step (report sec. 7.2).

    >>> [exponential(t, gamma=0.5) for t in (0, 1, 3)]
    [1.0, 0.5, 0.125]
    """
    return gamma**t


def step(t: float, step_size: int, gamma: float, since: float = 0) -> float:
    """gamma^(⌊t / step_size⌋ - ⌊since / step_size⌋): one decay every `step_size` steps (report sec. 7.1).

    With `since`, the decay from step `since` to step t. It is exact where the quotient of two factors is not,
    because both have become too small to tell apart. Before step 0 the factor is 1.

    >>> [step(t, step_size=2, gamma=0.5) for t in (1, 2, 5)]
    [1.0, 0.5, 0.25]
    >>> step(4000, step_size=2, gamma=0.5, since=3999)
    0.5
    """
    return exponential(max(t, 0) // step_size - max(since, 0) // step_size, gamma)


def multi_step(t: float, milestones: Mapping[int, int], gamma: float, since: float = -math.inf) -> float:
    """gamma^n, n the number of milestones m with since < m <= t: decay at chosen steps (report sec. 7.1).

    `milestones` says how many decays fall on a step.

    >>> [multi_step(t, milestones={2: 1, 4: 2}, gamma=0.5) for t in (1, 2, 4)]
    [1.0, 0.5, 0.125]
    """
    return exponential(sum(count for m, count in milestones.items() if since < m <= t), gamma)


def constant(t: float, factor: float, total_iters: int) -> float:
    """`factor` for 0 <= t < total_iters, and 1 before and after.

    total_iters = 0 means without end, as torch has it.

    >>> [constant(t, factor=0.25, total_iters=3) for t in (0, 2, 3)]
    [0.25, 0.25, 1.0]
    """
    return 1.0 if t < 0 or 0 < total_iters <= t else factor


def linear(t: float, start_factor: float, end_factor: float, total_iters: int) -> float:
    """start_factor + (end_factor - start_factor) min(t, total_iters) / total_iters; 1 before step 0.

    total_iters = 0 means `start_factor` without end, as torch has it.

    >>> [linear(t, start_factor=0.5, end_factor=1.0, total_iters=4) for t in (0, 1, 9)]
    [0.5, 0.625, 1.0]
    """
    if t < 0:
        return 1.0
    progress = min(t, total_iters) / total_iters if total_iters > 0 else 0.0
    return start_factor + (end_factor - start_factor) * progress


def cosine(t: float, T_max: float, rising: bool = False) -> float:  # noqa: N803
    """(1 + cos(pi t / T_max)) / 2: from 1 at t = 0 down to 0 at t = T_max (report sec. 7.3; SGDR eq. 5).

    It has the period 2 T_max. With `rising`, (1 - cos(pi t / T_max)) / 2: the wave counted from a trough.

    >>> [round(cosine(t, T_max=4), 15) for t in (0, 2, 4)]
    [1.0, 0.5, 0.0]
    >>> cosine(4, T_max=4, rising=True)
    1.0
    """
    wave = math.cos(math.pi * t / T_max)
    return (1 - wave if rising else 1 + wave) / 2


def polynomial(t: float, total_iters: int, power: float) -> float:
    """(1 - min(t, total_iters) / total_iters)^power: from 1 down to 0 at t = total_iters.

    total_iters = 0 means 1 without end, as torch has it. Before step 0 the factor is 1.

    >>> [polynomial(t, total_iters=4, power=2.0) for t in (0, 2, 9)]
    [1.0, 0.25, 0.0]
    """
    return (1.0 - min(max(t, 0), total_iters) / total_iters) ** power if total_iters > 0 else 1.0


def product(t: int, factor: Callable[[int], float], since: int = 0) -> float:
    """factor(since + 1) factor(since + 2) ... factor(t): what a factor of its own in every step has made.

    >>> [product(t, lambda i: 0.5 if i % 2 else 1.0) for t in (0, 1, 4)]
    [1.0, 0.5, 0.25]
    """
    return math.prod((factor(i) for i in range(since + 1, t + 1)), start=1.0)


def triangle(t: float, total_size: float, step_ratio: float) -> tuple[int, float]:
    """`(cycle, height)`: the number of the running cycle, from 1 on, and where between its bounds the rate stands.

    A cycle lasts total_size steps; the height goes from 0 to 1 in the first step_ratio of them, and back. `halving`
    and `exponential` shrink it from cycle to cycle or from step to step (Smith, arXiv:1506.01186).

    >>> [triangle(t, total_size=8, step_ratio=0.25) for t in (0, 1, 10)]
    [(1, 0.0), (1, 0.5), (2, 1.0)]
    """
    cycle, share = t // total_size, t % total_size / total_size
    return int(cycle) + 1, share / step_ratio if share <= step_ratio else (share - 1.0) / (step_ratio - 1.0)


def halving(cycle: int) -> float:
    """2^(1 - cycle): each cycle, counted from 1, half as high as the one before.

    >>> [halving(cycle) for cycle in (1, 2, 4)]
    [1.0, 0.5, 0.125]
    """
    return exponential(cycle - 1, 0.5)


def warm_restarts(t: float, T_0: float, T_mult: int) -> tuple[float, float]:  # noqa: N803
    """`(T_cur, T_i)`: the steps since the last restart and the length of the running cycle (SGDR sec. 3).

    The cycles last T_0, T_0 T_mult, T_0 T_mult^2, ... steps; the factor is `cosine(T_cur, T_i)`. t >= 0 may
    have a fraction. Raises ValueError unless T_0 > 0 and T_mult >= 1.

    >>> [warm_restarts(t, T_0=2, T_mult=3) for t in (1, 2, 9)]
    [(1, 2), (0, 6), (1, 18)]
    """
    if T_0 <= 0 or T_mult < 1:
        raise ValueError(
            f"warm_restarts: T_0 must be > 0 and T_mult >= 1, got T_0={T_0}, T_mult={T_mult}. "
            "For a cosine without restarts use cosine(t, T_max)."
        )
    if T_mult == 1:
        return t % T_0, T_0
    t_cur, t_i = t, T_0
    while t_cur >= t_i:
        t_cur, t_i = t_cur - t_i, t_i * T_mult
    return t_cur, t_i


def between(low: Rate, high: Rate, height: float) -> Rate:
    """low + (high - low) height: the rate at a share `height` of the way from `low` to `high`.

    >>> [between(0.5, 1.0, height) for height in (0.0, 0.5, 1.0)]
    [0.5, 0.75, 1.0]
    """
    return low + (high - low) * height


def anneal(start: Rate, end: Rate, progress: float, strategy: str = "cos") -> Rate:
    """From `start` at progress 0 to `end` at progress 1, along half a cosine ("cos") or a line ("linear").

    Past 1 the curve goes on. Raises ValueError for another `strategy`.

    >>> [round(anneal(1.0, 0.5, progress), 15) for progress in (0.0, 0.5, 1.0)]
    [1.0, 0.75, 0.5]
    >>> anneal(1.0, 0.5, 0.25, strategy="linear")
    0.875
    """
    if strategy == "cos":
        return between(end, start, cosine(progress, 1.0))
    if strategy == "linear":
        return between(start, end, progress)
    raise ValueError(f"anneal: strategy must be 'cos' or 'linear', got {strategy!r}. Pass one of the two.")


def one_cycle(t: float, levels: Sequence[Rate], ends: Sequence[float], strategy: str = "cos") -> Rate:
    """From levels[0] to levels[1] until step ends[0], on to levels[2] until ends[1], ... (report sec. 7.4).

    The rate of a cycle of T steps that rises for a share p of them has the levels (initial, max, min) and the
    ends (p T - 1, T - 1); its momentum has (max, base, max). Three phases: (initial, max, initial, min) and
    (p T - 1, 2 p T - 2, T - 1). A phase that ends where it starts has reached its end level. Past the last
    end the last phase goes on.

    >>> [one_cycle(t, (0.1, 0.9, 0.0), (2, 4), "linear") for t in (0, 1, 2, 3, 4)]
    [0.1, 0.5, 0.9, 0.45, 0.0]
    """
    phase = next((i for i, end in enumerate(ends) if t <= end), len(ends) - 1)
    start, end = (ends[phase - 1] if phase else 0.0), ends[phase]
    progress = (t - start) / (end - start) if end != start else 1.0
    return anneal(levels[phase], levels[phase + 1], progress, strategy)


def log_spaced(t: float, start: float, end: float, steps: int) -> float:
    """start (end / start)^(t / (steps - 1)): from `start` at t = 0 by a constant factor to `end` at t = steps - 1.

    >>> [round(log_spaced(t, start=0.01, end=1.0, steps=5), 15) for t in (0, 2, 4)]
    [0.01, 0.1, 1.0]
    """
    return start * (end / start) ** (t / (steps - 1))


def move(rate: Rate, base_lr: Rate, before: float, now: float, eta_min: float = 0.0) -> Rate:
    """Where `rate` goes when the factor goes from `before` to `now`: eta_min + (rate - eta_min) now / before.

    Moving the rate that is in force, instead of setting it, lets several schedules and the user's own hand
    act on one rate. Where before = 0 the quotient says nothing and the rate moves by the *difference* of the
    closed forms, (base_lr - eta_min) now. A factor that does not change leaves the rate as it is, at 0 too.

    >>> [move(0.5, 1.0, before, now) for before, now in ((1.0, 0.5), (0.0, 0.0), (0.0, 0.25))]
    [0.25, 0.5, 0.75]
    """
    if now == before:
        return rate.clone() if isinstance(rate, Tensor) else rate
    if before == 0:
        return rate + (base_lr - eta_min) * now
    return between(eta_min, rate, now / before)


def improved(metric: float, best: float, mode: str, threshold: float, threshold_mode: str) -> bool:
    """Whether `metric` beats `best` by more than `threshold`; a NaN never does.

    The bar is best (1 ± threshold) in threshold_mode "rel" and best ± threshold in "abs": + in mode "max",
    where more is better, and - in mode "min".

    >>> [improved(metric, 1.0, "min", 0.1, "rel") for metric in (0.8, 0.95, math.nan)]
    [True, False, False]
    """
    margin = -threshold if mode == "min" else threshold
    bar = best * (1.0 + margin) if threshold_mode == "rel" else best + margin
    return metric < bar if mode == "min" else metric > bar


def plateau(
    improved: bool, num_bad_epochs: int, cooldown_counter: int, patience: int, cooldown: int
) -> tuple[int, int, bool]:
    """`(num_bad_epochs, cooldown_counter, reduce)` after one more epoch.

    Epochs without improvement are counted, except during a cooldown; more than `patience` in a row reduce the
    rate and start a cooldown of `cooldown` epochs.

    >>> plateau(True, num_bad_epochs=1, cooldown_counter=0, patience=1, cooldown=3)
    (0, 0, False)
    >>> plateau(False, num_bad_epochs=1, cooldown_counter=0, patience=1, cooldown=3)
    (0, 3, True)
    >>> plateau(False, num_bad_epochs=0, cooldown_counter=3, patience=1, cooldown=3)
    (0, 2, False)
    """
    num_bad_epochs = 0 if improved or cooldown_counter > 0 else num_bad_epochs + 1
    if num_bad_epochs > patience:
        return 0, cooldown, True
    return num_bad_epochs, max(cooldown_counter - 1, 0), False
