"""Trains a small network on real images with SGD and with sharpness-aware methods, and compares them.

    python examples/train.py                                          # digits, five methods, three seeds
    python examples/train.py --dataset cifar10 --data-dir data --method sgd late_sam --checkpoint-dir runs/checkpoints

The part to take home is ``make_step``: one jitted training step for every method. The estimator turns a loss function
and a link into a better gradient; the Optax optimizer behind it does not know.
"""

import argparse
import functools
import logging
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import optax_sam
from examples.training import checkpoints, datasets, models, report

# From (rho, first step of the late phase) to a link; and the rho that --rho replaces.
METHODS = {
    "sgd": (lambda rho, late_start: optax.identity(), 0.0),
    "sam": (lambda rho, late_start: optax_sam.sam(rho), 0.05),
    "usam": (lambda rho, late_start: optax_sam.usam(rho), 0.05),
    "asam": (lambda rho, late_start: optax_sam.asam(rho), 0.5),
    "msam": (lambda rho, late_start: optax_sam.sam(rho), 0.05),
    "stable_sam": (lambda rho, late_start: optax_sam.stable_sam(rho), 0.05),
    "late_sam": (lambda rho, late_start: optax_sam.late(optax_sam.sam(rho), late_start), 0.05),
    "gsam": (lambda rho, late_start: optax_sam.gsam(rho, alpha=0.2), 0.05),
    "wsam": (lambda rho, late_start: optax_sam.wsam(rho, gamma=0.7), 0.05),
    "friendly_sam": (lambda rho, late_start: optax_sam.friendly_sam(rho), 0.05),
    "vasso": (lambda rho, late_start: optax_sam.vasso(rho), 0.05),
    "sam_every": (lambda rho, late_start: optax_sam.sam_every(rho, period=5), 0.1),
    "look_sam": (lambda rho, late_start: optax_sam.look_sam(rho, period=5), 0.1),
    "ae_sam": (lambda rho, late_start: optax_sam.ae_sam(rho), 0.05),
    "momentum_sam": (lambda rho, late_start: optax_sam.momentum_sam(rho), 0.3),
    "lagged_sam": (lambda rho, late_start: optax_sam.lagged_sam(rho), 0.05),
    "random_sam": (lambda rho, late_start: optax_sam.random_sam(rho, key=0), 0.5),
}
DEFAULT_METHODS = ["sgd", "sam", "msam", "stable_sam", "late_sam"]
DEFAULT_MODEL = {"digits": "mlp", "fashion_mnist": "cnn", "cifar10": "resnet"}
SHARPNESS_RHO, SHARPNESS_BATCH, SHARPNESS_EXAMPLES = 0.1, 128, 5_120
EVALUATION_BATCH = 1_000
TIMED_SECONDS, TIMED_ROUNDS = 0.2, 7


class TrainState(flax.training.train_state.TrainState):
    """Flax's TrainState with the state of the link beside that of the optimizer."""

    link_state: optax.OptState


class GradientCounter:
    """Counts the examples whose gradient is really evaluated, by a callback in the backward pass of the loss."""

    def __init__(self) -> None:
        self.examples = 0

    def __call__(self, loss: jax.Array, num_examples: int) -> jax.Array:
        def backward(_, cotangent):
            jax.debug.callback(lambda: self._add(num_examples))
            return (cotangent,)

        counted = jax.custom_vjp(lambda loss: loss)
        counted.defvjp(lambda loss: (loss, None), backward)
        return counted(loss)

    def _add(self, num_examples: int) -> None:
        self.examples += num_examples


