"""SAM in Optimistix: a chain is an Optax optimizer, and ``OptaxMinimiser`` hands it the loss that the link needs.

python examples/optimistix_minimiser.py
"""

import jax.numpy as jnp
import numpy as np
import optax
import optimistix
from sklearn.datasets import load_digits

import optax_sam

images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16


def loss_fn(params, batch):
    """Logistic regression of all the images at once, with weight decay."""
    x, y = batch
    loss = optax.softmax_cross_entropy_with_integer_labels(x @ params["kernel"] + params["bias"], y).mean()
    return loss + 1e-3 * jnp.sum(params["kernel"] ** 2)


# OptaxMinimiser calls update with ``value`` and ``value_fn``: the link differentiates that at w + ε.
tx = optax.chain(optax_sam.sam(rho=0.1), optax.sgd(0.5, momentum=0.9))
solver = optimistix.OptaxMinimiser(tx, rtol=1e-4, atol=1e-5)
params = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
batch = jnp.asarray(images[:1347]), jnp.asarray(labels[:1347])
solution = optimistix.minimise(loss_fn, solver, params, args=batch, max_steps=2_000, throw=False)
found = solution.value
accuracy = jnp.mean((images[1347:] @ found["kernel"] + found["bias"]).argmax(-1) == labels[1347:])
print(f"{solution.stats['num_steps']} steps, loss {loss_fn(found, batch):.3f}, test accuracy {100 * accuracy:.1f} %")
