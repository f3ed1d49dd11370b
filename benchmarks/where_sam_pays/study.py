"""The study of a method in a setting: tuning on some seeds, then the test on fresh ones. Every run is kept."""

import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.where_sam_pays import tuning
from benchmarks.where_sam_pays.methods import METHODS, Method
from benchmarks.where_sam_pays.settings import SETTINGS, SMOKE, Sample, Setting
from benchmarks.where_sam_pays.training import Hyperparameters, trainer_of

TUNING_SEEDS = (1_000, 1_001, 1_002, 1_003, 1_004)
FIRST_TEST_SEED = 100
NUM_HESSIANS = 10  # of the test seeds
NUM_RUNNERS_UP = 2
# The lattice: a value is base · √2^exponent; an exponent of rho at its lower limit means 0.
RHO, ZERO = 0.1, -9
BASES = {"sgd": Hyperparameters(0.02, 5e-3, RHO), "adamw": Hyperparameters(2e-3, 0.1, RHO)}
LIMITS = ((-8, 8), (-8, 12), (ZERO, 14))
# What an untuned baseline has: the decay of most scripts, respectively Optax's default, and a usual learning rate.
DEFAULTS = {
    "sgd": {"learning_rate": 0.05, "weight_decay": 5e-4},
    "adamw": {"learning_rate": 1e-3, "weight_decay": 1e-4},
}
RHO_LINE = (ZERO, *range(ZERO + 3, LIMITS[2][1], 2))
RATE_LINE, DECAY_LINE = range(-4, 5, 2), range(-6, 5, 2)
RATES = range(-4, 12, 2)  # exponents of the learning rate, relative to the tuned one, in the study of its range


class Job(NamedTuple):
    """One method in one setting, by their names."""

    setting: str
    method: str
    folder: pathlib.Path
    data_dir: pathlib.Path
    smoke: bool = False


class Runs:
    """The runs of a job, each trained once: those of an earlier process are read from its file."""

    def __init__(self, job: Job) -> None:
        self.job, self.method = job, METHODS[job.method]
        self.setting = SETTINGS[job.setting]._replace(**SMOKE if job.smoke else {})
        self.path = job.folder / job.setting / f"{job.method}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.known: dict[tuple[Any, ...], dict[str, Any]] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        if lines and not lines[-1].endswith("\n"):  # torn when the process was killed
            del lines[-1]
            self.path.write_text("".join(lines), encoding="utf-8")
        for record in map(json.loads, lines):
            self.known[tuple(record["run"])] = record

    def validation(self, hyperparameters: Hyperparameters, seed: int) -> float:
        """Accuracy on the validation set, whose labels are as noisy as those of the training set."""
        return self._run("validation", hyperparameters, seed)["validation"]

    def test(self, hyperparameters: Hyperparameters, seed: int, hessian: bool) -> dict[str, Any]:
        """Accuracies on the test sets, gradients per step, and the largest eigenvalue if asked for."""
        return self._run("hessian" if hessian else "test", hyperparameters, seed)

    def _run(self, kind: str, hyperparameters: Hyperparameters, seed: int) -> dict[str, Any]:
        key = (kind, *hyperparameters, seed)
        if key not in self.known:
            _check_parent()
            start = time.perf_counter()
            record = {"run": [*key], **self._train(kind, hyperparameters, seed)}
            record["seconds"] = round(time.perf_counter() - start, 3)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self.known[key] = record
        return self.known[key]

    def _train(self, kind: str, hyperparameters: Hyperparameters, seed: int) -> dict[str, Any]:
        trainer, sample = trainer_of(self.setting, self.method), sample_of(self.setting, self.job.data_dir, seed)
        params, gradients = trainer.run(hyperparameters, seed, sample)
        if kind == "validation":
            accuracy = trainer.accuracy(params, sample.validation_inputs, sample.validation_labels)
            return {"validation": round(float(accuracy), 6)}
        tests = self.setting.load(self.job.data_dir).tests
        accuracies = {name: round(float(trainer.accuracy(params, *test)), 6) for name, test in tests.items()}
        record = {"gradients": gradients, "test": accuracies}
        if kind == "hessian":
            record["eigenvalue"] = rounded(trainer.largest_eigenvalue(params, sample))
        return record

    def seconds(self) -> float:
        """Of all runs, on one core."""
        return sum(record["seconds"] for record in self.known.values())


def settle(cores: Any) -> None:
    """Keeps a process on the core that is next in a queue, before JAX counts the cores to make as many threads."""
    number = cores.get()
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[number % len(allowed)]})


