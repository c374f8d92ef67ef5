"""Losses of runs as they are seen in practice, drawn by a seed: healthy ones, and sick ones with the step it begins."""

import math
import random


def _noise(draw, kind):
    if kind == "normal":
        return draw.gauss(0, 1)
    if kind == "student":  # three degrees of freedom
        return draw.gauss(0, 1) / math.sqrt(sum(draw.gauss(0, 1) ** 2 for _ in range(3)) / 3)
    return draw.lognormvariate(0, 0.7) - math.exp(0.245)


def decay(draw, steps, kind="normal"):
    first, floor, rate = draw.uniform(0.5, 10), draw.uniform(0, 0.5), draw.uniform(0.002, 0.05)
    size = draw.uniform(0.01, 0.15)
    for t in range(steps):
        level = floor + first * math.exp(-rate * t)
        yield level + size * (level + 0.1 * first) * _noise(draw, kind)


def student(draw, steps):
    yield from decay(draw, steps, "student")


def lognormal(draw, steps):
    yield from decay(draw, steps, "lognormal")


def power(draw, steps):
    """As of language models, in nats."""
    for t in range(steps):
        yield 2 + 9 * (t + 1) ** -draw.uniform(0.28, 0.32) + 0.08 * draw.gauss(0, 1)


def stuck(draw, steps):
    """It learns nothing."""
    level, size = draw.uniform(0.1, 5), draw.uniform(0.001, 0.2)
    for _ in range(steps):
        yield level * (1 + size * draw.gauss(0, 1))


def hard_batches(draw, steps):
    """One batch in twenty is of a hard kind."""
    for t in range(steps):
        level = 0.3 + 2 * math.exp(-0.01 * t)
        yield (3.0 if draw.random() < 0.05 else 1.0) * level + 0.05 * draw.gauss(0, 1)


def nearly_zero(draw, steps):
    """A classifier that has learned its data: losses of many sizes, and a mistake now and then."""
    for t in range(steps):
        level = 2.3 * math.exp(-0.03 * t) + 1e-4
        yield level * draw.lognormvariate(0, 0.8) + (0.1 * draw.random() if draw.random() < 0.01 else 0)


def cyclic(draw, steps):
    """A cyclic rate: the loss rises and falls with it by up to a third."""
    period = draw.randrange(100, 600)
    for t in range(steps):
        level = 0.5 + 2 * math.exp(-0.02 * t)
        yield level * (1 + 0.15 * (1 - math.cos(2 * math.pi * t / period))) + 0.05 * draw.gauss(0, 1)


def restarts(draw, steps):
    """Warm restarts: at each, the loss jumps by a quarter of what was gained."""
    period = draw.randrange(150, 400)
    for t in range(steps):
        jump = 0.5 * math.exp(-0.02 * (t % period)) if t >= period else 0
        yield 0.4 + 2 * math.exp(-0.03 * t) + jump + 0.05 * draw.gauss(0, 1)


def below_zero(draw, steps):
    """A density: the loss goes through zero."""
    for t in range(steps):
        yield 3 * math.exp(-0.02 * t) - 2 + 0.1 * draw.gauss(0, 1)


def correlated(draw, steps):
    """Batches that resemble those before them."""
    wave = 0.0
    for t in range(steps):
        wave = 0.9 * wave + draw.gauss(0, 0.04)
        yield 0.5 + 1.5 * math.exp(-0.02 * t) + wave


def staircase(draw, steps):
    """A rate that is cut now and then."""
    for t in range(steps):
        yield 2.0 * 0.4 ** (t // 200) + 0.05 * draw.gauss(0, 1)


HEALTHY = [
    *(decay, student, lognormal, power, stuck, hard_batches, nearly_zero),
    *(cyclic, restarts, below_zero, correlated, staircase),
]


def explosion(draw, losses, begin):
    """It doubles every few steps."""
    time = draw.uniform(1, 20)
    return [loss + 0.05 * (2 ** (max(0, t - begin) / time) - 1) for t, loss in enumerate(losses)]


def jump(draw, losses, begin):
    """To twice where it began, and there it stays."""
    height = 2 * abs(losses[0]) + 1
    return [loss + (height if t >= begin else 0) for t, loss in enumerate(losses)]


def creep(draw, losses, begin):
    """A line up, to where it began in a few hundred steps."""
    slope = max(abs(losses[0] - losses[begin]), 0.5) / draw.uniform(150, 400)
    return [loss + slope * max(0, t - begin) for t, loss in enumerate(losses)]


def blown(draw, losses, begin):
    return [math.nan if t >= begin else loss for t, loss in enumerate(losses)]


SICK = [explosion, jump, creep, blown]


def healthy(kind, seed, steps):
    return list(kind(random.Random(f"{kind.__name__} {seed}"), steps))


def sick(sickness, kind, seed, steps, begin):
    draw = random.Random(f"{sickness.__name__} {seed}")
    return sickness(draw, healthy(kind, seed, steps), begin)
