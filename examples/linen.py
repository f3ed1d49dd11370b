"""SAM in Flax Linen, with BatchNorm and dropout: the estimator in place of ``jax.value_and_grad``.

python examples/linen.py
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import optax_sam

images, labels = load_digits(return_X_y=True)
images, test = images.astype(np.float32) / 16, slice(1347, None)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, is_training):
        x = nn.BatchNorm(use_running_average=not is_training)(nn.Dense(128)(x))
        x = nn.Dropout(0.2, deterministic=not is_training)(nn.relu(x))
        return nn.Dense(10)(x)


class State(TrainState):
    batch_stats: Any
    sam_state: optax.OptState


def loss_fn(params, batch, batch_stats, key):
    variables, rngs = {"params": params, "batch_stats": batch_stats}, {"dropout": key}
    logits, after = Network().apply(variables, batch[0], True, rngs=rngs, mutable=["batch_stats"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean(), after["batch_stats"]


# Aux is that of the clean pass: the statistics never see w + ε. Both passes draw the mask of one key.
estimator = optax_sam.gradient_estimator(loss_fn, optax_sam.late(optax_sam.sam(rho=0.1), start=200), has_aux=True)


@jax.jit
def step(state, batch, key):
    value, grads, sam_state = estimator.value_and_grad(state.params, state.sam_state, batch, state.batch_stats, key)
    return state.apply_gradients(grads=grads, batch_stats=value[1], sam_state=sam_state), value[0]


variables = Network().init(jax.random.key(0), images[:2], False)
sam_state = estimator.init(variables["params"])
state = State.create(apply_fn=Network().apply, tx=optax.adamw(3e-3), sam_state=sam_state, **variables)
for epoch in range(20):
    order = np.random.default_rng(epoch).permutation(1347)
    for rows in np.split(order[: 21 * 64], 21):
        state, loss = step(state, (images[rows], labels[rows]), jax.random.fold_in(jax.random.key(1), state.step))
variables = {"params": state.params, "batch_stats": state.batch_stats}
logits = jnp.asarray(Network().apply(variables, images[test], False))
print(f"test accuracy {100 * jnp.mean(logits.argmax(-1) == labels[test]):.1f} %")
