"""The short examples: each runs on its real data and learns; the properties that their text names hold."""

import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from benchmarks.papers import text
from examples import fine_tune_text, mixed_precision
from tests.helpers.problems import assert_close, assert_identical

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
SHORT = {  # the least of the last percentage that each prints
    "chain": 90,
    "late": 90,
    "micro_batches": 90,
    "linen": 90,
    "nnx_batchnorm": 90,
    "equinox_filtered": 90,
    "optimistix_minimiser": 88,
    "lora": 50,
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", SHORT)
@pytest.mark.filterwarnings("default::DeprecationWarning")  # of Optimistix and Equinox
def test_short_examples_learn(name, capsys):
    with jax.numpy_rank_promotion("allow"):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    accuracy = float(re.findall(r"([0-9.]+) %", capsys.readouterr().out)[-1])
    assert accuracy > SHORT[name]


@pytest.mark.heavy
@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_measures_say_that_sam_is_flatter(capsys):
    with jax.numpy_rank_promotion("allow"):
        runpy.run_path(str(EXAMPLES / "measure_sharpness.py"), run_name="__main__")
    said = capsys.readouterr().out
    for pattern in (r"epoch 60: largest eigenvalue ([0-9.]+)", r"trace ([0-9.]+)", r"rise within 0.1: ([0-9.]+)"):
        sgd, sam = map(float, re.findall(pattern, said))
        assert sam < sgd


@pytest.mark.parametrize("name", [*SHORT, "data_parallel", "measure_sharpness", "mixed_precision", "fine_tune_text"])
def test_short_examples_are_short(name):
    lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    assert not any("argparse" in line for line in lines)


def digits():
    rng = np.random.default_rng(0)
    return rng.random((64, 64), np.float32), rng.integers(0, 10, 64)


@pytest.mark.parametrize("half", [jnp.float16, jnp.bfloat16])
def test_the_perturbation_is_the_same_under_any_loss_scale(half, monkeypatch):
    monkeypatch.setattr(mixed_precision, "HALF", half)
    with jax.numpy_rank_promotion("allow"):
        params, *_ = mixed_precision.start()
        link = optax_sam.measured(optax_sam.sam(0.1))
        estimator = optax_sam.gradient_estimator(mixed_precision.loss_fn, link)
        step, found = jax.jit(estimator.value_and_grad), []
        for scale in (1.0, 2.0**10):
            _, grads, state = step(params, estimator.init(params), digits(), jnp.float32(scale))
            found.append((optax.tree.scale(1 / scale, grads), optax_sam.measurements(state).perturbation_norm))
    for (path, leaf), other in zip(jax.tree.leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0.02, atol=1e-3, err_msg=jax.tree_util.keystr(path))  # of 16 bits
    assert_close(found[0][1], jnp.float32(0.1))


def test_a_step_that_overflows_leaves_everything_as_it_was_but_the_scale():
    with jax.numpy_rank_promotion("allow"):
        params, states, *_ = mixed_precision.start()
        for _ in range(3):
            params, states, scale, good, _ = mixed_precision.step(params, states, 2.0**4, jnp.int32(6), digits())
        assert (float(scale), int(good)) == (2.0**4, 7)
        after, states_after, scale, good, _ = mixed_precision.step(params, states, 2.0**40, good, digits())
    assert_identical((after, states_after), (params, states))
    assert (float(scale), int(good)) == (2.0**39, 0)


@pytest.mark.heavy
def test_fine_tuning_learns_made_up_sentences_and_padding_does_not_count(monkeypatch):
    """The rows that fill the last batch are repeated ones: with other labels there, nothing changes."""
    task = text.synthetic(epochs=1)
    tokens, labels = task.data.train_images[:44], task.data.train_labels[:44]
    params = task.network.init(jax.random.key(0), tokens[:1])["params"]
    monkeypatch.setattr(fine_tune_text, "BATCH", 40)
    with jax.numpy_rank_promotion("allow"):
        trained = fine_tune_text.train(task.network, params, tokens, labels, epochs=20)
        logits = [task.network.apply({"params": x}, tokens) for x in (params, trained)]
        monkeypatch.setattr(np, "resize", lambda rows, size: np.pad(rows, (0, size - len(rows))))  # filled by row 0
        other = fine_tune_text.train(task.network, params, tokens, labels, epochs=20)
    before, after = (optax.softmax_cross_entropy_with_integer_labels(x, labels).mean() for x in logits)
    assert after < before
    assert_close(other, trained)
