r"""SAM late in training: Zhou et al., Sharpness-Aware Minimization Efficiently Selects Flatter Minima Late in Training.

2025, https://arxiv.org/abs/2410.10373. A few epochs of SAM behind many of SGD find what SAM all along finds: it leaves
the minimum of SGD exponentially fast (P1), stays in its valley (P2), goes to a flatter minimum (P3) and converges fast
there (P4). Reproduced on a valley with exact thresholds (unnormalized SAM), on digits with 100 seeds and on a subset of
CIFAR-10 (normalized SAM): test accuracy and sharpness for several steps of the switch, with momentum carried across it
or restarted; the loss between the two minima; and the same switch from plain to adversarial training, on digits.

Other than in the paper: 5,000 images without augmentation, 24 epochs, a small network without BatchNorm, and a cosine
schedule of the learning rate where the paper drops it in steps. As there: batches of 128, momentum 0.9, weight decay
1e-4, label smoothing 0.1. Learning rates and rho of the paper are not known; here they are 0.1 and 0.1. "Nearly as SAM"
means nearer to SAM than to SGD, by the absolute differences of each seed (of logarithms, for eigenvalues).

    python -m benchmarks.papers.late_phase [--smoke] [--data-dir DIR] [--resume]
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import optax_sam
from benchmarks.papers import late_phase_report as report
from benchmarks.papers import late_phase_toys as toys
from benchmarks.papers import training
from benchmarks.papers.reproduction import Reproduction
from examples.training import datasets, models

LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING, RHO = 0.1, 1e-4, 0.1, 0.1
BATCH_SIZE = 128
IMAGES, EPOCHS, SEEDS = 5_000, 24, 3
OPTIMIZER = {"learning_rate": LEARNING_RATE, "momentum": training.MOMENTUM, "weight_decay": WEIGHT_DECAY}
SWITCHES, EARLY, MAIN = (0.5, 0.75, 0.9), (0.5, 0.75), 0.75  # fractions of the run; SGD → SAM, SAM → SGD, in detail
POSITIONS, LINE_H = np.linspace(-0.2, 1.2, 15), 0.1
RADIUS, PGD_STEPS, ATTACK_STEPS = 0.3, 3, 10  # in standard deviations of the pixels; in training, in evaluation
DIGITS_EPOCHS, DIGITS_SEEDS = (24, 48, 96), 5


def methods(task: training.Task, smoke: bool) -> dict[str, tuple[Any, Any, float]]:
    """By name: link, optimizer, and gradients for each step by the formula of the paper."""
    steps = task.epochs * task.steps_per_epoch()
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    sam, sgd = optax_sam.sam(RHO), training.sgd(schedule, WEIGHT_DECAY)
    found = {"sgd": (optax.identity(), sgd, 1.0), "sam": (sam, sgd, 2.0)}
    for fraction in SWITCHES if not smoke else (MAIN,):
        start = round(fraction * steps)
        found[f"late-{fraction}"] = optax_sam.late(sam, start), sgd, 2 - fraction
        found[f"restarted-{fraction}"] = restarted(sam, schedule, start), optax.identity(), 2 - fraction
    for fraction in EARLY if not smoke else (MAIN,):
        link = optax_sam.switch_at({0: sam, round(fraction * steps): optax.identity()})
        found[f"early-{fraction}"] = link, sgd, 1 + fraction
    return found


def restarted(link: Any, schedule: optax.Schedule, start: int) -> optax.GradientTransformation:
    """SGD, from step ``start`` on behind the link and with new momentum."""
    shifted = training.sgd(lambda step: schedule(step + start), WEIGHT_DECAY)
    return optax_sam.switch_at({0: training.sgd(schedule, WEIGHT_DECAY), start: optax.chain(link, shifted)})


def executed_gradients(link: optax.GradientTransformation, steps: int) -> float:
    """Gradients for each step of the estimator, counted while they run."""
    count = [0]

    def loss_fn(params, batch):
        jax.debug.callback(lambda: count.__setitem__(0, count[0] + 1))
        return jnp.mean(batch) * jnp.sum(params**2)

    estimator = optax_sam.gradient_estimator(loss_fn, link)

    def step(carry, _):
        params, state = carry
        _, updates, state = estimator.value_and_grad(params, state, jnp.ones(1))
        return (params - 1e-3 * updates, state), None

    params = jnp.ones(2)
    jax.block_until_ready(jax.lax.scan(step, (params, estimator.init(params)), length=steps))
    jax.effects_barrier()
    return count[0] / steps


def run_network(reproduction: Reproduction, task: training.Task, seeds: int) -> dict[str, Any]:
    """Test accuracy, sharpness and cost of every method, and the valley between two of them."""
    table = methods(task, reproduction.smoke)
    settings = {**task.settings(), "rho": RHO, **OPTIMIZER}
    trainer = training.Trainer(task, reproduction.folder / "checkpoints", settings, evaluations=3)
    steps = task.epochs * task.steps_per_epoch()
    results = {}
    with tqdm.tqdm(total=len(table) * seeds * task.epochs, desc="CIFAR-10", unit="epoch", disable=None) as bar:
        for name, (link, optimizer, gradients) in table.items():
            results[name] = {"formula": gradients, "steps": steps, "gradients": executed_gradients(link, steps)}
            results[name]["seeds"] = []
            for seed in range(seeds):
                run = training.Run(f"{name}-{seed}", link, optimizer, seed)
                measure = functools.partial(trainer.outcome, run, bar)
                results[name]["seeds"].append(reproduction.part(f"network-{run.name}", settings, measure))
    pair = {name: table[name][:2] for name in (f"late-{MAIN}", "sgd")}
    along = {**settings, "h": LINE_H, "switch": MAIN}
    lines = [
        reproduction.part(f"line-{seed}", along, functools.partial(line_between, trainer, pair, seed))
        for seed in range(seeds)
    ]
    return {"settings": settings, "methods": results, "lines": lines}


def line_between(trainer: training.Trainer, pair: dict[str, Any], seed: int) -> dict[str, Any]:
    """The loss of the training set between the ends of two runs, 0 at the first."""
    first, second = (
        trainer.train(training.Run(f"{name}-{seed}", link, optimizer, seed)).params
        for name, (link, optimizer) in pair.items()
    )
    loss_fn, batches = trainer.task.clean_loss_fn, trainer.hessian_batches()
    line = optax_sam.loss_along(loss_fn, first, second, batches, POSITIONS, h=LINE_H)
    return {name: values.tolist() for name, values in line._asdict().items()}


def attacked(loss: Callable[[jax.Array], jax.Array], images: jax.Array, steps: int) -> jax.Array:
    """Images at most ``RADIUS`` away in every pixel whose loss is large: projected gradient ascent on its sign."""
    point = images
    for _ in range(steps):
        point = point + 2 * RADIUS / steps * jnp.sign(jax.grad(loss)(point))
        point = jnp.clip(point, images - RADIUS, images + RADIUS)
    return point


def adversarial(loss_fn: Callable[..., jax.Array], steps: int) -> optax.GradientTransformationExtraArgs:
    """A link from the gradient of the batch to that of the attacked batch, at the same params; stateless."""

    def update(updates, state, params=None, *, grad_fn: Any = None, batch: Any = None, **extra_args):
        del updates, extra_args
        images, labels = batch
        images = attacked(lambda images: loss_fn(params, (images, labels)), images, steps)
        return grad_fn(params, (images, labels)), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


class BatchTrainer(training.Trainer):
    """Trains without an estimator, by ``link.update`` itself, so that the link is given the batch."""

    def _make_step(self, link, optimizer, num_micro_batches):
        del num_micro_batches
        link, grad_fn = optax.with_extra_args_support(link), jax.grad(self.task.loss_fn)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, images, labels, batch, key):
            del key
            params, link_state, optimizer_state = state
            inputs = images[batch], labels[batch]
            clean = grad_fn(params, inputs)
            grads, link_state = link.update(clean, link_state, params, grad_fn=grad_fn, batch=inputs)
            updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
            return optax.apply_updates(params, updates), link_state, optimizer_state

        return step


def run_adversarial(reproduction: Reproduction, data: datasets.Dataset) -> dict[str, Any]:
    """Clean and robust test accuracy of plain, late and full adversarial training, for runs of several lengths."""
    seeds, lengths = (2, (2,)) if reproduction.smoke else (DIGITS_SEEDS, DIGITS_EPOCHS)
    results = {}
    with tqdm.tqdm(total=3 * seeds * sum(lengths), desc="adversarial", unit="epoch", disable=None) as bar:
        for epochs in lengths:
            task = training.Task(
                models.MLP(), data, epochs, BATCH_SIZE, augments=False, label_smoothing=LABEL_SMOOTHING
            )
            attack = {"radius": RADIUS, "steps_in_training": PGD_STEPS, "steps_in_evaluation": ATTACK_STEPS}
            settings = {**task.settings(), "attack": attack, "switch": MAIN, **OPTIMIZER}
            trainer = BatchTrainer(task, reproduction.folder / "checkpoints", settings)
            results[str(epochs)] = {}
            for name, (link, optimizer) in adversarial_methods(task).items():
                runs = [training.Run(f"{name}-{epochs}-{seed}", link, optimizer, seed) for seed in range(seeds)]
                results[str(epochs)][name] = {
                    "seeds": [
                        reproduction.part(run.name, settings, functools.partial(robustness, trainer, run, bar))
                        for run in runs
                    ]
                }
    return results


def adversarial_methods(task: training.Task) -> dict[str, tuple[Any, Any]]:
    """Link and optimizer."""
    steps = task.epochs * task.steps_per_epoch()
    attack = adversarial(task.loss_fn, PGD_STEPS)
    sgd = training.sgd(optax.cosine_decay_schedule(LEARNING_RATE, steps), WEIGHT_DECAY)
    links = {"plain": optax.identity(), "late-adversarial": optax_sam.late(attack, round(MAIN * steps))}
    return {name: (link, sgd) for name, link in (links | {"adversarial": attack}).items()}


def robustness(trainer: training.Trainer, run: training.Run, bar: Any) -> dict[str, float]:
    """Trains; test accuracy as it is and under attack."""
    params, history = trainer.train(run, bar)
    images, labels = jnp.asarray(trainer.task.data.test_images), jnp.asarray(trainer.task.data.test_labels)
    images = attacked(lambda images: trainer.task.clean_loss_fn(params, (images, labels)), images, ATTACK_STEPS)
    return {"test_accuracy": history["test_accuracy"][-1], "robust_accuracy": trainer.score(params, images, labels)[1]}


def run_escapes(reproduction: Reproduction) -> dict[str, Any]:
    """From the minima that SGD found with many seeds: SGD going on, SAM and unnormalized SAM."""
    smoke = {"seeds": 3, "before": 20, "after": 20, "width": 8, "rise": 10}
    sizes = toys.Escape(**smoke) if reproduction.smoke else toys.Escape()
    links = {
        "sgd": optax.identity(),
        "sam": optax_sam.late(optax_sam.sam(RHO), sizes.before),
        "usam": optax_sam.late(optax_sam.usam(RHO), sizes.before),
    }
    task, results = toys.escape_task(sizes), {}
    for name, link in tqdm.tqdm(links.items(), desc=f"{sizes.seeds} seeds", disable=None):
        compute = functools.partial(toys.run_escape, task, link, sizes)
        results[name] = reproduction.part(f"escape-{name}", {"rho": RHO, **sizes._asdict()}, compute)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    reproduction = Reproduction("late_phase", __doc__, arguments)
    smoke = reproduction.smoke
    options = {"label_smoothing": LABEL_SMOOTHING, "batch_size": BATCH_SIZE}
    task = training.cifar10(reproduction, num_images=IMAGES, epochs=EPOCHS, augments=False, **options)
    results = {
        "valley": reproduction.part("valley", {"steps": toys.VALLEY_STEPS}, toys.run_valley),
        "escape": run_escapes(reproduction),
        "adversarial": run_adversarial(reproduction, datasets.load("digits", pathlib.Path())),
        "network": run_network(reproduction, task, 2 if smoke else SEEDS),
    }
    reproduction.finish(results, report.claims(results), report.draw(results))


if __name__ == "__main__":
    main()
