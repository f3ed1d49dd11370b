r"""Testing: the promises that every link of this library keeps, as a test for yours.

.. code-block:: python

    from optax_sam.testing import check_link

    def test_my_link():
        check_link(my_link(rho=0.1))
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._checks import as_link
from optax_sam.estimator import gradient_estimator
from optax_sam.sharding import sharded

STEPS, MICRO_BATCHES, SHARDS = 3, 4, 4
STRATEGIES = ("vmap", "unroll", "lazy")


def check_link(link: optax.GradientTransformation, *, skip: Sequence[str] = ()) -> None:
    """Checks on a small problem that a link keeps the promises that other code relies on, and says which it breaks.

    - ``"types"``: outputs have the structure, shapes and dtypes of the params, ``None`` included, and the state after
      an update those of ``init``. Unknown keywords of ``update`` are accepted. Params and state can be donated. The
      same without ``jax.jit``.
    - ``"micro_batches"``: all strategies of the estimator give the same gradients over several steps.
    - ``"shards"``: inside ``sharded`` the result is that of one device: norms and inner products are those of
      ``optax_sam.norm(tree, shards)`` and ``optax_sam.vdot(a, b, shards)``. Random directions differ: skip it.
    - ``"sizes"``: gradients of zero, 1e-18 and 1e18 give finite outputs, points and states.

    Args:
        link: the link, or any ``optax.GradientTransformation``.
        skip: names of checks to leave out.

    Raises:
        TypeError: link is not a transformation.
        ValueError: skip names none of the above.
        AssertionError: a promise is broken; the message says which, and where, or what the link raised.

    Example:
        >>> import optax_sam
        >>> check_link(optax_sam.sam(rho=0.1), skip=["micro_batches"])
        >>> try:
        ...     of_a_shard = optax.chain(optax_sam.sam(rho=0.1), optax.normalize_by_update_norm())
        ...     check_link(of_a_shard, skip=["types", "micro_batches"])
        ... except AssertionError as error:
        ...     print(error)
        "shards": sharded(link) gives other numbers at ['w'], off by 4.8e-01.
    """
    link, skip = as_link("link", link), (skip,) if isinstance(skip, str) else skip
    if unknown := set(skip) - set(CHECKS):
        raise ValueError(f"skip must name some of {', '.join(map(repr, CHECKS))}; got {sorted(unknown)}.")
    for name, check in CHECKS.items():
        try:
            if name not in skip:
                check(link)
        except Exception as error:
            what = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            raise AssertionError(f'"{name}": {what}{error}') from error


def _loss(params: Any, batch: jax.Array) -> jax.Array:
    hidden = jnp.tanh(batch @ params["kernel"] + params["bias"][None])
    return jnp.mean((hidden @ params["output"] - 1) ** 2)


def _problem() -> tuple[Any, jax.Array]:
    """Params, and batches (STEPS, 8, 3)."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "kernel": jax.random.normal(keys[0], (3, 4)),
        "bias": jnp.full(4, 0.1),
        "output": jax.random.normal(keys[1], (4, 2)),
        "nothing": None,
    }
    return params, jax.random.normal(keys[2], (STEPS, 8, 3))


def _types(link: optax.GradientTransformationExtraArgs) -> None:
    params, batches = _problem()

    def update(state, params, batch):
        loss, grads = jax.value_and_grad(_loss)(params, batch)
        keywords = {"grad_fn": jax.grad(_loss), "value_fn": _loss, "value": loss, "batch": batch, "unknown": 1}
        return link.update(grads, state, params, **keywords)

    start = link.init(params)
    outputs, state = jax.eval_shape(update, start, params, batches[0])
    _assert_alike("what update returns", outputs, params)
    _assert_alike("the state after an update", state, start)
    copy = jax.tree.map(jnp.copy, params)
    compiled = jax.jit(update, donate_argnums=(0, 1))(link.init(copy), copy, batches[0])
    _assert_close("update without jax.jit", update(start, params, batches[0])[0], compiled[0])


def _micro_batches(link: optax.GradientTransformationExtraArgs) -> None:
    params, batches = _problem()

    def gradients(strategy):
        estimator = gradient_estimator(_loss, link, num_micro_batches=MICRO_BATCHES, strategy=strategy)

        def step(state, batch):
            _, grads, state = estimator.value_and_grad(params, state, batch)
            return state, grads

        return jax.jit(lambda batches: jax.lax.scan(step, estimator.init(params), batches)[1])(batches)

    looped = gradients("scan")
    for strategy in STRATEGIES:
        _assert_close(f'strategy="{strategy}"', gradients(strategy), looped)


def _shards(link: optax.GradientTransformationExtraArgs) -> None:
    params = {"w": jnp.linspace(0.1, 2.0, SHARDS * 6).reshape(SHARDS, 1, 6)}
    batches = jnp.linspace(0.5, 1.5, STEPS)

    def loss_fn(params, batch):  # of each shard for itself
        return jnp.sum(jnp.sin(batch * params["w"]) ** 2)

    def gradients(link, params):
        def step(state, batch):
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            keywords = {"grad_fn": jax.grad(loss_fn), "value_fn": loss_fn, "value": loss, "batch": batch}
            grads, state = link.update(grads, state, params, **keywords)
            return state, grads

        return jax.lax.scan(step, link.init(params), batches)[1]

    inside = sharded(link, "shards", mask=True)
    members = jax.jit(jax.vmap(lambda shard: gradients(inside, shard), axis_name="shards", out_axes=1))(params)
    whole = jax.jit(lambda w: gradients(link, w))({"w": params["w"].reshape(SHARDS, 6)})
    _assert_close("sharded(link)", members, {"w": whole["w"].reshape(STEPS, SHARDS, 1, 6)})


def _sizes(link: optax.GradientTransformationExtraArgs) -> None:
    params, _ = _problem()

    @jax.jit
    def outputs(size):
        grads = jax.tree.map(lambda w: jnp.full(w.shape, size, w.dtype), params)
        keywords = {
            "grad_fn": lambda point, *_: jax.tree.map(lambda g, w: g + 0 * w, grads, point),  # NaN where the point is
            "value_fn": lambda point, *_: size + 0 * sum(map(jnp.sum, jax.tree.leaves(point))),
            "value": size,
            "batch": jnp.zeros(1),
        }
        outputs, state = link.update(grads, link.init(params), params, **keywords)
        again, state = link.update(grads, state, params, **keywords)
        return {"the output": outputs, "the next output": again, "the state": state}

    for size in (0.0, 1e-18, 1e18):
        for path, leaf in jax.tree.leaves_with_path(outputs(jnp.float32(size))):
            if jnp.issubdtype(leaf.dtype, jnp.inexact) and not np.all(np.isfinite(leaf)):
                place = jax.tree_util.keystr(path)
                raise AssertionError(f"for gradients of {size} there is NaN or inf at {place}.")


CHECKS = {"types": _types, "micro_batches": _micro_batches, "shards": _shards, "sizes": _sizes}


def _assert_alike(what: str, tree: Any, like: Any) -> None:
    found, expected = (jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), part) for part in (tree, like))
    if found != expected:
        raise AssertionError(f"{what} must have the types {expected}; got {found}.")


def _assert_close(what: str, tree: Any, expected: Any) -> None:
    for (path, leaf), other in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(expected), strict=True):
        if not np.allclose(leaf, other, rtol=1e-3, atol=1e-4):
            place, error = jax.tree_util.keystr(path), np.max(np.abs(np.asarray(leaf) - np.asarray(other)))
            raise AssertionError(f"{what} gives other numbers at {place}, off by {error:.1e}.")
