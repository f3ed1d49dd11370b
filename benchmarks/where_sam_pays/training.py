"""A whole training as one compiled program, for every value of the hyperparameters, and what it is judged by."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_sam
from benchmarks.where_sam_pays.methods import Method
from benchmarks.where_sam_pays.settings import Sample, Setting
from examples.training import datasets

MOMENTUM = 0.9
HESSIAN_RTOL = 1e-2


class Hyperparameters(NamedTuple):
    """What is tuned. The decay is L2 under SGD, and decoupled under AdamW."""

    learning_rate: float
    weight_decay: float
    rho: float


class Trainer:
    """Trains a network with a method in a setting, again and again."""

    def __init__(self, setting: Setting, method: Method) -> None:
        self.setting, self.method = setting, method
        self.train = jax.jit(self._train)
        self.accuracy = jax.jit(self._accuracy)

    def run(self, hyperparameters: Hyperparameters, seed: int, sample: Sample) -> tuple[Any, float]:
        """The last params, and how many gradients a step took."""
        params, gradients = self.train(hyperparameters, seed, sample.inputs, sample.labels)
        return params, float(gradients)

    def loss_fn(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Without decay."""
        logits: Any = self.setting.network.apply({"params": params}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def largest_eigenvalue(self, params: Any, sample: Sample) -> float:
        """Of the Hessian of the loss of the training set, its labels as they are; nan if the run diverged."""
        if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params)):
            return float("nan")
        batches = [(sample.inputs, sample.labels)]
        return float(optax_sam.hessian_eigenvalues(self.loss_fn, params, batches, rtol=HESSIAN_RTOL).values[0])

    def _train(self, hyperparameters, seed, inputs, labels):
        setting, method = self.setting, self.method
        init_key, order_key, link_key = jax.random.split(jax.random.key(seed), 3)
        steps = setting.steps(method.epochs)
        link = method.link(hyperparameters.rho, steps, link_key)
        if method.gradients is None:
            link = optax_sam.measured(link)
        estimator = optax_sam.gradient_estimator(
            self.loss_fn, link, num_micro_batches=method.micro_batches or setting.batch_size
        )
        optimizer = optimizer_of(setting.optimizer, hyperparameters, steps)

        def step(state, batch_and_key):
            params, link_state, optimizer_state, total = state
            batch, key = batch_and_key
            images = datasets.crop_and_flip(key, inputs[batch]) if setting.augments else inputs[batch]
            _, grads, link_state = estimator.value_and_grad(params, link_state, (images, labels[batch]))
            updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
            if method.gradients is None:
                total += 1 + optax_sam.measurements(link_state).active
            return (optax.apply_updates(params, updates), link_state, optimizer_state, total), None

        params = setting.network.init(init_key, inputs[:1])["params"]
        start = params, estimator.init(params), optimizer.init(params), jnp.zeros([])
        keys = jax.random.split(jax.random.fold_in(order_key, 1), steps)
        (params, _, _, total), _ = jax.lax.scan(step, start, (self._orders(order_key, steps), keys))
        return params, total / steps if method.gradients is None else method.gradients

    def _orders(self, key, steps):
        """Which examples each step takes, (steps, batch size): every epoch all of them, in an order of its own."""
        examples, size = self.setting.num_train, self.setting.batch_size
        epochs = jax.random.split(key, steps // (examples // size))
        return jax.vmap(lambda key: jax.random.permutation(key, examples))(epochs).reshape(steps, size)

    def _accuracy(self, params, inputs, labels):
        logits: Any = self.setting.network.apply({"params": params}, inputs)
        return jnp.mean(logits.argmax(axis=-1) == labels)


def optimizer_of(name: str, hyperparameters: Hyperparameters, steps: int) -> optax.GradientTransformation:
    """SGD with momentum and L2, or AdamW, whose learning rate follows a cosine down to 0."""
    cosine = optax.cosine_decay_schedule(1.0, steps)
    schedule = lambda step: hyperparameters.learning_rate * cosine(step)  # noqa: E731
    if name == "adamw":
        return optax.adamw(schedule, weight_decay=hyperparameters.weight_decay)
    return optax.chain(optax.add_decayed_weights(hyperparameters.weight_decay), optax.sgd(schedule, MOMENTUM))


@functools.cache
def trainer_of(setting: Setting, method: Method) -> Trainer:
    """One for each pair, so that its program is compiled once."""
    return Trainer(setting, method)
