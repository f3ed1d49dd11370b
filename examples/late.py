"""Late SAM: one compiled program, SAM in the last quarter of the steps, Adam's moments carried across.

python examples/late.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_sam

images, labels = load_digits(return_X_y=True)
images, test = images.astype(np.float32) / 16, slice(1347, None)
STEPS = 40 * 21


def logits_of(params, x):
    return jax.nn.relu(x @ params["hidden"] + params["bias"]) @ params["output"]


def loss_fn(params, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, x), y).mean()


# A late phase wants a larger rho than SAM all along. To start the optimizer afresh at the switch as well, put whole
# optimizers into optax_sam.switch_at({0: optax.adamw(1e-3), start: optax.chain(sam, optax.adamw(1e-3))}).
late = optax_sam.late(optax_sam.sam(rho=0.3), start=STEPS * 3 // 4)
tx = optax.chain(optax_sam.measured(late), optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=0.1))


@jax.jit
def step(params, state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    # Before the switch the second gradient is not evaluated: the step costs what it did without SAM.
    updates, state = tx.update(grads, state, params, value=loss, value_fn=loss_fn, batch=batch)
    return optax.apply_updates(params, updates), state, loss


first, second = jax.random.split(jax.random.key(0))
hidden, output = jax.random.normal(first, (64, 128)) / 6, jax.random.normal(second, (128, 10)) / 8
params = {"hidden": hidden, "bias": jnp.zeros(128), "output": output}
state = tx.init(params)
for epoch in range(40):
    order = np.random.default_rng(epoch).permutation(1347)
    for rows in np.split(order[: 21 * 64], 21):
        params, state, loss = step(params, state, (images[rows], labels[rows]))
    if epoch % 10 == 9:
        train = images[:1347], labels[:1347]
        largest = optax_sam.hessian_eigenvalues(loss_fn, params, [train], rtol=0.01).values[0]
        on = optax_sam.measurements(state).active
        accuracy = 100 * jnp.mean(logits_of(params, images[test]).argmax(-1) == labels[test])
        print(f"epoch {epoch + 1}, SAM {on:.0f}: largest eigenvalue {largest:.3f}, test accuracy {accuracy:.1f} %")