class Experiment:
    """Everything the methods share: data, network, optimizer, and the functions compiled once."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.data = datasets.load(settings.dataset, settings.data_dir)
        self.model = models.MODELS[settings.model]()
        self.steps_per_epoch = len(self.data.train_images) // settings.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"--batch-size {settings.batch_size} is more than {len(self.data.train_images)} images")
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.optimizer = make_optimizer(settings, self.total_steps)
        self.images, self.labels = jnp.asarray(self.data.train_images), jnp.asarray(self.data.train_labels)
        self.evaluate_batch = jax.jit(self._evaluate_batch)

    def loss_fn(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, labels = batch
        logits = self.model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def link(self, method: str) -> optax.GradientTransformation:
        make_link, default_rho = METHODS[method]
        rho = default_rho if self.settings.rho is None else self.settings.rho
        return make_link(rho, self.settings.switch_at * self.steps_per_epoch)

    def init(self, method: str, seed: int) -> TrainState:
        params = self.model.init(jax.random.key(seed), self.images[:1])["params"]
        return TrainState.create(
            apply_fn=self.model.apply, params=params, tx=self.optimizer, link_state=self.link(method).init(params)
        )

    def make_step(self, method: str, counter: GradientCounter | None = None) -> Any:
        """One training step for every method: ``(state, images, labels, batch, key) -> (state, loss)``.

        ``batch`` holds indices into the training set, which stays on the device.
        """

        def loss_fn(params, batch):
            loss = self.loss_fn(params, batch)
            return loss if counter is None else counter(loss, len(batch[1]))

        estimator = optax_sam.gradient_estimator(
            loss_fn, self.link(method), num_micro_batches=self.settings.micro_batches if method == "msam" else 1
        )
        augments = self.images.shape[-1] == 3

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, images, labels, batch, key):
            inputs = datasets.crop_and_flip(key, images[batch]) if augments else images[batch]
            loss, grads, link_state = estimator.value_and_grad(state.params, state.link_state, (inputs, labels[batch]))
            return state.apply_gradients(grads=grads, link_state=link_state), loss

        return step

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[jax.Array, ...]]:
        """What the steps of an epoch take behind the state, the same for all methods and for a run that was resumed."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self.images))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), epoch), self.steps_per_epoch)
        for index in range(self.steps_per_epoch):
            start = index * self.settings.batch_size
            batch = jnp.asarray(order[start : start + self.settings.batch_size])
            yield self.images, self.labels, batch, keys[index]

    def _evaluate_batch(self, params, images, labels):
        logits = self.model.apply({"params": params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.sum(), (logits.argmax(axis=-1) == labels).sum()

    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.init("sgd", seed=0).params))

    def evaluate(self, params: Any, images: Any, labels: Any) -> tuple[float, float]:
        """Mean loss and accuracy."""
        parts = [slice(start, start + EVALUATION_BATCH) for start in range(0, len(images), EVALUATION_BATCH)]
        sums = [self.evaluate_batch(params, images[part], labels[part]) for part in parts]
        loss, correct = np.sum(jax.device_get(sums), axis=0)
        return float(loss) / len(images), float(correct) / len(images)

    def m_sharpness(self, params: Any) -> float:
        """Rise of the loss after one normalized ascent per micro-batch, averaged over part of the training set."""
        size = min(SHARPNESS_BATCH, len(self.images))
        number = min(len(self.images), SHARPNESS_EXAMPLES) // size
        batch = self.images[: number * size], self.labels[: number * size]
        return float(optax_sam.m_sharpness(self.loss_fn, params, batch, SHARPNESS_RHO, num_micro_batches=number))


def make_optimizer(settings: argparse.Namespace, total_steps: int) -> optax.GradientTransformation:
    """The base optimizer, with a cosine schedule."""
    schedule = optax.cosine_decay_schedule(settings.learning_rate, total_steps)
    if settings.base == "adamw":
        return optax.adamw(schedule, weight_decay=settings.weight_decay)
    return optax.chain(optax.add_decayed_weights(settings.weight_decay), optax.sgd(schedule, momentum=0.9))


