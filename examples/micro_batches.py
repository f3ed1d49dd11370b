"""mSAM, and plain SAM with accumulation: the estimator owns the batch and splits it.

python examples/micro_batches.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_sam

images, labels = load_digits(return_X_y=True)
images, test = images.astype(np.float32) / 16, slice(1347, None)
BATCH = 128


def logits_of(params, x):
    return jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["output"]


def loss_fn(params, x, y, valid):
    """The mean over the examples that are not padding."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_of(params, x), y)
    return jnp.sum(valid * losses) / jnp.maximum(jnp.sum(valid), 1)


def train(**options):
    # All three arrays are split. The last batch is padded, and a micro-batch weighs as much as it has valid examples.
    estimator = optax_sam.gradient_estimator(
        loss_fn, optax_sam.sam(rho=0.05), batch_argnums=(1, 2, 3), weight_fn=lambda x, y, valid: valid.sum(), **options
    )
    optimizer = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def step(params, sam_state, state, x, y, valid):
        loss, grads, sam_state = estimator.value_and_grad(params, sam_state, x, y, valid)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), sam_state, state, loss

    first, second = jax.random.split(jax.random.key(0))
    hidden, output = jax.random.normal(first, (64, 128)) / 6, jax.random.normal(second, (128, 10)) / 8
    params = {"hidden": hidden, "bias": jnp.zeros(128), "output": output}
    sam_state, state = estimator.init(params), optimizer.init(params)
    for epoch in range(20):
        order = np.random.default_rng(epoch).permutation(1347)
        for rows in np.split(order, range(BATCH, 1347, BATCH)):
            filled, valid = np.resize(rows, BATCH), np.arange(BATCH) < len(rows)
            params, sam_state, state, _ = step(params, sam_state, state, images[filled], labels[filled], valid)
    return 100 * jnp.mean(logits_of(params, images[test]).argmax(-1) == labels[test])


print(f"mSAM, 8 micro-batches, an ascent each: {train(num_micro_batches=8):.1f} %")
print(f"SAM accumulated over 8, one ascent:    {train(num_micro_batches=8, ascent_per='batch'):.1f} %")
print(f"an ascent for each of 128 examples:    {train(num_micro_batches=BATCH):.1f} %")
