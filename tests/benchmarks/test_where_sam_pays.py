"""The study of where SAM pays: its search, its data and its programs against what they should be; its tables."""

import itertools
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.where_sam_pays import claims, report, study, tuning
from benchmarks.where_sam_pays.methods import FEW, METHODS
from benchmarks.where_sam_pays.settings import SETTINGS, SMOKE, Data, Setting, look_alike, symmetric
from benchmarks.where_sam_pays.training import Hyperparameters, Trainer
from examples.training.datasets import crop_and_flip, nearest_class
from examples.training.report import interval

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks/results"
RECORDS = report.records(RESULTS)
LIMITS = [(-8, 8), (-8, 8), (-9, 14)]
GRID = list(itertools.product(range(-2, 5, 3), range(-3, 4, 3), range(-9, 14, 2)))


def small(**changes):
    return SETTINGS["clean"]._replace(**SMOKE, **changes)


@pytest.mark.parametrize("top", [(0, 0, 0), (3, -2, 7), (-5, 6, 11), (8, -8, 14)])
def test_the_search_ends_at_the_top_of_a_slanting_ridge(top):
    scores = []

    def score(point, num_seeds):
        scores.append((point, num_seeds))
        rate, decay, rho = (x - y for x, y in zip(point, top, strict=True))
        return -(rate**2) - decay**2 - rho**2 - 1.5 * decay * rho

    assert tuning.search(score, GRID, LIMITS, num_seeds=3) == top
    assert {point for point, seeds in scores if seeds == 1} == set(GRID)
    edges = [axis for axis, x in enumerate(top) if x in LIMITS[axis]]
    assert tuning.at_edge(top, LIMITS) == edges


def test_an_axis_without_room_is_neither_searched_nor_an_edge():
    limits = [(-8, 8), (0, 0)]
    best = tuning.search(lambda point, seeds: -abs(point[0] - 5), [(0, 0)], limits, num_seeds=1)
    assert best == (5, 0)
    assert tuning.at_edge(best, limits) == []


def test_hyperparameters_of_the_lattice():
    assert study.at("sgd", (0, 2, 1)) == (0.02, 0.01, 0.1414)
    assert study.at("sgd", (-2, 0, study.ZERO)) == (0.01, 0.005, 0.0)
    assert study.at("adamw", (2, 0, 2)) == (0.004, 0.1, 0.2)


def test_seeds_draw_their_own_examples_and_noise_of_the_right_amount():
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(4_000, 2, 2, 1)), rng.integers(0, 10, 4_000).astype(np.int32)
    inputs += labels[:, None, None, None]  # so that the nearest class is the one before or after
    data = Data(inputs.astype(np.float32), labels, None, {})
    nearest = nearest_class(data.inputs, labels)
    assert np.all(np.abs(nearest - np.arange(10)) == 1)
    for noise, share in ((look_alike, 0.3), (symmetric, 0.4)):
        setting = Setting("", lambda _: data, noise, num_train=1_000, num_validation=2_000)
        sample, other = setting.draw(data, 0), setting.draw(data, 1)
        assert not np.array_equal(sample.inputs, other.inputs)
        assert not {x.tobytes() for x in sample.inputs} & {x.tobytes() for x in sample.validation_inputs}
        true = np.round(np.concatenate([sample.inputs, sample.validation_inputs]).mean(axis=(1, 2, 3))).astype(int)
        known = {x.tobytes(): y for x, y in zip(data.inputs, labels, strict=True)}
        true = np.array([known[x.tobytes()] for x in np.concatenate([sample.inputs, sample.validation_inputs])])
        noisy = np.concatenate([sample.labels, sample.validation_labels])
        moved = noisy != true
        assert np.mean(moved[:1_000]) == pytest.approx(share, abs=0.06)
        assert np.mean(moved) == pytest.approx(share, abs=0.04)
        if noise is look_alike:
            assert np.array_equal(noisy[moved], nearest[true[moved]])
        else:
            assert len({*zip(true[moved], noisy[moved], strict=True)}) == 90


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("sam", "late_50", "msam_8", "msam_each", "ae_sam", "sgd_twice")),
        ("sam", {"optimizer": "adamw"}),
        ("late_50", {"optimizer": "adamw"}),
        ("msam_8", {"augments": True}),
    ],
)
def test_a_training_is_that_of_plain_jax(name, options):
    """Step by step, with gradients written out; the order of examples and the crops are the trainer's."""
    setting, method = small(**options), METHODS[name]
    sample = setting.draw(setting.load(pathlib.Path()), 3)
    best = Hyperparameters(0.05, 1e-2, 0.2 if method.has_rho else 0.0)
    trainer = Trainer(setting, method)
    found, gradients = trainer.run(best, 3, sample)
    steps = setting.steps(method.epochs)
    init_key, order_key, _ = jax.random.split(jax.random.key(3), 3)
    params = setting.network.init(init_key, sample.inputs[:1])["params"]
    grad = jax.jit(jax.grad(trainer.loss_fn))
    momentum, taken, mean, square = optax.tree.zeros_like(params), 0, 0.0, 0.0
    adam = optax.scale_by_adam()
    adam_state = adam.init(params)

    def sam(w, batch):
        g = grad(w, batch)
        return grad(optax.tree.add_scale(w, best.rho / optax.tree.norm(g), g), batch)

    keys = jax.random.split(jax.random.fold_in(order_key, 1), steps)
    for step, chosen in enumerate(np.asarray(trainer._orders(order_key, steps))):
        x, y = sample.inputs[chosen], sample.labels[chosen]
        x = np.asarray(crop_and_flip(keys[step], x)) if setting.augments else x
        parts = {"msam_8": 8, "msam_each": setting.batch_size}.get(name, 1)
        on = {"late_50": step >= steps / 2, "sgd_twice": False}.get(name, True)
        if name == "ae_sam":
            length = float(optax.tree.norm(grad(params, (x, y)))) ** 2
            mean = 0.9 * mean + 0.1 * length
            square = 0.9 * square + 0.1 * (length - mean) ** 2
            on = length >= mean + (1 - 2 * step / steps) * np.sqrt(square)
        taken += 1 + on
        gradients_of_parts = [
            (sam if on else grad)(params, part) for part in zip(np.split(x, parts), np.split(y, parts), strict=True)
        ]
        g = optax.tree.scale(1 / parts, jax.tree.map(lambda *leaves: sum(leaves), *gradients_of_parts))
        rate = best.learning_rate * (1 + np.cos(np.pi * step / steps)) / 2
        if setting.optimizer == "sgd":
            momentum = jax.tree.map(lambda m, g, w: 0.9 * m + g + best.weight_decay * w, momentum, g, params)
            updates = momentum
        else:
            direction, adam_state = adam.update(g, adam_state)
            updates = optax.tree.add_scale(direction, best.weight_decay, params)
        params = optax.tree.add_scale(params, -rate, updates)
    difference = optax.tree.norm(optax.tree.sub(params, found)) / optax.tree.norm(params)
    assert difference < 1e-4
    assert gradients == pytest.approx(2 if name == "sgd_twice" else taken / steps)
    half = jnp.mean(jnp.argmax(setting.network.apply({"params": found}, x), axis=1) == y)
    assert trainer.accuracy(found, x, y) == half


