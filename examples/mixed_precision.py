"""SAM in float16 with a dynamic loss scale; the params, norms and w + ε are in float32.

    python examples/mixed_precision.py

In bfloat16 no scale is needed: replace ``HALF``, and the scale by 1. Keep the params in float32 in any case.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_sam

HALF, GROWTH_INTERVAL = jnp.float16, 100


def loss_fn(params, batch, scale):
    x, y = batch
    hidden, bias, output = (params[name].astype(HALF) for name in ("hidden", "bias", "output"))
    logits = (jax.nn.relu(x.astype(HALF) @ hidden + bias) @ output).astype(jnp.float32)
    return scale * optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


# SAM's ascent is normalized: ε is the same under any scale. (USAM's is not, nor are averages of gradients over steps.)
estimator = optax_sam.gradient_estimator(loss_fn, optax_sam.late(optax_sam.sam(rho=0.1), start=100))
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))


@jax.jit
def step(params, states, scale, good_steps, batch):
    """The next params, states, scale and number of steps since an overflow, in which nothing but the scale changes."""
    sam_state, state = states
    loss, grads, sam_state = estimator.value_and_grad(params, sam_state, batch, scale)
    grads = optax.tree.scale(1 / scale, grads)  # before they are clipped
    is_finite = jnp.isfinite(optax_sam.norm(grads))
    updates, state = tx.update(grads, state, params)
    after = optax.apply_updates(params, updates), (sam_state, state)
    params, states = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), after, (params, states))
    good_steps = jnp.where(is_finite, good_steps + 1, 0)
    scale = jnp.where(is_finite, jnp.where(good_steps % GROWTH_INTERVAL == 0, 2 * scale, scale), scale / 2)
    return params, states, scale, good_steps, loss / scale


def start():
    first, second = jax.random.split(jax.random.key(0))
    hidden, output = jax.random.normal(first, (64, 128)) / 6, jax.random.normal(second, (128, 10)) / 8
    params = {"hidden": hidden, "bias": jnp.zeros(128), "output": output}
    return params, (estimator.init(params), tx.init(params)), jnp.float32(2.0**24), jnp.int32(0)


if __name__ == "__main__":
    images, labels = load_digits(return_X_y=True)
    images, carry, loss = images.astype(np.float32) / 16, start(), jnp.nan
    for epoch in range(20):
        order = np.random.default_rng(epoch).permutation(1347)
        for rows in np.split(order[: 21 * 64], 21):
            *carry, loss = step(*carry, (images[rows], labels[rows]))
    print(f"last loss {loss:.3f}, loss scale {carry[2]:.0f}, {carry[3]} steps since the last overflow")
