"""What SAM prefers, small enough to be exact: a diagonal linear network, and a curve through 12 points."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import optax_sam
from examples.training.report import finite

# The diagonal linear network: β = u ⊙ v from few examples of a sparse β.
EXAMPLES, TEST_EXAMPLES, DIMENSION, NONZEROS, STEPS = 20, 1_000, 30, 3, 10_001
N_SAM_RHOS, ONE_SAM_RHOS = (0.01, 0.03, 0.1, 0.3, 1.0), (0.01, 0.03, 0.1, 0.3)
N_SAM_SCALE, ONE_SAM_SCALE = 0.1, 0.02  # α of the two tables
FIGURE_RHOS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.9)
LATE_RHO, EARLY_RHO = 10.0, 0.175
RATE, FIGURE_RATE, FIGURE_N_SAM_RATE, SWITCH_RATE = (multiple / DIMENSION for multiple in (5, 15, 10, 1))

# Final test losses as the authors' notebook prints them (diag_nets_sam.ipynb of tml-epfl/understanding-sam); None: nan.
# In its figure n-SAM has the learning rate 10/d that an earlier cell left behind, and 1-SAM has 15/d. For the switched
# runs it prints rho = 0.9; their source has 10 and 0.175.
PUBLISHED = {
    "n-SAM": {
        "GD": 0.015056044189449159, "0.01": 0.015143589149560101, "0.03": 0.01532189739609112,
        "0.1": 0.01598195225147282, "0.3": 0.018241642036376265, "1.0": 0.03606494489010675,
    },
    "1-SAM": {
        "GD": 0.0006337885714222886, "0.01": 0.0004663830742908966, "0.03": 0.00023853572282255735,
        "0.1": 1.5396958089444108e-05, "0.3": 0.024183218285324055,
    },
    "figure n-SAM": {
        "GD": 0.015747762611708224, "0.001": 0.015756677115280553, "0.003": 0.015774538224235406,
        "0.01": 0.01583739124793595, "0.03": 0.016019930687941112, "0.1": 0.016695513663723727,
        "0.3": 0.019007119935097728, "0.9": 0.032812027137658364,
    },
    "figure 1-SAM": {
        "GD": 0.016445781003091926, "0.001": 0.016174901502986682, "0.003": 0.015641003537756094,
        "0.01": 0.013855445463941646, "0.03": 0.009469059057662111, "0.1": 0.0015339774886805526,
        "0.3": 6.350068450874803e-09, "0.9": None,
    },
    "switch": {
        "ERM": 0.014602323023706629, "ERM, first half": 0.014865600195083558, "ERM → 1-SAM": 0.00014269229669575567,
        "1-SAM, first half": 0.0001245758657536336, "1-SAM → ERM": 9.834845199886545e-05,
    },
}  # fmt: skip
HALF_A_DIGIT = 5e-10  # of the last of nine decimals

# The curve: one hidden layer of ReLUs, full batch, ½ of the sum of squares.
HIDDEN, CURVE_STEPS, CURVE_RATE, CURVE_RHO, CURVE_SEEDS, ENOUGH = 100, 1_000_000, 5e-5, 0.3, 10, 1e-5
CURVE_X = (np.arange(12) - 5.5) / 4 + 0.07
CURVE_Y = 0.345 + np.array([-2, 1.5, 0, 0, 2, 1, 0, -1, 0, 1, 2, -1])
LOGGED = 100  # losses of a run
# A kink: knots at most GAP apart are one; its change of slope is at least SHARE of the largest.
GAP, SHARE = 0.01, 0.1
GAPS, SHARES = (0.005, 0.01, 0.02), (0.05, 0.1, 0.2)


def regression() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """X, y, and the same of the test set, as drawn by the authors."""
    generator = np.random.RandomState(0)
    inputs, test_inputs = (
        generator.multivariate_normal(np.zeros(DIMENSION), np.eye(DIMENSION), size)
        for size in (EXAMPLES, TEST_EXAMPLES)
    )
    beta = generator.randn(DIMENSION)
    beta[NONZEROS:] = 0
    beta = np.abs(beta) / np.linalg.norm(beta)
    return inputs, inputs @ beta, test_inputs, test_inputs @ beta


def squared_loss(params: tuple[jax.Array, jax.Array], batch: tuple[Any, Any]) -> jax.Array:
    """‖X(u ⊙ v) − y‖² / (2n)."""
    inputs, targets = batch
    return jnp.mean((inputs @ (params[0] * params[1]) - targets) ** 2) / 2


def one_sam(rho: Any) -> optax.GradientTransformation:
    """The link of 1-SAM, for each example by itself; what the authors call rho is half of it."""
    return optax_sam.usam(2 * rho)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 5))
def diagonal_losses(
    make_link: Any, num_micro_batches: int, scale: float, rate: float, rho: Any, steps: int = STEPS
) -> tuple[jax.Array, jax.Array]:
    """Training and test loss after each step of gradient descent behind a link, from u = scale, v = 0."""
    inputs, targets, test_inputs, test_targets = regression()
    train, test = (inputs, targets), (test_inputs, test_targets)
    estimator = optax_sam.gradient_estimator(
        squared_loss, make_link(rho), num_micro_batches=num_micro_batches, strategy="vmap"
    )

    def step(carry, _):
        params, state = carry
        _, grads, state = estimator.value_and_grad(params, state, jax.tree.map(jnp.asarray, train))
        params = jax.tree.map(lambda w, g: w - rate * g, params, grads)
        return (params, state), (squared_loss(params, train), squared_loss(params, test))

    start = jnp.full(DIMENSION, scale), jnp.zeros(DIMENSION)
    return jax.lax.scan(step, (start, estimator.init(start)), length=steps)[1]


def final_test_losses(
    make_link: Any, num_micro_batches: int, scale: float, rate: float, rhos: tuple[float, ...], steps: int = STEPS
) -> dict[str, float | None]:
    """Final test losses by rho; None where gradient descent diverged."""
    run = jax.vmap(lambda rho: diagonal_losses(make_link, num_micro_batches, scale, rate, rho, steps)[1][-1])
    return dict(zip(map(str, rhos), finite(run(jnp.array(rhos)).tolist()), strict=True))


def plain(rho: Any) -> optax.GradientTransformation:
    del rho
    return optax.identity()


TABLES = {
    "n-SAM": (optax_sam.usam, 1, N_SAM_SCALE, RATE, N_SAM_RHOS),
    "1-SAM": (one_sam, EXAMPLES, ONE_SAM_SCALE, RATE, ONE_SAM_RHOS),
    "n-SAM at the scale of 1-SAM": (optax_sam.usam, 1, ONE_SAM_SCALE, RATE, N_SAM_RHOS),
    "figure n-SAM": (optax_sam.usam, 1, N_SAM_SCALE, FIGURE_N_SAM_RATE, FIGURE_RHOS),
    "figure 1-SAM": (one_sam, EXAMPLES, N_SAM_SCALE, FIGURE_RATE, FIGURE_RHOS),
}


def table_settings() -> dict[str, Any]:
    """Micro-batches, scale, learning rate and rhos by table."""
    return {name: settings for name, (_, *settings) in TABLES.items()}


def table(name: str, steps: int = STEPS) -> dict[str, float | None]:
    """One of ``TABLES`` in float64: final test losses of gradient descent and by rho."""
    make_link, num_micro_batches, scale, rate, rhos = TABLES[name]
    with jax.enable_x64(True):
        descent = final_test_losses(plain, 1, scale, rate, (0.0,), steps)["0.0"]
        return {"GD": descent} | final_test_losses(make_link, num_micro_batches, scale, rate, rhos, steps)


def late_one_sam(steps: int) -> Any:
    return lambda rho: optax_sam.late(one_sam(rho), steps)


def early_one_sam(steps: int) -> Any:
    return lambda rho: optax_sam.switch_at({0: one_sam(rho), steps: optax.identity()})


def switch_settings() -> dict[str, float]:
    return {"scale": N_SAM_SCALE, "learning_rate": SWITCH_RATE, "late_rho": LATE_RHO, "early_rho": EARLY_RHO}


def switches(steps: int = STEPS) -> dict[str, Any]:
    """In float64, runs twice as long with a switch in the middle: test losses after some steps, and after each half."""
    runs = {
        "ERM": (plain, 0.0),
        "ERM → 1-SAM": (late_one_sam(steps), LATE_RHO),
        "1-SAM → ERM": (early_one_sam(steps), EARLY_RHO),
    }
    shown = np.concatenate([np.geomspace(1, steps, 100), steps + np.geomspace(1, steps, 100)]).astype(int)
    shown = np.unique(shown)
    results: dict[str, Any] = {"steps": shown.tolist(), "curves": {}, "test_loss": {}}
    with jax.enable_x64(True):
        for name, (make_link, rho) in runs.items():
            _, losses = diagonal_losses(make_link, EXAMPLES, N_SAM_SCALE, SWITCH_RATE, rho, 2 * steps)
            losses = finite(losses.tolist())
            results["curves"][name] = [losses[step - 1] for step in shown]
            results["test_loss"] |= {name: losses[-1], f"{name.split(' →')[0]}, first half": losses[steps - 1]}
    return results


def initial_curve(seed: jax.Array) -> dict[str, jax.Array]:
    """Hidden weights ±2.5, biases and output weights normal."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "weight": 2.5 * jax.random.rademacher(keys[0], (HIDDEN,), jnp.float32),
        "bias": 2.5 * jax.random.normal(keys[1], (HIDDEN,)),
        "output": 4 * jax.random.normal(keys[2], (HIDDEN,)),
    }


