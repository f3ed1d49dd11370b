"""Low-rank adapters (LoRA) in Flax NNX: SAM over the adapters, and SAM over the weights that they are added to.

    python examples/lora.py

A network trained on digits that lie on their side is adapted to upright ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import optax_sam
import optax_sam.nnx

upright, labels = load_digits(return_X_y=True)
upright = upright.reshape(-1, 8, 8).astype(np.float32) / 16
turned, test = np.rot90(upright, axes=(1, 2)), slice(1347, None)


class Network(nnx.Module):
    def __init__(self, rngs):
        first, last = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 10, rngs=rngs)
        self.first = nnx.LoRA(64, 8, 128, base_module=first, rngs=rngs)
        self.last = nnx.LoRA(128, 8, 10, base_module=last, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x.reshape(-1, 64))))


def loss_fn(model, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


def train(model, value_and_grad, wrt, images, epochs):
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=wrt)
    step = nnx.jit(lambda model, optimizer, batch: optimizer.update(model, value_and_grad(model, batch)[1]))
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(1347)
        for rows in np.split(order[: 21 * 64], 21):
            step(model, optimizer, (jnp.asarray(images[rows]), jnp.asarray(labels[rows])))
    return 100 * jnp.mean(model(jnp.asarray(upright[test])).argmax(-1) == labels[test])


kernels = lambda params: jax.tree.map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)  # noqa: E731
adapters = nnx.DiffState(0, nnx.LoRAParam)
GRADIENTS = {
    "Adam": nnx.value_and_grad(loss_fn, argnums=adapters),
    "SAM over adapters": optax_sam.nnx.value_and_grad(loss_fn, optax_sam.sam(rho=0.05), argnums=adapters),
    # Gradients of all params, an ascent of the frozen kernels alone: the way of Flat-LoRA, with SAM's direction.
    "SAM over kernels": optax_sam.nnx.value_and_grad(loss_fn, optax_sam.sam(rho=0.05, mask=kernels)),
}
for name, value_and_grad in GRADIENTS.items():
    model = Network(nnx.Rngs(0))
    before = train(model, nnx.value_and_grad(loss_fn), nnx.Not(nnx.LoRAParam), turned, epochs=10)
    after = train(model, value_and_grad, nnx.LoRAParam, upright, epochs=10)
    print(f"{name:<18} {before:.1f} % → {after:.1f} % of upright digits")
