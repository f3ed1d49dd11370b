"""Trains a small network on real images with SGD and with sharpness-aware methods, and compares them.

    python examples/train.py                                          # digits, labels clean and wrong, seven methods
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
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import optax_sam
from examples.training import checkpoints, datasets, models, report

LABELS = {
    "clean": "labels as they are",
    "look_alike": f"{100 * datasets.WRONG:.0f} % of the training labels moved to the class that looks most alike",
}
Pair = tuple[float, float]  # for clean labels, for wrong ones


class Method(NamedTuple):
    """A link by its rho and the first step of the late phase, and what --rho and --weight-decay replace."""

    link: Callable[[float, int], optax.GradientTransformation]
    rho: Pair = (0.0, 0.0)
    weight_decay: Pair = (5e-4, 5e-4)


def plain(rho: float, late_start: int) -> optax.GradientTransformation:
    return optax.identity()


def sam(rho: float, late_start: int) -> optax.GradientTransformation:
    return optax_sam.sam(rho)


# The first seven have the rho, and "tuned" the decay too, that was best with --validate (examples/README.md). The
# others have a rho that is to SAM's roughly as it was in benchmarks/README.md.
METHODS = {
    "sgd": Method(plain),
    "sgd_tuned": Method(plain, weight_decay=(1e-2, 1e-2)),
    "sam": Method(sam, (0.4, 0.4)),
    "sam_tuned": Method(sam, (0.4, 0.4), (1e-3, 5e-3)),
    "msam": Method(sam, (0.2, 0.4)),
    "stable_sam": Method(lambda rho, late_start: optax_sam.stable_sam(rho), (0.2, 0.4)),
    "late_sam": Method(lambda rho, late_start: optax_sam.late(optax_sam.sam(rho), late_start), (0.4, 0.8)),
    "usam": Method(lambda rho, late_start: optax_sam.usam(rho), (0.4, 0.4)),
    "asam": Method(lambda rho, late_start: optax_sam.asam(rho), (4.0, 4.0)),
    "gsam": Method(lambda rho, late_start: optax_sam.gsam(rho, alpha=0.2), (0.4, 0.4)),
    "wsam": Method(lambda rho, late_start: optax_sam.wsam(rho, gamma=0.7), (0.2, 0.2)),
    "friendly_sam": Method(lambda rho, late_start: optax_sam.friendly_sam(rho), (0.4, 0.4)),
    "vasso": Method(lambda rho, late_start: optax_sam.vasso(rho), (0.4, 0.4)),
    "sam_every": Method(lambda rho, late_start: optax_sam.sam_every(rho, period=5), (0.8, 0.8)),
    "look_sam": Method(lambda rho, late_start: optax_sam.look_sam(rho, period=5), (0.6, 0.6)),
    "ae_sam": Method(lambda rho, late_start: optax_sam.ae_sam(rho), (0.8, 0.8)),
    "momentum_sam": Method(lambda rho, late_start: optax_sam.momentum_sam(rho), (1.0, 1.0)),
    "lagged_sam": Method(lambda rho, late_start: optax_sam.lagged_sam(rho), (0.2, 0.2)),
    "random_sam": Method(lambda rho, late_start: optax_sam.random_sam(rho, key=0), (6.0, 6.0)),
}
DEFAULT_METHODS = ["sgd", "sgd_tuned", "sam", "sam_tuned", "msam", "stable_sam", "late_sam"]
DEFAULT_MODEL = {"digits": "mlp", "fashion_mnist": "cnn", "cifar10": "resnet"}
SHARPNESS_RHO, SHARPNESS_BATCH, SHARPNESS_EXAMPLES = 0.1, 128, 5_120
EVALUATION_BATCH = 1_000
TIMED_SECONDS, TIMED_ROUNDS = 0.1, 7


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
    """Everything the methods share: data with labels of one kind, network, and the functions compiled once."""

    def __init__(self, settings: argparse.Namespace, labels: str) -> None:
        self.settings, self.kind, self.place = settings, labels, list(LABELS).index(labels)
        self.data = datasets.load(settings.dataset, settings.data_dir)
        self.looks_like = datasets.nearest_class(self.data.train_images, self.data.train_labels)
        if settings.validate:
            self.data = datasets.validation(self.data)
        self.model = models.MODELS[settings.model]()
        self.steps_per_epoch = len(self.data.train_images) // settings.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"--batch-size {settings.batch_size} is more than {len(self.data.train_images)} images")
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.optimizers = {method: self.optimizer(method) for method in METHODS}
        self.images = jnp.asarray(self.data.train_images)
        self.evaluate_batch = jax.jit(self._evaluate_batch)

    def loss_fn(self, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, labels = batch
        logits = self.model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def link(self, method: str) -> optax.GradientTransformation:
        rho = METHODS[method].rho[self.place] if self.settings.rho is None else self.settings.rho
        return METHODS[method].link(rho, self.settings.switch_at * self.steps_per_epoch)

    def optimizer(self, method: str) -> optax.GradientTransformation:
        """The optimizer behind the link, with a cosine schedule."""
        given, chosen = self.settings.weight_decay, METHODS[method].weight_decay[self.place]
        decay = chosen if given is None else given
        schedule = optax.cosine_decay_schedule(self.settings.learning_rate, self.total_steps)
        if self.settings.base == "adamw":
            return optax.adamw(schedule, weight_decay=decay)
        return optax.chain(optax.add_decayed_weights(decay), optax.sgd(schedule, momentum=0.9))

    def labels(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Of training and test; those of a test are right, those of a validation are as wrong as training."""
        train, test = self.data.train_labels, self.data.test_labels
        if self.kind == "look_alike":
            rng = np.random.default_rng((seed, 1))
            train = datasets.moved(rng, train, self.looks_like)
            test = datasets.moved(rng, test, self.looks_like) if self.settings.validate else test
        return train, test

    def init(self, method: str, seed: int) -> TrainState:
        params = self.model.init(jax.random.key(seed), self.images[:1])["params"]
        return TrainState.create(
            apply_fn=self.model.apply,
            params=params,
            tx=self.optimizers[method],
            link_state=self.link(method).init(params),
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
        labels = jnp.asarray(self.labels(seed)[0])
        order = np.random.default_rng((seed, epoch)).permutation(len(self.images))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), epoch), self.steps_per_epoch)
        for index in range(self.steps_per_epoch):
            start = index * self.settings.batch_size
            batch = jnp.asarray(order[start : start + self.settings.batch_size])
            yield self.images, labels, batch, keys[index]

    def _evaluate_batch(self, params, images, labels):
        logits = self.model.apply({"params": params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.sum(), (logits.argmax(axis=-1) == labels).sum()

    def evaluate(self, params: Any, images: Any, labels: Any) -> tuple[float, float]:
        """Mean loss and accuracy."""
        parts = [slice(start, start + EVALUATION_BATCH) for start in range(0, len(images), EVALUATION_BATCH)]
        sums = [self.evaluate_batch(params, images[part], labels[part]) for part in parts]
        loss, correct = np.sum(jax.device_get(sums), axis=0)
        return float(loss) / len(images), float(correct) / len(images)

    def m_sharpness(self, params: Any, labels: Any) -> float:
        """Rise of the loss after one normalized ascent per micro-batch, averaged over part of the training set."""
        size = min(SHARPNESS_BATCH, len(self.images))
        number = min(len(self.images), SHARPNESS_EXAMPLES) // size
        batch = self.images[: number * size], jnp.asarray(labels[: number * size])
        return float(optax_sam.m_sharpness(self.loss_fn, params, batch, SHARPNESS_RHO, num_micro_batches=number))


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


def train(compiled: CompiledMethod, seed: int, bar: tqdm.tqdm) -> dict[str, Any]:
    """Trains one network, from its last checkpoint if there is one; returns what was measured."""
    experiment, method = compiled.experiment, compiled.method
    settings, (train_labels, test_labels) = experiment.settings, experiment.labels(seed)
    name = f"{experiment.kind}-{method}-{seed}"
    folder = settings.checkpoint_dir and settings.checkpoint_dir / name
    with checkpoints.Checkpoints(folder) as saved:
        empty = {"test_accuracy": [], "gradients_per_step": []}
        state, history = saved.restore(experiment.init(method, seed), empty)
        first_epoch = len(history["test_accuracy"])
        bar.update(first_epoch * experiment.steps_per_epoch)
        for epoch in range(first_epoch, settings.epochs):
            gradients, counted = 0.0, epoch % experiment.steps_per_epoch  # another step each time: some alternate
            for index, batch in enumerate(experiment.batches(seed, epoch)):
                if index == counted:
                    gradients = compiled.count_gradients(state, batch)
                state, _ = compiled.step(state, *batch)
                bar.update()
            _, accuracy = experiment.evaluate(state.params, experiment.data.test_images, test_labels)
            history["gradients_per_step"].append(gradients)
            history["test_accuracy"].append(accuracy)
            bar.set_postfix_str(f"{name}: {100 * accuracy:.1f} %")
            saved.save(epoch + 1, state, history)
    train_loss, _ = experiment.evaluate(state.params, experiment.images, train_labels)
    return {
        "seed": seed,
        "test_accuracy": history["test_accuracy"][-1],
        "train_loss": train_loss,
        "m_sharpness": experiment.m_sharpness(state.params, train_labels),
        "history": history,
    }


def step_times(compiled: dict[str, CompiledMethod]) -> dict[str, dict[str, Any]]:
    """Of each method, averaged over the phases of a run and relative to SGD's; medians of interleaved rounds."""
    experiment = compiled["sgd"].experiment
    share = experiment.settings.switch_at / experiment.settings.epochs
    num_steps = int(np.clip(TIMED_SECONDS / compiled["sgd"].time_steps(0, num_steps=3), 2, 100))
    times = {method: [] for method in compiled}
    for _ in range(TIMED_ROUNDS):
        for method, steps in compiled.items():
            before = steps.time_steps(0, num_steps)
            after = steps.time_steps(experiment.total_steps, num_steps) if method == "late_sam" else before
            times[method].append(share * before + (1 - share) * after)
    found = {}
    for method, seconds in times.items():
        ratios = np.array(seconds) / np.array(times["sgd"])
        found[method] = {
            "milliseconds": 1e3 * float(np.median(seconds)),
            "ratio": float(np.median(ratios)),
            "ratio_range": [float(ratios.min()), float(ratios.max())],
            "compile_seconds": compiled[method].compile_seconds,
        }
    return found


def run(settings: argparse.Namespace) -> dict[str, Any]:
    """Trains every method with every seed on labels of each kind, and returns all that was measured."""
    found, times = {}, {}
    for labels in settings.labels:
        experiment = Experiment(settings, labels)
        names = dict.fromkeys(["sgd", *settings.method])
        compiling = tqdm.tqdm(names, desc="compiling", leave=False, disable=None)
        compiled = {method: CompiledMethod(experiment, method) for method in compiling}
        total = len(settings.method) * settings.seeds * experiment.total_steps
        found[labels] = {}
        with tqdm.tqdm(total=total, desc=labels, unit=" steps", disable=None, smoothing=0.05) as bar:
            for method in settings.method:
                runs = [train(compiled[method], seed, bar) for seed in range(settings.seeds)]
                gradients = float(np.mean([run["history"]["gradients_per_step"] for run in runs]))
                found[labels][method] = {"gradients_per_step": gradients, "seeds": runs}
                if bar.disable:  # nobody watches, but somebody may read along
                    mean = np.mean([run["test_accuracy"] for run in runs])
                    print(f"{labels}, {method}: {100 * mean:.1f} %", file=sys.stderr, flush=True)
        times = times or step_times(compiled)
    shown = {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in vars(settings).items()}
    return {"settings": shown, **report.environment(), "step_times": times, "labels": found}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares SGD and sharpness-aware methods on real images.")
    add = parser.add_argument
    add("--method", nargs="+", choices=[*METHODS, "all"], default=DEFAULT_METHODS, metavar="METHOD", help="%(choices)s")
    add("--labels", nargs="+", choices=list(LABELS), default=list(LABELS), metavar="KIND", help="%(choices)s")
    add("--dataset", choices=list(datasets.LOADERS), default="digits")
    add("--data-dir", type=pathlib.Path, default=pathlib.Path("data"), help="where the files of the data set are or go")
    add(
        "--model",
        choices=list(models.MODELS),
        help="default: mlp for digits, cnn for fashion_mnist, resnet for cifar10",
    )
    add("--base", choices=["sgd", "adamw"], default="sgd", help="the optimizer behind the link (SGD: momentum 0.9)")
    add("--epochs", type=int, default=30)
    add("--batch-size", type=int, default=64)
    add(
        "--learning-rate", type=float, help="at the start of the cosine schedule; default: 0.05 for sgd, 1e-3 for adamw"
    )
    add("--weight-decay", type=float, help="default: that of each method, chosen for digits")
    add("--rho", type=float, help="default: that of each method, chosen for digits")
    add("--micro-batches", type=int, default=8, help="of msam")
    add("--switch-at", type=int, help="epoch at which late_sam starts SAM; default: after three quarters")
    add("--seeds", type=int, default=8, help="number of seeds")
    add("--validate", action="store_true", help="score on a fifth of the training images instead of the test images")
    add("--checkpoint-dir", type=pathlib.Path, help="save after every epoch, and go on from what is there")
    add("--name", help="results go to runs/NAME; default: DATASET-MODEL")
    settings = parser.parse_args(arguments)
    if "all" in settings.method:
        settings.method = list(METHODS)
    settings.method, settings.labels = (list(dict.fromkeys(names)) for names in (settings.method, settings.labels))
    settings.model = settings.model or DEFAULT_MODEL[settings.dataset]
    settings.name = settings.name or f"{settings.dataset}-{settings.model}"
    if settings.learning_rate is None:
        settings.learning_rate = 0.05 if settings.base == "sgd" else 1e-3
    if settings.switch_at is None:
        settings.switch_at = 3 * settings.epochs // 4
    for name in ("epochs", "batch_size", "micro_batches", "seeds"):
        if getattr(settings, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; got {getattr(settings, name)}")
    for name in ("learning_rate", "weight_decay"):
        if not 0 <= (getattr(settings, name) or 0) < np.inf:
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
            unshared = ("method", "labels", "seeds", "checkpoint_dir", "data_dir", "name")
            fixed = {name: value for name, value in vars(settings).items() if name not in unshared}
            checkpoints.claim(settings.checkpoint_dir, fixed)
        results = run(settings)
    except (datasets.DatasetError, OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; with --checkpoint-dir the same command goes on from the last epoch")
    folder = pathlib.Path("runs") / settings.name
    report.write(results, folder, LABELS)
    print(report.tables(results, LABELS))
    print(f"\n− sgd: paired over {settings.seeds} seeds, with its 95 % t-interval. gradients: executed ones, counted.")
    print(
        f"m-sharpness: rise of the training loss after one ascent of length {SHARPNESS_RHO}. tuned: weight decay too."
    )
    print(f"Wrote {folder / 'results.json'} and {folder / 'comparison.png'}.")


if __name__ == "__main__":
    main()
