"""SAM in Equinox: params are the arrays of the model, the rest is put back in the loss.

python examples/equinox_filtered.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_sam

images, labels = load_digits(return_X_y=True)
images, test = images.astype(np.float32) / 16, slice(1347, None)

model = eqx.nn.MLP(64, 10, width_size=128, depth=2, key=jax.random.key(0))
# eqx.filter_value_and_grad picks out the arrays itself; here the model is split into params and the static rest first.
params, static = eqx.partition(model, eqx.is_inexact_array)


def loss_fn(params, batch):
    x, y = batch
    model = eqx.combine(params, static)
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()


# mSAM with one ascent for every 8 examples. A module of Equinox is a tree, so masks are made by its methods or by
# optax_sam.normalization_layers, which knows eqx.nn.LayerNorm and the others.
value_and_grad = optax_sam.value_and_grad(loss_fn, optax_sam.sam(rho=0.1), num_micro_batches=8)
tx = optax.adamw(3e-3)


@eqx.filter_jit
def step(params, state, batch):
    loss, grads = value_and_grad(params, batch)
    updates, state = tx.update(grads, state, params)
    return eqx.apply_updates(params, updates), state, loss


state = tx.init(params)
for epoch in range(20):
    order = np.random.default_rng(epoch).permutation(1347)
    for rows in np.split(order[: 21 * 64], 21):
        params, state, loss = step(params, state, (images[rows], labels[rows]))
logits = jax.vmap(eqx.combine(params, static))(images[test])
print(f"test accuracy {100 * jnp.mean(logits.argmax(-1) == labels[test]):.1f} %")