class CompiledMethod:
    """The training step of a method, compiled ahead of time: it cannot recompile, at a switch or elsewhere."""

    def __init__(self, experiment: Experiment, method: str) -> None:
        self.experiment, self.method = experiment, method
        self.counter = GradientCounter()
        arguments = experiment.init(method, seed=0), *next(experiment.batches(seed=0, epoch=0))
        start = time.perf_counter()
        self.step = experiment.make_step(method).lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - start
        self.counted_step = experiment.make_step(method, self.counter)

    def count_gradients(self, state: TrainState, batch: tuple[jax.Array, ...]) -> float:
        """The gradients of a full batch that one step executes, counted on a copy of the state."""
        before = self.counter.examples
        jax.block_until_ready(self.counted_step(jax.tree.map(jnp.copy, state), *batch))
        jax.effects_barrier()
        return (self.counter.examples - before) / self.experiment.settings.batch_size

    def time_steps(self, phase_step: int, num_steps: int) -> float:
        """Seconds per training step, over ``num_steps`` steps from ``phase_step`` of a run on."""
        state = self.experiment.init(self.method, seed=0)
        if self.method == "late_sam":
            state = state.replace(link_state=optax.tree.set(state.link_state, switch_step=jnp.int32(phase_step)))
        batch = next(self.experiment.batches(seed=0, epoch=0))
        jax.block_until_ready(state.params)
        start = time.perf_counter()
        for _ in range(num_steps):
            state, _ = self.step(state, *batch)
        jax.block_until_ready(state.params)
        return (time.perf_counter() - start) / num_steps


def train(experiment: Experiment, method: str, seed: int, compiled: CompiledMethod, bar: tqdm.tqdm) -> dict[str, Any]:
    """Trains one network, from its last checkpoint if there is one; returns what was measured."""
    settings = experiment.settings
    folder = settings.checkpoint_dir and settings.checkpoint_dir / f"{method}-{seed}"
    with checkpoints.Checkpoints(folder) as saved:
        empty = {"test_accuracy": [], "gradients_per_step": []}
        state, history = saved.restore(experiment.init(method, seed), empty)
        first_epoch = len(history["test_accuracy"])
        bar.update(first_epoch * experiment.steps_per_epoch)
        for epoch in range(first_epoch, settings.epochs):
            gradients, counted = (
                0.0,
                epoch % experiment.steps_per_epoch,
            )  # another step each time: some methods alternate
            for index, batch in enumerate(experiment.batches(seed, epoch)):
                if index == counted:
                    gradients = compiled.count_gradients(state, batch)
                state, _ = compiled.step(state, *batch)
                bar.update()
            _, accuracy = experiment.evaluate(state.params, experiment.data.test_images, experiment.data.test_labels)
            history["gradients_per_step"].append(gradients)
            history["test_accuracy"].append(accuracy)
            bar.set_postfix_str(f"{method}, seed {seed}: {100 * accuracy:.1f} % test accuracy")
            saved.save(epoch + 1, state, history)
    train_loss, _ = experiment.evaluate(state.params, experiment.images, experiment.labels)
    return {
        "seed": seed,
        "test_accuracy": history["test_accuracy"][-1],
        "train_loss": train_loss,
        "m_sharpness": experiment.m_sharpness(state.params),
        "history": history,
    }


def measure_step_times(compiled: dict[str, CompiledMethod], experiment: Experiment) -> dict[str, list[float]]:
    """Seconds per step of each method, averaged over the phases of a run; one entry per interleaved round."""
    share = experiment.settings.switch_at / experiment.settings.epochs
    num_steps = int(np.clip(TIMED_SECONDS / compiled["sgd"].time_steps(0, num_steps=3), 2, 100))
    late = experiment.total_steps
    times = {method: [] for method in compiled}
    for _ in range(TIMED_ROUNDS):
        for method, steps in compiled.items():
            before = steps.time_steps(0, num_steps)
            after = steps.time_steps(late, num_steps) if method == "late_sam" else before
            times[method].append(share * before + (1 - share) * after)
    return times


