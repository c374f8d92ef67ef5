"""What one recorded training step says of a layer: see `torch_bp.diagnostics.reading` for symbols and for `None`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finiteness:
    """How many numbers there were, and how many of them are NaN or infinite; of weights 1 stands for at least one.

    Attributes:
        examples: places of the first 8 examples that hold such a number, along dimension 0 of the micro-batches of the
            step one after the other; at level "full" alone, and of this process.
    """

    count: int
    nan: int
    inf: int
    examples: tuple[int, ...] = ()

    @property
    def ok(self) -> bool:
        return not (self.nan or self.inf)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of the finite values between edges of equal distance, and of those that are not finite.

    Attributes:
        low, high: the least and the largest finite value; 0 and 0 where there is none.
        counts: of each of the bins between them; the last one includes `high`.
        mean, square_mean: of the finite values, and of their squares.
        nan, inf: values that are in no bin.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    mean: float
    square_mean: float
    nan: int = 0
    inf: int = 0


@dataclass(frozen=True, slots=True)
class DeadUnit:
    """A unit whose output did not depend on its input for any example, at every record since `since`.

    For ReLU its derivative was 0 everywhere; for others it was below the threshold of saturation.

    Attributes:
        unit: column of the layer's output.
        since: first recorded step of the unbroken run in which it was dead.
        cause: "input" if it gets nothing to react to (its inputs were 0), "bias" if the bias alone keeps z where the
            derivative vanishes (it would be alive with bias 0), else "weights".
        weight_norm: of its row of the weights.
        pre_activation_max: largest z of the batch, which a revival has to lift above 0.
        bias: its bias; None without one.
    """

    unit: int
    since: int
    cause: str
    weight_norm: float
    pre_activation_max: float
    bias: float | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """Numbers of which only this is kept: norms of single examples' gradients, values of an input or an output.

    `min` and `max` are NaN where they have not been measured, as for inputs.
    """

    count: int
    mean: float
    std: float
    min: float
    max: float


@dataclass(frozen=True, slots=True)
class LayerReading:
    """One layer at one step. Layers are in the order in which the forward pass called them.

    Attributes:
        name: path of the module in the model, as in `named_modules()`.
        kind: name of its class, "Linear".
        activation: name of the class of the activation module that is applied to its output, possibly after a
            normalisation; None where there is none, or it is applied as a function.
        units: width of the output.
        weight_norm, grad_norm, update_norm: of all parameters of the layer together: before the step, of their
            gradient, and of what the step changed: 0 for a layer that the optimizer does not have, or has not updated.
        update_ratio: update_norm / weight_norm; about 1e-3 in healthy training.
        signal_norm: |dz|.
        signal_ratio: |dz| / |dz| of the next layer: below 1 the signal fades on its way back, above 1 it grows. It is
            the product of the two factors where nothing lies between the layers but the activation.
        weight_factor: |da| / |dz of the next layer|, where da = W^T dz of the next layer, sec. 3.1 item 1: what the
            next layer's weights do to the signal.
        derivative_factor: |f'(z) da| / |da|, item 2: what this layer's activation does to it.
        activation_mean, activation_var: over all examples and units of a, or of z where `activation` is None.
        dead_units: units whose derivative was 0, or below the threshold, for all examples of the step.
        saturated: share of all units of all examples whose derivative was so, |f'(z)| < 0.01, whatever its largest
            value is (0.25 for a sigmoid); ReLU's is about a half.
        dead: the dead units one by one, at level "full", at most 32 of them; none after an activation that has written
            over z.
        histogram: of a.
        signal_histogram: of dz.
        forward, backward, weight: finite values of a, of dz, and of the parameters.
        per_example: norms of the gradients that single examples contribute to this layer, times the batch size where
            the loss is a mean.
    """

    name: str
    kind: str
    activation: str | None = None
    units: int | None = None
    weight_norm: float | None = None
    grad_norm: float | None = None
    update_norm: float | None = None
    update_ratio: float | None = None
    signal_norm: float | None = None
    signal_ratio: float | None = None
    weight_factor: float | None = None
    derivative_factor: float | None = None
    activation_mean: float | None = None
    activation_var: float | None = None
    saturated: float | None = None
    dead_units: int | None = None
    dead: tuple[DeadUnit, ...] = ()
    histogram: Histogram | None = None
    signal_histogram: Histogram | None = None
    forward: Finiteness | None = None
    backward: Finiteness | None = None
    weight: Finiteness | None = None
    per_example: Spread | None = None
