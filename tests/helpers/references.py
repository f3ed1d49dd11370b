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


# Methods with a state: from the gradient function of one micro-batch, w, the state before and the step to s and the
# state after. All micro-batches share a state, and its mean goes on.
Update = Callable[[Callable[[Vector], Vector], Vector, tuple, int], tuple[Vector, tuple]]


def step_of(update: Update, gradients: Gradients, w: Vector, state: tuple, step: int) -> tuple[Vector, tuple]:
    """The mean over micro-batches of what comes out, and of the state."""
    results = [update(gradient, w, state, step) for gradient in gradients]
    states = zip(*(state for _, state in results), strict=True)
    return np.mean([s for s, _ in results], axis=0), tuple(np.mean(parts, axis=0) for parts in states)


def towards(direction: Vector, rho: float) -> Vector:
    return rho * direction / length(direction) if length(direction) else np.zeros_like(direction)


def across(x: Vector, y: Vector) -> Vector:
    return x - x @ y / (y @ y) * y


def gsam(gradient, w, state, step, rho, alpha=0.3):
    g = gradient(w)
    s = gradient(w + towards(g, rho))
    return s - alpha * across(g, s), ()


def wsam(gradient, w, state, step, rho, gamma=0.7):
    g = gradient(w)
    return g + gamma / (1 - gamma) * (gradient(w + towards(g, rho)) - g), ()


def friendly_sam(gradient, w, state, step, rho, sigma=0.7, decay=0.9):
    g, (m,) = gradient(w), state
    after = decay * m + (1 - decay) * g if step else g
    return gradient(w + towards(g - sigma * m, rho)), (after,)


def vasso(gradient, w, state, step, rho, theta=0.4):
    d = (1 - theta) * state[0] + theta * gradient(w)
    return gradient(w + towards(d, rho)), (d,)


def look_sam(gradient, w, state, step, rho, period=2, alpha=0.3):
    g, (v,) = gradient(w), state
    if step % period:
        return g + towards(v, alpha * length(g)), (v,)
    s = gradient(w + towards(g, rho))
    return s, (across(s, g),)


def sam_every(gradient, w, state, step, rho, period=2):
    g = gradient(w)
    return g if step % period else gradient(w + towards(g, rho)), ()


def ae_sam(gradient, w, state, step, rho, decay=0.9):
    g, (mean, deviation) = gradient(w), state
    mean = decay * mean + (1 - decay) * (g @ g)
    deviation = np.sqrt(decay * deviation**2 + (1 - decay) * (g @ g - mean) ** 2)
    threshold = 1 - step / 4
    s = gradient(w + towards(g, rho)) if g @ g >= mean + threshold * deviation else g
    return s, (mean, deviation)


def momentum_sam(gradient, w, state, step, rho, decay=0.9):
    s = gradient(w - towards(state[0], rho))
    return s, (decay * state[0] + s,)


def lagged_sam(gradient, w, state, step, rho, decay=0.9):
    s = gradient(w + towards(state[0], rho))
    return s, (decay * state[0] + s,)


class Optimizer:
    """Clipping by the global norm, weight decay, then momentum, at a learning rate that falls linearly to zero."""

    def __init__(self, steps: int, nesterov: bool) -> None:
        self.steps, self.nesterov, self.velocity = steps, nesterov, 0.0

    def step(self, w: Vector, s: Vector, index: int) -> Vector:
        s = s * min(1.0, 0.8 / length(s)) + 0.01 * w
        self.velocity = s + 0.9 * self.velocity
        direction = s + 0.9 * self.velocity if self.nesterov else self.velocity
        return w - 0.1 * (1 - index / self.steps) * direction
