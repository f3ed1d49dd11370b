"""The methods in NumPy: float64, params in one vector, gradient functions in, the gradient for the optimizer out.

Each takes the gradient functions of the micro-batches; those that do not average over micro-batches use their mean.
"""

from collections.abc import Callable, Sequence

import numpy as np

Vector = np.ndarray
Gradients = Sequence[Callable[[Vector], Vector]]


def mean(gradients: Gradients, w: Vector) -> Vector:
    return np.mean([gradient(w) for gradient in gradients], axis=0)


def length(x: Vector) -> float:
    return float(np.sqrt(np.sum(x * x)))


def sam(gradients: Gradients, w: Vector, rho: float) -> Vector:
    g = mean(gradients, w)
    return mean(gradients, w + rho * g / length(g))


def sam_of_first_four(gradients: Gradients, w: Vector, rho: float) -> Vector:
    g = mean(gradients, w) * (np.arange(len(w)) < 4)
    return mean(gradients, w + rho * g / length(g))


def usam(gradients: Gradients, w: Vector, rho: float) -> Vector:
    return mean(gradients, w + rho * mean(gradients, w))


def asam(gradients: Gradients, w: Vector, rho: float, eta: float = 0.01) -> Vector:
    g, t = mean(gradients, w), np.abs(w) + eta
    return mean(gradients, w + rho * t * t * g / length(t * g))


def stable_sam(gradients: Gradients, w: Vector, rho: float, max_scale: float = np.inf) -> Vector:
    s = sam(gradients, w, rho)
    return s * min(max_scale, length(mean(gradients, w)) / length(s))


def truncated(gradients: Gradients, w: Vector, rho: float) -> Vector:
    return stable_sam(gradients, w, rho, max_scale=1.0)


def msam(gradients: Gradients, w: Vector, rho: float) -> Vector:
    return np.mean([sam([gradient], w, rho) for gradient in gradients], axis=0)


def stable_msam(gradients: Gradients, w: Vector, rho: float) -> Vector:
    return np.mean([stable_sam([gradient], w, rho) for gradient in gradients], axis=0)


def three_ascents_in_a_ball(gradients: Gradients, w: Vector, rho: float, radius: float = 0.12) -> Vector:
    epsilon, s = np.zeros_like(w), mean(gradients, w)
    for _ in range(3):
        epsilon = epsilon + rho * s / length(s)
        epsilon = epsilon * min(1.0, radius / length(epsilon))
        s = mean(gradients, w + epsilon)
    return s


class Optimizer:
    """Clipping by the global norm, weight decay, then momentum, at a learning rate that falls linearly to zero."""

    def __init__(self, steps: int, nesterov: bool) -> None:
        self.steps, self.nesterov, self.velocity = steps, nesterov, 0.0

    def step(self, w: Vector, s: Vector, index: int) -> Vector:
        s = s * min(1.0, 0.8 / length(s)) + 0.01 * w
        self.velocity = s + 0.9 * self.velocity
        direction = s + 0.9 * self.velocity if self.nesterov else self.velocity
        return w - 0.1 * (1 - index / self.steps) * direction