def test_gradients_per_step_are_as_the_links_take_them():
    expected = {"late_10": 1.1, "late_25": 1.25, "late_50": 1.5, "every_5": 1.2, "look_sam": 1.2, "ae_sam": None}
    single = {"sgd", "random", "momentum_sam", "lagged_sam"}
    for name, method in METHODS.items():
        assert method.gradients == (1 if name in single else expected.get(name, 2))


def job(folder, name="sam"):
    return study.Job("clean", name, folder, pathlib.Path(), smoke=True)


@pytest.mark.heavy
def test_a_study_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    runs = study.Runs(job(tmp_path))
    best = Hyperparameters(0.05, 1e-3, 0.1)
    accuracy, test = runs.validation(best, 0), runs.test(best, 1, hessian=True)
    assert {"gradients", "test", "eigenvalue"} < set(test)
    with runs.path.open("a") as file:
        file.write('{"run": ["validation", 1')  # torn by the end of the process
    monkeypatch.setattr(study, "trainer_of", None)  # nothing may be trained again
    again = study.Runs(job(tmp_path))
    assert (again.validation(best, 0), again.test(best, 1, hessian=True)) == (accuracy, test)
    with pytest.raises(TypeError):
        again.validation(best, 1)
    monkeypatch.undo()
    again.validation(best, 1)
    assert len(study.Runs(job(tmp_path)).known) == 3


def for_ever(path):
    while True:
        study._check_parent()
        path.touch()
        time.sleep(0.02)


