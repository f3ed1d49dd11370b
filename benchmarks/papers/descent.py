"""Descent on toy problems: a whole path in one compiled loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def descend(
    loss_fn: Callable[[jax.Array], jax.Array],
    start: Any,
    link: optax.GradientTransformation,
    optimizer: optax.GradientTransformation,
    steps: int,
) -> jax.Array:
    """The path of params, (steps + 1, number of params), of an optimizer behind a link."""
    tx, grad_fn = optax.chain(link, optimizer), jax.grad(loss_fn)

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        w, state = carry
        updates, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
        w = optax.apply_updates(w, updates)
        return (w, state), w

    w = jnp.asarray(start)
    _, path = jax.lax.scan(step, (w, tx.init(w)), length=steps)
    return jnp.concatenate([w[None], path])