def curve(params: Any, x: Any) -> jax.Array:
    one = lambda point: jax.nn.relu(point * params["weight"] + params["bias"]) @ params["output"]  # noqa: E731
    return jax.vmap(one)(jnp.asarray(x))


def curve_loss(params: Any) -> jax.Array:
    x, y = jnp.asarray(CURVE_X, jnp.float32), jnp.asarray(CURVE_Y, jnp.float32)
    return jnp.sum((curve(params, x) - y) ** 2) / 2


def fit_curves(
    tx: optax.GradientTransformationExtraArgs, steps: int, num_seeds: int, bar: Any
) -> tuple[Any, np.ndarray]:
    """Params and logged losses of all seeds; a network with a loss that is small enough stays as it is."""
    grad_fn = jax.grad(curve_loss)
    chunk = max(steps // LOGGED, 1)

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(curve_loss)(params)
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        updates = jax.tree.map(lambda u: jnp.where(loss > ENOUGH, u, 0), updates)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    @jax.vmap
    def advance(carry):
        carry, _ = jax.lax.scan(step, carry, length=chunk)
        return carry, curve_loss(carry[0])

    params = jax.vmap(initial_curve)(jnp.arange(num_seeds))
    carry, losses = (params, jax.vmap(tx.init)(params)), []
    for _ in range(steps // chunk):
        carry, loss = advance(carry)
        losses.append(np.asarray(loss))
        bar.update(chunk)
    return jax.device_get(carry[0]), np.stack(losses, axis=1)


def kinks(params: Any, gap: float = GAP, share: float = SHARE) -> np.ndarray:
    """Where the curve of one network has its kinks, within the range of the data.

    The knot of a hidden unit is where it switches on or off, −bias / weight; there the slope changes by
    output · |weight|. Knots at most ``gap`` from their neighbour are one, whose change is the sum of theirs. It is a
    kink if that is more than ``share`` of the largest.
    """
    knots, changes = -params["bias"] / params["weight"], params["output"] * np.abs(params["weight"])
    inside = (knots > CURVE_X[0]) & (knots < CURVE_X[-1])
    order = np.argsort(knots[inside])
    knots, changes = knots[inside][order], changes[inside][order]
    groups = np.concatenate([[0], np.cumsum(np.diff(knots) > gap)]) if len(knots) else np.array([], int)
    places = np.bincount(groups, knots) / np.maximum(np.bincount(groups), 1)
    sizes = np.abs(np.bincount(groups, changes))
    return places[sizes > share * np.max(sizes, initial=0.0)]


def describe_curves(params: Any, losses: np.ndarray) -> dict[str, Any]:
    """Kinks by seed and by rule, losses, and the curve of the first seed.

    Raises:
        ValueError: a network diverged, and its kinks cannot be counted.
    """
    if not np.all(np.isfinite(losses)):
        raise ValueError("A network diverged: its loss is not finite.")
    networks = [jax.tree.map(lambda leaf, seed=seed: leaf[seed], params) for seed in range(len(losses))]
    x = np.linspace(CURVE_X[0] - 0.05, CURVE_X[-1] + 0.05, 600)
    return {
        "kinks": [len(kinks(network)) for network in networks],
        "mean_kinks_by_rule": {
            f"gap {gap:g}, share {share:g}": float(np.mean([len(kinks(network, gap, share)) for network in networks]))
            for gap in GAPS
            for share in SHARES
        },
        "loss": losses[:, -1].tolist(),
        "logged_losses": np.round(np.median(losses, axis=0).astype(float), 8).tolist(),
        "x": np.round(x, 4).tolist(),
        "y": np.round(np.asarray(curve(networks[0], x), float), 4).tolist(),
        "places": np.round(kinks(networks[0]).astype(float), 4).tolist(),
    }


def curves(steps: int = CURVE_STEPS, num_seeds: int = CURVE_SEEDS) -> dict[str, Any]:
    """ERM and normalized SAM from the same initial params."""
    optimizers = {
        "ERM": optax.chain(optax.identity(), optax.sgd(CURVE_RATE)),
        "SAM": optax.chain(optax_sam.sam(CURVE_RHO), optax.sgd(optax.linear_schedule(CURVE_RATE, 0.0, steps))),
    }
    with tqdm.tqdm(total=2 * steps, desc="curves", unit=" steps", disable=None) as bar:
        return {name: describe_curves(*fit_curves(tx, steps, num_seeds, bar)) for name, tx in optimizers.items()}