def _check_parent() -> None:
    """Ends this process where the one that it works for was killed: two would write to one file after a restart."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)  # an exception would be kept for the parent, and the next job begun


@functools.lru_cache(maxsize=len(TUNING_SEEDS))
def sample_of(setting: Setting, data_dir: pathlib.Path, seed: int) -> Sample:
    """The examples of a seed; those of the tuning seeds are drawn once."""
    return setting.draw(setting.load(data_dir), seed)


def at(optimizer: str, point: tuning.Point) -> Hyperparameters:
    """The hyperparameters at a point of the lattice."""
    values = [rounded(base * 2 ** (x / 2)) for base, x in zip(BASES[optimizer], point, strict=True)]
    return Hyperparameters(*values)._replace(rho=0.0 if point[2] == ZERO else values[2])


def rounded(value: float) -> float:
    """To four digits, as runs are known by."""
    return float(f"{value:.4g}")


def limits_of(method: Method) -> tuning.Limits:
    """Of the lattice; a method without rho has none to move."""
    return LIMITS if method.has_rho else (*LIMITS[:2], (ZERO, ZERO))


def tuned(runs: Runs) -> tuning.Point:
    """The best point on the tuning seeds, from a coarse grid; for SGD, which has no rho, from a finer one."""
    axes = (range(-2, 5, 3), range(-3, 4, 3), RHO_LINE) if runs.method.has_rho else (RATE_LINE, DECAY_LINE, [ZERO])
    return _search(runs, itertools.product(*axes), limits_of(runs.method))


def best_rho_by_default(runs: Runs) -> Hyperparameters:
    """With the learning rate and decay of an untuned baseline, the best rho."""
    defaults, (*_, limits) = DEFAULTS[runs.setting.optimizer], limits_of(runs.method)
    line = [(0, 0, rho) for rho in RHO_LINE if limits[0] <= rho <= limits[1]]
    best = _search(runs, line, ((0, 0), (0, 0), limits), **defaults)
    return at(runs.setting.optimizer, best)._replace(**defaults)


def _search(runs: Runs, grid: Iterable[tuning.Point], limits: tuning.Limits, **fixed: float) -> tuning.Point:
    """The point with the best mean accuracy on the validation sets of the tuning seeds."""
    seeds = TUNING_SEEDS[:1] if runs.job.smoke else TUNING_SEEDS
    points = list(grid)

    def score(point, num_seeds):
        hyperparameters = at(runs.setting.optimizer, point)._replace(**fixed)
        return sum(runs.validation(hyperparameters, seed) for seed in seeds[:num_seeds]) / num_seeds

    few = slice(None, None, max(len(points) // 3, 1) if runs.job.smoke else 1)
    return tuning.search(score, points[few], limits, len(seeds))


def studied(job: Job) -> dict[str, Any]:
    """The method tuned and with the baseline's defaults, each tested on all fresh seeds."""
    runs = Runs(job)
    point = tuned(runs)
    best = at(runs.setting.optimizer, point)
    edges = [Hyperparameters._fields[axis] for axis in tuning.at_edge(point, limits_of(runs.method))]
    return {
        "tuned": outcome(runs, best, NUM_HESSIANS) | {"edges": edges},
        "runners_up": [outcome(runs, other) for other in _runners_up(runs, best)],
        "default": outcome(runs, best_rho_by_default(runs)),
    }


def _runners_up(runs: Runs, best: Hyperparameters) -> list[Hyperparameters]:
    """The next best of the tuning: how much they differ when tested says how much of a result is luck."""
    scores: dict[Hyperparameters, list[float]] = {}
    for (kind, *values, _), record in runs.known.items():
        if kind == "validation":
            scores.setdefault(Hyperparameters(*values), []).append(record["validation"])
    most = max(map(len, scores.values()))
    defaults = DEFAULTS[runs.setting.optimizer]  # a search of its own
    others = [h for h in scores if len(scores[h]) == most and h not in (best, h._replace(**defaults))]
    return sorted(others, key=lambda found: -sum(scores[found]))[:NUM_RUNNERS_UP]


def rates_of(job: Job) -> list[dict[str, Any]]:
    """The method at its tuned decay and rho, with learning rates below and above the tuned one."""
    runs = Runs(job)
    best = at(runs.setting.optimizer, tuned(runs))
    return [outcome(runs, best._replace(learning_rate=rounded(best.learning_rate * 2 ** (x / 2)))) for x in RATES]


def outcome(runs: Runs, hyperparameters: Hyperparameters, num_hessians: int = 0) -> dict[str, Any]:
    """Accuracies by test set, and eigenvalues, in the order of the seeds."""
    numbers = range(runs.setting.num_seeds)
    records = [runs.test(hyperparameters, FIRST_TEST_SEED + number, number < num_hessians) for number in numbers]
    return {
        **hyperparameters._asdict(),
        "gradients": round(sum(record["gradients"] for record in records) / len(records), 4),
        "test": {name: [record["test"][name] for record in records] for name in records[0]["test"]},
        "eigenvalues": [record["eigenvalue"] for record in records if "eigenvalue" in record],
    }