def run(settings: argparse.Namespace) -> dict[str, Any]:
    """Trains every method with every seed and returns all that was measured."""
    experiment = Experiment(settings)
    names = list(dict.fromkeys(["sgd", *settings.method]))
    compiled = {}
    for method in tqdm.tqdm(names, desc="compiling", leave=False, disable=None):
        compiled[method] = CompiledMethod(experiment, method)
    total = len(settings.method) * settings.seeds * experiment.total_steps
    with tqdm.tqdm(total=total, desc="training", unit=" steps", disable=None, smoothing=0.05) as bar:
        runs = {
            method: [train(experiment, method, seed, compiled[method], bar) for seed in range(settings.seeds)]
            for method in settings.method
        }
    times = measure_step_times(compiled, experiment)
    methods = {}
    for method in settings.method:
        ratios = np.array(times[method]) / np.array(times["sgd"])
        methods[method] = {
            "gradients_per_step": float(np.mean([run["history"]["gradients_per_step"] for run in runs[method]])),
            "step_milliseconds": 1e3 * float(np.median(times[method])),
            "step_time_ratio": float(np.median(ratios)),
            "step_time_ratio_range": [float(ratios.min()), float(ratios.max())],
            "compile_seconds": compiled[method].compile_seconds,
            "seeds": runs[method],
        }
    shown = {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in vars(settings).items()}
    counts = {"steps_per_epoch": experiment.steps_per_epoch, "parameters": experiment.num_parameters()}
    return {"settings": shown, "counts": counts, **report.environment(), "methods": methods}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares SGD and sharpness-aware methods on real images.")
    add = parser.add_argument
    add("--method", nargs="+", choices=[*METHODS, "all"], default=DEFAULT_METHODS, metavar="METHOD", help="%(choices)s")
    add("--dataset", choices=list(datasets.LOADERS), default="digits")
    add("--data-dir", type=pathlib.Path, default=pathlib.Path("data"), help="where the files of the data set are or go")
    add(
        "--model",
        choices=list(models.MODELS),
        help="default: mlp for digits, cnn for fashion_mnist, resnet for cifar10",
    )
    add("--base", choices=["sgd", "adamw"], default="sgd", help="the optimizer behind the link (SGD: momentum 0.9)")
    add("--epochs", type=int, default=30)
    add("--batch-size", type=int, default=128)
    add("--learning-rate", type=float, help="at the start of the cosine schedule; default: 0.1 for sgd, 1e-3 for adamw")
    add("--weight-decay", type=float, default=5e-4)
    add("--rho", type=float, help="default: that of each method; none is tuned")
    add("--micro-batches", type=int, default=8, help="of msam")
    add("--switch-at", type=int, help="epoch at which late_sam starts SAM; default: after three quarters")
    add("--seeds", type=int, default=3, help="number of seeds")
    add("--checkpoint-dir", type=pathlib.Path, help="save after every epoch, and go on from what is there")
    add("--name", help="results go to runs/NAME; default: DATASET-MODEL")
    settings = parser.parse_args(arguments)
    if "all" in settings.method:
        settings.method = list(METHODS)
    settings.method = list(dict.fromkeys(settings.method))
    settings.model = settings.model or DEFAULT_MODEL[settings.dataset]
    settings.name = settings.name or f"{settings.dataset}-{settings.model}"
    if settings.learning_rate is None:
        settings.learning_rate = 0.1 if settings.base == "sgd" else 1e-3
    if settings.switch_at is None:
        settings.switch_at = 3 * settings.epochs // 4
    for name in ("epochs", "batch_size", "micro_batches", "seeds"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {getattr(settings, name)}")
    for name in ("learning_rate", "weight_decay"):
        if not 0 <= getattr(settings, name) < np.inf:
            parser.error(f"--{name.replace('_', '-')} must be finite and at least 0; got {getattr(settings, name)}")
    if "msam" in settings.method and settings.batch_size % settings.micro_batches:
        parser.error(
            f"--batch-size {settings.batch_size} must be divisible by --micro-batches {settings.micro_batches}"
        )
    if not 0 <= settings.switch_at <= settings.epochs:
        parser.error(f"--switch-at must be an epoch from 0 to {settings.epochs}; got {settings.switch_at}")
    return settings


def main(arguments: list[str] | None = None) -> None:
    settings = parse(arguments)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        if settings.checkpoint_dir:
            unshared = ("method", "seeds", "checkpoint_dir", "data_dir", "name")
            fixed = {name: value for name, value in vars(settings).items() if name not in unshared}
            checkpoints.claim(settings.checkpoint_dir, fixed)
        results = run(settings)
    except (datasets.DatasetError, OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; with --checkpoint-dir the same command goes on from the last epoch")
    folder = pathlib.Path("runs") / settings.name
    report.write(results, folder)
    print(report.table(results))
    print(
        f"\nm-sharpness: rise of the loss after one ascent of length {SHARPNESS_RHO}; "
        "gradients: executed ones, counted, in full batches."
    )
    print(f"Wrote {folder / 'results.json'} and {folder / 'comparison.png'}.")


if __name__ == "__main__":
    main()