@pytest.mark.heavy
def test_workers_end_with_the_process_that_they_work_for(tmp_path):
    program = (
        "import concurrent.futures, multiprocessing, pathlib, sys\n"
        "from tests.benchmarks.test_where_sam_pays import for_ever\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:\n"
        "        pool.submit(for_ever, pathlib.Path(sys.argv[1])).result()\n"
    )
    script, alive = tmp_path / "parent.py", tmp_path / "alive"
    script.write_text(program)
    environment = os.environ | {"PYTHONPATH": str(RESULTS.parents[1])}
    parent = subprocess.Popen([sys.executable, script, alive], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not alive.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    time.sleep(1)
    alive.unlink(missing_ok=True)
    time.sleep(1)
    assert not alive.exists()


def record_of(accuracies):
    return {
        "title": "a setting",
        "optimizer": "sgd",
        "num_seeds": len(accuracies["sgd"]),
        "methods": {
            name: {
                key: {
                    **Hyperparameters(0.02, 0.005, 0.1)._asdict(),
                    "gradients": METHODS[name].gradients,
                    "test": {"held out": values},
                    "eigenvalues": [2.0, 3.0],
                    "edges": ["rho"] if name == "sam" else [],
                }
                for key in ("tuned", "default")
            }
            for name, values in accuracies.items()
        },
    }


def test_rows_are_paired_differences_with_their_intervals():
    sgd, sam = [0.70, 0.72, 0.69], [0.71, 0.735, 0.695]
    record = record_of({"sgd": sgd, "random": sgd, "sam": sam, "usam": sgd[::-1]})
    found = report.row(record, "sam")
    differences = 100 * np.array([0.01, 0.015, 0.005])
    np.testing.assert_allclose(found.gain, (1.0, *interval(differences)))
    half = 4.302653 * 0.5 / np.sqrt(3)  # the quantile of Student's t with 2 degrees of freedom
    np.testing.assert_allclose(found.gain[1:], (1 - half, 1 + half), rtol=1e-5)
    assert (found.gain[1] > 0, found.decided) == (False, "")
    assert "edge of the grid: rho" in report.table(record)
    records = {"look_alike": record, "clean": record}
    assert "| SGD | 1 | 70.3 ± 1.5 % | 70.3 ± 1.5 % |" in report.gains(records)
    assert "| SAM | 2 | +1.0 [-0.2, +2.2] | +1.0 [-0.2, +2.2] |" in report.gains(records)
    assert "| SAM | 2 | +1.0 [-0.2, +2.2] | +1.0 [-0.2, +2.2] |" in report.untuned(records)
    assert "| SAM | 2 | 0.02, 0.005, 0.1 (rho at the edge); λ 2.5 |" in report.tuned_values(records)


def test_luck_is_what_the_runners_up_lose():
    record = record_of({"sgd": [0.7, 0.72], "sam": [0.71, 0.73]})
    for result, losses in zip(record["methods"].values(), ([0.01, 0.02], [0.0, 0.03]), strict=True):
        best = result["tuned"]["test"]["held out"]
        result["runners_up"] = [{"test": {"held out": [x - loss for x in best]}} for loss in losses]
    np.testing.assert_allclose(report.luck(record), (1.5, np.std([1, 2, 0, 3], ddof=1)))


def test_corrected_intervals_are_wider():
    values = [1.0, 2.0, 3.0, 2.5]
    low, high = interval(values, num_comparisons=10)
    assert low < interval(values)[0] < interval(values)[1] < high
    half = 7.453319 * np.std(values, ddof=1) / 2  # Student's t with 3 degrees of freedom at 0.9975
    np.testing.assert_allclose((low, high), (np.mean(values) - half, np.mean(values) + half), rtol=1e-5)


def test_links_take_a_traced_rho():
    for name, method in METHODS.items():
        link = jax.eval_shape(lambda rho, m=method: m.link(rho, 100, jax.random.key(0)).init({"w": jnp.ones(2)}), 0.1)
        assert link is not None, name
    assert set(FEW) < set(METHODS)


@pytest.mark.heavy
def test_smoke(tmp_path, monkeypatch, capsys):
    from benchmarks.where_sam_pays import __main__ as program

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "methods_of", lambda name: ["sgd", "sam"])
    monkeypatch.setattr(program, "RATES_METHODS", ("sam",))
    program.main(["--smoke", "--setting", "look_alike", "--workers", "1"])
    folder = tmp_path / "runs/where_sam_pays-smoke"
    record = json.loads((folder / "where_sam_pays_look_alike.json").read_text(), parse_constant=pytest.fail)
    assert record["num_train"] == 128
    assert len(record["rates"]["sam"]) == len(study.RATES)
    assert report.table(record) in capsys.readouterr().out
    assert (folder / "where_sam_pays.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", RECORDS)
def test_records_hold_every_seed_and_all_numbers_are_of_this_world(name):
    record = RECORDS[name]
    assert record["num_seeds"] >= (30 if "clean" in name else 20)
    for method, result in record["methods"].items():
        for part in (result["tuned"], result["default"]):
            assert all(len(values) == record["num_seeds"] for values in part["test"].values())
            assert part["gradients"] == pytest.approx(METHODS[method].gradients or part["gradients"])
        assert len(result["tuned"]["eigenvalues"]) == study.NUM_HESSIANS


def test_the_page_shows_the_tables_of_the_records():
    page = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    assert len(report.pages(RECORDS)) >= 3
    for table in report.pages(RECORDS):
        assert table in page
    for record in RECORDS.values():
        if "runners_up" in record["methods"]["sam"]:
            assert "{:+.2f} ± {:.2f}".format(*report.luck(record)) in page


def test_claims_are_those_of_the_records():
    record = json.loads((RESULTS / "where_sam_pays.json").read_text(encoding="utf-8"))
    assert record["claims"] == [claim._asdict() for claim in claims.claims(RECORDS)]


def test_as_accurate_means_within_half_a_point():
    assert claims.as_good_verdict([0.1, 0.2, 0.15, 0.12]) == "holds"
    assert claims.as_good_verdict([0.1, 0.9, -0.5, 0.3]) == "undecided"
    assert claims.as_good_verdict([-0.9, -0.8, -0.85, -0.7]) == "does not hold"
    assert claims.as_good_verdict([0.8, 0.9, 0.85]) == "does not hold"
