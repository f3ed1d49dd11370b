"""Training of small networks: every method and data set, with checkpoints, and what is measured at the end."""

import functools
import math
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import optax_sam
from benchmarks.papers.reproduction import Reproduction
from examples.training import checkpoints, datasets, models

EVALUATION_BATCH = 1_000
HESSIAN_EXAMPLES, HESSIAN_BATCH, HESSIAN_RTOL = 2_000, 500, 1e-2
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
SGD_SETTINGS = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}


class Task(NamedTuple):
    """A network and what it is to learn.

    Attributes:
        network: from images, or whatever the data has in their place, to logits.
        data: training and test set.
        epochs: of a run, unless it says otherwise.
        batch_size: of a step.
        augments: whether images are shifted and mirrored.
        label_smoothing: of the training loss.
        pretrained: params to start from in place of random ones, by the name of a part of the network.
    """

    network: nn.Module
    data: datasets.Dataset
    epochs: int
    batch_size: int = 128
    augments: bool = True
    label_smoothing: float = 0.0
    pretrained: Any = None

    def settings(self) -> dict[str, Any]:
        """All of this that is known by its name."""
        return {
            "network": " ".join(repr(self.network).split()),
            "images": len(self.data.train_images),
            "test_images": len(self.data.test_images),
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "augments": self.augments,
            "label_smoothing": self.label_smoothing,
        }

    def steps_per_epoch(self) -> int:
        return len(self.data.train_images) // self.batch_size

    def loss_fn(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The training loss of a batch, its labels smoothed if asked for."""
        logits: Any = self.network.apply({"params": params}, batch[0])
        labels = jax.nn.one_hot(batch[1], logits.shape[-1])
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(labels, self.label_smoothing)).mean()

    def clean_loss_fn(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The loss of a batch without smoothing."""
        logits: Any = self.network.apply({"params": params}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def init(self, seed: int) -> Any:
        """Random params, but for the pretrained ones."""
        params = self.network.init(jax.random.key(seed), jnp.asarray(self.data.train_images[:1]))["params"]
        return {**params, **(self.pretrained or {})}

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Indices and a key for each step of an epoch, the same for every method."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self.data.train_images))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), epoch), self.steps_per_epoch())
        for index, key in enumerate(keys):
            yield jnp.asarray(order[index * self.batch_size :][: self.batch_size]), key


class Run(NamedTuple):
    """One training run.

    Attributes:
        name: of its folder; what the run does, in words.
        link: in front of the optimizer.
        optimizer: behind it.
        seed: of the initial params and of the order of the batches.
        num_micro_batches: M, of the estimator.
        start: params to start from, instead of initial ones.
        epochs: instead of the task's.
    """

    name: str
    link: optax.GradientTransformation
    optimizer: optax.GradientTransformation
    seed: int
    num_micro_batches: int = 1
    start: Any = None
    epochs: int | None = None


class Trained(NamedTuple):
    """What a run ended with.

    Attributes:
        params: the last ones; not finite if the run diverged.
        history: by name, what was measured after the epochs in ``history["epoch"]``.
    """

    params: Any
    history: dict[str, list[float]]


class Trainer:
    """Trains runs of one task, each once: a finished run is restored from its last checkpoint.

    Args:
        task: what is trained.
        folder: for a folder of each run.
        settings: what else a run depends on; it is not restored with others.
        evaluations: how often a run is evaluated and saved.
        hessian_examples: how many of the training examples the sharpness is of.
    """

    def __init__(
        self,
        task: Task,
        folder: pathlib.Path,
        settings: dict[str, Any],
        evaluations: int = 5,
        hessian_examples: int = HESSIAN_EXAMPLES,
    ) -> None:
        self.task, self.folder, self.evaluations, self.hessian_examples = task, folder, evaluations, hessian_examples
        self.settings = task.settings() | settings
        self.images, self.labels = jnp.asarray(task.data.train_images), jnp.asarray(task.data.train_labels)
        self.step = functools.cache(self._make_step)
        self._scores = jax.jit(self._scores_of_batch)

    def train(self, run: Run, bar: tqdm.tqdm | None = None) -> Trained:
        """Trains the network of a run, from its last checkpoint if there is one."""
        epochs = run.epochs or self.task.epochs
        step = self.step(run.link, run.optimizer, run.num_micro_batches)
        params = self.task.init(run.seed) if run.start is None else run.start
        state = jax.tree.map(jnp.copy, (params, run.link.init(params), run.optimizer.init(params)))
        every = max(epochs // self.evaluations, 1)
        folder = self.folder / run.name
        checkpoints.claim(
            folder, {**self.settings, "epochs": epochs, "evaluations": self.evaluations, "M": run.num_micro_batches}
        )
        with checkpoints.Checkpoints(folder / "checkpoints") as saved:
            state, history = saved.restore(state, {"epoch": [], "train_loss": [], "test_accuracy": []})
            first = int(history["epoch"][-1]) if history["epoch"] else 0
            for epoch in range(first, epochs):
                for batch, key in self.task.batches(run.seed, epoch):
                    state = step(state, self.images, self.labels, batch, key)
                if (epoch + 1) % every == 0 or epoch + 1 == epochs:
                    history["epoch"].append(epoch + 1)
                    history["train_loss"].append(self.score(state[0], self.images, self.labels)[0])
                    test = self.task.data.test_images, self.task.data.test_labels
                    history["test_accuracy"].append(self.score(state[0], *test)[1])
                    saved.save(epoch + 1, state, history)
                if bar is not None:
                    bar.update()
        if bar is not None:
            bar.update(first)
            bar.set_postfix_str(f"{run.name}: {100 * history['test_accuracy'][-1]:.1f} %")
        return Trained(state[0], history)

    def _make_step(self, link, optimizer, num_micro_batches):
        estimator = optax_sam.gradient_estimator(self.task.loss_fn, link, num_micro_batches=num_micro_batches)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, images, labels, batch, key):
            params, link_state, optimizer_state = state
            inputs = datasets.crop_and_flip(key, images[batch]) if self.task.augments else images[batch]
            _, grads, link_state = estimator.value_and_grad(params, link_state, (inputs, labels[batch]))
            updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
            return optax.apply_updates(params, updates), link_state, optimizer_state

        return step

    def _scores_of_batch(self, params, images, labels):
        logits: Any = self.task.network.apply({"params": params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.stack([losses.sum(), (logits.argmax(axis=-1) == labels).sum()])

    def score(self, params: Any, images: Any, labels: Any) -> tuple[float, float]:
        """Mean loss, without smoothing, and accuracy."""
        parts = [slice(start, start + EVALUATION_BATCH) for start in range(0, len(images), EVALUATION_BATCH)]
        sums = [self._scores(params, images[part], labels[part]) for part in parts]
        loss, correct = (np.sum(jax.device_get(sums), axis=0) / len(images)).tolist()
        return loss, correct

    def outcome(self, run: Run, bar: tqdm.tqdm | None = None) -> dict[str, float]:
        """Trains, and says what came out: accuracy, loss and sharpness at the end."""
        params, history = self.train(run, bar)
        scores = {key: history[key][-1] for key in ("test_accuracy", "train_loss")}
        return {**scores, "eigenvalue": self.largest_eigenvalue(params)}

    def hessian_batches(self) -> list[tuple[jax.Array, jax.Array]]:
        """The first examples of the training set, as they are, for measures of sharpness."""
        images, labels = self.images[: self.hessian_examples], self.labels[: self.hessian_examples]
        parts = [slice(start, start + HESSIAN_BATCH) for start in range(0, len(images), HESSIAN_BATCH)]
        return [(images[part], labels[part]) for part in parts]

    def largest_eigenvalue(self, params: Any) -> float:
        """Of the Hessian of the training loss, without smoothing, decay and augmentation; nan if the run diverged."""
        if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params)):
            return math.nan
        loss_fn, batches = self.task.clean_loss_fn, self.hessian_batches()
        return float(optax_sam.hessian_eigenvalues(loss_fn, params, batches, rtol=HESSIAN_RTOL).values[0])


def cifar10(reproduction: Reproduction, num_images: int, epochs: int, **options: Any) -> Task:
    """The first images of CIFAR-10 and a small residual network with GroupNorm, at half the resolution."""
    if reproduction.smoke:
        return digits(num_images=256, epochs=2, **options)
    data = datasets.load("cifar10", reproduction.data_dir)
    data = data._replace(train_images=data.train_images[:num_images], train_labels=data.train_labels[:num_images])
    return Task(models.ResNet(blocks=1, stem_stride=2), data, epochs, **options)


def digits(num_images: int, epochs: int, **options: Any) -> Task:
    """Scikit-learn's digits and a network that compiles and trains in a second."""
    data = datasets.load("digits", pathlib.Path())
    data = data._replace(train_images=data.train_images[:num_images], train_labels=data.train_labels[:num_images])
    return Task(models.MLP(width=8), data, epochs, **{"augments": False, **options})


def decayed_sgd(
    task: Task,
    learning_rate: float,
    epochs: int | None = None,
) -> optax.GradientTransformation:
    """SGD with momentum and weight decay behind the link, and the cosine schedule of a whole run."""
    steps = (epochs or task.epochs) * task.steps_per_epoch()
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    return sgd(schedule, WEIGHT_DECAY)


def sgd(learning_rate: optax.ScalarOrSchedule, weight_decay: float) -> optax.GradientTransformation:
    """SGD with momentum and weight decay behind the link."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, MOMENTUM))
