"""SAM in Flax NNX: ``optax_sam.nnx.value_and_grad`` in place of ``nnx.value_and_grad``.

python examples/nnx_batchnorm.py
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import optax_sam
import optax_sam.nnx

images, labels = load_digits(return_X_y=True)
images, test = images.astype(np.float32) / 16, slice(1347, None)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.norm = nnx.Linear(64, 128, rngs=rngs), nnx.BatchNorm(128, rngs=rngs)
        self.dropout, self.output = nnx.Dropout(0.2, rngs=rngs), nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.output(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def loss_fn(model, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


# Both passes draw the same dropout mask, the next step another; statistics and counters are those of the clean pass. A
# link with state, such as optax_sam.late(…), needs optax_sam.nnx.gradient_estimator.
value_and_grad = optax_sam.nnx.value_and_grad(loss_fn, optax_sam.sam(rho=0.1))


@nnx.jit
def step(model, optimizer, batch):
    loss, grads = value_and_grad(model, batch)
    optimizer.update(model, grads)
    return loss


model = Network(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
for epoch in range(20):
    order = np.random.default_rng(epoch).permutation(1347)
    for rows in np.split(order[: 21 * 64], 21):
        loss = step(model, optimizer, (jnp.asarray(images[rows]), jnp.asarray(labels[rows])))
model.eval()
print(f"test accuracy {100 * jnp.mean(model(images[test]).argmax(-1) == labels[test]):.1f} %")
