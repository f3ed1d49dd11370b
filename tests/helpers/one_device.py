"""What devices are compared with: the formulas, or the link itself, on one device and part by part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from tests.helpers import references
from tests.helpers.places import BATCH, PARAMS, RHO, together
from tests.helpers.problems import mlp_loss, split


@functools.cache
def compiled(loss_fn):
    return jax.jit(jax.value_and_grad(loss_fn))


def on_one_device(method, ascents, loss_fn=mlp_loss, params=PARAMS, batch=BATCH, weights=None):
    """The loss, and the gradient by a method of the references, with an ascent for each of equal parts of the batch."""
    w, tree_of = ravel_pytree(params)
    weights = np.ones(ascents) if weights is None else np.asarray(weights)
    parts = [jax.tree.map(lambda x, i=i: x[i], split(batch, ascents)) for i in np.flatnonzero(weights)]
    mean = functools.partial(np.average, axis=0, weights=weights[weights > 0])

    def gradient_of(part):
        return lambda w: np.float64(ravel_pytree(compiled(loss_fn)(tree_of(jnp.float32(w)), part)[1])[0])

    loss = mean([compiled(loss_fn)(params, part)[0] for part in parts])
    gradient = mean([method([gradient_of(part)], np.float64(w), RHO) for part in parts])
    return jnp.float32(loss), tree_of(jnp.float32(gradient))


def of_each_part(link, loss_fn, parts, weights=None):
    """(params, state, batch) → loss, gradient and state of a link: the mean of what it does with each part of a batch.

    Floats are averaged, with the weights of the parts; what is not float is that of the first part.
    """
    weights = np.ones(parts) if weights is None else np.asarray(weights)
    chosen = np.flatnonzero(weights)

    def mean(x):
        is_float = jnp.issubdtype(x.dtype, jnp.inexact)
        return jnp.average(x, axis=0, weights=jnp.asarray(weights[chosen], x.dtype)) if is_float else x[0]

    def estimate(params, state, batch):
        def of_one(index, part):
            loss, clean = jax.value_and_grad(loss_fn)(params, part)
            keywords = {"grad_fn": jax.grad(loss_fn), "batch": part, "micro_batch": (index,)}
            return loss, *link.update(clean, state, params, **keywords)

        stacks = jax.tree.map(lambda x: x[chosen], split(batch, parts))
        return jax.tree.map(mean, jax.vmap(of_one)(jnp.asarray(chosen), stacks))

    return estimate


def three_calls(links, estimate_of):
    """(params, batch) → by link, what ``estimate_of(link)(params, state, batch)`` returns in three calls in a row."""

    def of_one(link, params, batch):
        def call(state, _):
            results = estimate_of(link)(params, state, batch)
            return results[-1], results

        return jax.lax.scan(call, link.init(params), length=3)[1]

    return together({name: functools.partial(of_one, link) for name, link in links.items()})


def plain(gradients, w, rho):
    """No ascent, for :func:`on_one_device`."""
    return references.mean(gradients, w)
