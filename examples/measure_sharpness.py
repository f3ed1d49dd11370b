"""How sharp two solutions are: their spectra, the rise around them, and the line between them.

python examples/measure_sharpness.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_sam

images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16
batches = [(images[start:][:256], labels[start:][:256]) for start in range(0, 1280, 256)]  # the loss is their mean


def loss_fn(params, batch):
    logits = jax.nn.relu(batch[0] @ params["hidden"]) @ params["output"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def train(link):
    estimator, optimizer = optax_sam.gradient_estimator(loss_fn, link), optax.sgd(0.2, momentum=0.9)

    @jax.jit
    def step(params, link_state, state, batch):
        _, grads, link_state = estimator.value_and_grad(params, link_state, batch)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), link_state, state

    first, second = jax.random.split(jax.random.key(0))
    params = {"hidden": jax.random.normal(first, (64, 64)) / 6, "output": jax.random.normal(second, (64, 10)) / 8}
    link_state, state, found = estimator.init(params), optimizer.init(params), None
    for epoch in range(60):
        for batch in batches:
            params, link_state, state = step(params, link_state, state, batch)
        if epoch % 20 == 19:  # while training: a few products with the Hessian, from the last eigenvector
            found = optax_sam.track_eigenvalue(loss_fn, params, batches, found)
            print(f"  epoch {epoch + 1}: largest eigenvalue {found.value:.3f} (± {found.residual:.0e})")
    return params


ends = {}
for name, link in {"SGD": optax.identity(), "SAM": optax_sam.sam(rho=0.1)}.items():
    print(name)
    ends[name] = train(link)
    spectrum = optax_sam.hessian_eigenvalues(loss_fn, ends[name], batches, k=3, rtol=0.01)
    trace = optax_sam.hessian_trace(loss_fn, ends[name], batches)
    worst = optax_sam.m_sharpness(loss_fn, ends[name], batches[0], rho=0.1, num_micro_batches=2)
    average = optax_sam.average_sharpness(loss_fn, ends[name], batches, sigma=0.01)
    print(f"  eigenvalues {np.round(spectrum.values, 3)}, trace {trace.mean:.2f} ± {trace.standard_error:.2f}")
    print(f"  rise within 0.1: {worst:.4f}; in noise of 0.01 per weight: {average.mean:.5f}")
line = optax_sam.loss_along(loss_fn, ends["SAM"], ends["SGD"], batches, positions=np.linspace(0, 1, 5))
print("from SAM to SGD:", jnp.round(jnp.asarray(line.losses), 4))
