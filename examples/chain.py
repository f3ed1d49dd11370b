"""SAM in plain JAX and Optax: one link in front of the optimizer, one keyword more in ``update``.

python examples/chain.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_sam

images, labels = load_digits(return_X_y=True)
images, test = images.astype(np.float32) / 16, slice(1347, None)


def logits_of(params, x):
    return jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["output"]


def loss_fn(params, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, x), y).mean()


# What follows the link acts on the SAM gradient: clipping, weight decay, momentum, schedules.
tx = optax.chain(
    optax_sam.measured(optax_sam.sam(rho=0.1)),
    optax.clip_by_global_norm(5.0),
    optax.add_decayed_weights(1e-3),
    optax.sgd(optax.cosine_decay_schedule(0.1, decay_steps=20 * 21), momentum=0.9),
)


@jax.jit
def step(params, state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    # The link evaluates the gradient once more, at w + ε. ``value`` and ``value_fn`` serve ``measured`` as well.
    updates, state = tx.update(grads, state, params, value=loss, value_fn=loss_fn, batch=batch)
    return optax.apply_updates(params, updates), state, loss


first, second = jax.random.split(jax.random.key(0))
hidden, output = jax.random.normal(first, (64, 128)) / 6, jax.random.normal(second, (128, 10)) / 8
params = {"hidden": hidden, "bias": jnp.zeros(128), "output": output}
state = tx.init(params)
for epoch in range(20):
    order = np.random.default_rng(epoch).permutation(1347)
    for rows in np.split(order[: 21 * 64], 21):
        params, state, loss = step(params, state, (images[rows], labels[rows]))
m = optax_sam.measurements(state)
accuracy = jnp.mean(logits_of(params, images[test]).argmax(-1) == labels[test])
print(f"test accuracy {100 * accuracy:.1f} %; L(w) {m.clean_loss:.3f} → L(w + ε) {m.perturbed_loss:.3f}")
