"""Numbers computed with the authors' code, and the toy problems of the papers: float64, to the printed digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def descend(link, loss_fn, params, learning_rate, steps, momentum=None):
    """The params after each of the steps of gradient descent behind a link, stacked."""
    tx = optax.chain(link, optax.sgd(learning_rate, momentum))
    grad_fn = jax.grad(loss_fn)

    @jax.jit
    def run(params):
        def body(carry, _):
            params, state = carry
            updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(body, (params, tx.init(params)), length=steps)[1]

    return run(params)


def quartic_loss(params):
    matrix = jnp.array([[3, 1, 0], [1, 2, 0.5], [0, 0.5, -1]])
    w = jnp.concatenate([params[0], params[1][0]])
    return w @ matrix @ w / 2 + jnp.array([0.5, -1, 0.25]) @ w + jnp.sum(w**4) / 4


def quartic_start():
    return [jnp.array([1.0, -2.0]), jnp.array([[0.5]])]


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


TRAJECTORIES = {
    "sgd": (
        optax.identity(),
        [
            (0.875, -1.4125, 0.55625),
            (0.755878906250, -1.137998339844, 0.598269421387),
            (0.652803306258, -0.953261505602, 0.633426032915),
        ],
    ),
    "sam": (
        optax_sam.sam(0.1),
        [
            (0.873588349995, -1.342242458956, 0.558561581917),
            (0.743917019144, -1.062115238064, 0.600986832638),
            (0.631381473404, -0.876903008259, 0.636360979851),
        ],
    ),
    "usam": (
        optax_sam.usam(0.05),
        [
            (0.864433593750, -0.892407910156, 0.570005969238),
            (0.687879669769, -0.753828324500, 0.601881480969),
            (0.561153068496, -0.642015054802, 0.629906116058),
        ],
    ),
    "stable_sam": (
        optax_sam.stable_sam(0.1),
        [
            (0.886574725163, -1.409814444587, 0.552545501333),
            (0.771297866417, -1.133448071111, 0.592007274153),
            (0.668324081612, -0.948065649051, 0.625348592533),
        ],
    ),
    "asam": (
        optax_sam.asam(0.5, eta=0.0),
        [
            (0.908415146784, -0.373523898848, 0.581025680615),
            (0.572602844730, -0.364168657468, 0.597413293619),
            (0.411367113165, -0.325376425217, 0.614426513320),
        ],
    ),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_three_steps_on_a_quartic(name):
    link, expected = TRAJECTORIES[name]
    trajectory = descend(link, quartic_loss, quartic_start(), 0.05, 3)
    for step, point in enumerate(expected):
        np.testing.assert_allclose(flat(jax.tree.map(lambda w, i=step: w[i], trajectory)), point, atol=1e-12)


# "sam", and "asam" without eta, are davda54/sam's too, plain and adaptive: it prints the same digits.
# Four steps of the same, by the authors' code where it is public, else by pytorch-optimizer 4.1, whose norms of float64
# tensors are in float32, and whose LookSAM takes them tensor by tensor: here all params are one tensor.
PEERS = {
    "friendly_sam, by its authors": (
        optax_sam.friendly_sam(0.1),
        {"atol": 1e-12},
        [
            (0.873588349995, -1.342242458956, 0.558561581917),
            (0.746546432476, -1.129851829017, 0.596348425741),
            (0.641737797072, -0.974219313525, 0.628796385823),
            (0.553076238676, -0.850712414282, 0.657119556788),
        ],
    ),
    "momentum_sam, by its authors": (
        optax_sam.momentum_sam(0.1, decay=0.9),
        {"atol": 1e-12},
        [
            (0.875, -1.4125, 0.55625),
            (0.643941368048, -0.645365288078, 0.646485968325),
            (0.334560532658, 0.111200001409, 0.74761402066),
            (-0.024894541211, 0.787537019118, 0.837107910242),
        ],
    ),
    "gsam, by pytorch-optimizer": (
        optax_sam.gsam(0.1, alpha=0.3),
        {"rtol": 1e-7},
        [
            (0.877068010121, -1.341474470642, 0.557446877287),
            (0.748138316293, -1.060923293754, 0.599153970916),
            (0.635284401993, -0.875694996281, 0.634035198501),
            (0.537951759107, -0.736206302209, 0.664240343827),
        ],
    ),
    "wsam, by pytorch-optimizer": (
        optax_sam.wsam(0.1, gamma=0.7),
        {"rtol": 1e-7},
        [
            (0.8717061497, -1.248565723232, 0.561643691591),
            (0.723494489672, -0.969408270919, 0.604411359671),
            (0.596731711443, -0.78722566343, 0.640084075224),
            (0.489978237968, -0.649795046123, 0.671054054909),
        ],
    ),
    "look_sam, by pytorch-optimizer": (
        optax_sam.look_sam(0.1, period=2, alpha=0.3),
        {"rtol": 1e-7},
        [
            (0.873588349871, -1.342242452814, 0.558561582111),
            (0.828982203952, -1.07585195234, 0.574002372195),
            (0.693364502486, -0.891812284667, 0.609579134441),
            (0.622692265286, -0.738775074667, 0.612647539981),
        ],
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_four_steps_of_other_implementations(name):
    link, tolerance, expected = PEERS[name]
    momentum = 0.9 if "momentum" in name else None
    trajectory = descend(link, quartic_loss, quartic_start(), 0.05, 4, momentum)
    for step, point in enumerate(expected):
        np.testing.assert_allclose(flat(jax.tree.map(lambda w, i=step: w[i], trajectory)), point, **tolerance)


@pytest.mark.parametrize(
    ("ascent", "perturbation", "gradient", "ratio"),
    [
        (
            optax_sam.normalized_ascent(0.1),
            (0.0207201048, -0.0973844926, -0.0093240472),
            (2.5282330001, -13.1551508209, -1.1712316383),
            0.8972691585960,
        ),
        (
            optax_sam.unnormalized_ascent(0.05),
            (0.125, -0.5875, -0.05625),
            (2.7113281250, -22.1518417969, -1.4001193848),
            0.5395804766774,
        ),
        (
            optax_sam.adaptive_ascent(0.5, eta=0.0),
            (0.0528780510, -0.9941073579, -0.0059487807),
            (1.8316970643, -32.5295220230, -1.6205136123),
            0.3698677247831,
        ),
    ],
    ids=["normalized", "unnormalized", "adaptive"],
)
def test_perturbation_and_sam_gradient_on_a_quartic(ascent, perturbation, gradient, ratio):
    link, grad_fn = optax_sam.sharpness_aware(ascent), jax.grad(quartic_loss)

    @jax.jit
    def run(params):
        grads = grad_fn(params)
        results = [
            quartic_loss(params),
            grads,
            optax_sam.norm(grads),
            ascent.update(grads, ascent.init(params), params)[0],
        ]
        for one in (link, optax_sam.renormalized(link)):
            results.append(one.update(grads, one.init(params), params, grad_fn=grad_fn)[0])
        return results

    loss, grads, length, epsilon, s, renormalized = run(quartic_start())
    assert float(loss) == 9.765625
    np.testing.assert_allclose(flat(grads), (2.5, -11.75, -1.125))
    np.testing.assert_allclose(float(length), 12.065576032664168, rtol=1e-15)
    np.testing.assert_allclose(flat(epsilon), perturbation, atol=1e-10)
    np.testing.assert_allclose(flat(s), gradient, atol=1e-10)
    np.testing.assert_allclose(flat(renormalized), ratio * flat(s), rtol=1e-12)


def tanh_problem():
    x = jnp.array([[1, 0], [0, 1], [1, 1], [2, -1], [-1, 0.5], [0.5, 2]])
    batch = {"x": x, "y": jnp.array([1, -1, 0.5, 2, 0, 1])}
    loss_fn = lambda p, b: jnp.mean((jnp.tanh(b["x"] @ p["w"] + p["b"]) - b["y"]) ** 2) / 2  # noqa: E731
    return loss_fn, {"b": jnp.array(0.1), "w": jnp.array([0.3, -0.2])}, batch


EXAMPLES_PER_MICRO_BATCH = {
    6: (-0.526164946618, -0.225054370525, -0.444999728942),
    3: (-0.456190367777, -0.183502148803, -0.366015243304),
    2: (-0.520370056933, -0.163847764937, -0.398404260677),
    1: (-0.554083736645, -0.169997928464, -0.436089093931),
}


@pytest.mark.parametrize(
    ("size", "strategy"),
    [*[(size, "auto") for size in EXAMPLES_PER_MICRO_BATCH], (3, "vmap"), (2, "scan"), (3, "unroll")],
)
def test_msam_by_the_estimator(size, strategy):
    loss_fn, params, batch = tanh_problem()
    function = optax_sam.value_and_grad(loss_fn, optax_sam.sam(0.1), num_micro_batches=6 // size, strategy=strategy)
    loss, grads = jax.jit(function)(params, batch)
    np.testing.assert_allclose(float(loss), 0.361611143569, atol=1e-12)
    np.testing.assert_allclose([*grads["w"], grads["b"]], EXAMPLES_PER_MICRO_BATCH[size], atol=1e-12)


@pytest.mark.parametrize("size", [3, 1])
def test_msam_in_a_chain(size):
    loss_fn, params, batch = tanh_problem()
    grad_fn, link = jax.grad(loss_fn), optax_sam.msam(0.1)

    @jax.jit
    def update(params, batch):
        stacked = jax.tree.map(lambda x: x.reshape(6 // size, size, *x.shape[1:]), batch)
        grads = jax.vmap(grad_fn, in_axes=(None, 0))(params, stacked)
        return grads, link.update(grads, link.init(params), params, grad_fn=grad_fn, batch=stacked)[0]

    grads, mean = update(params, batch)
    clean = np.mean([*grads["w"].T, grads["b"]], axis=1)
    np.testing.assert_allclose(clean, (-0.394434466915, -0.192420256176, -0.324175408058), atol=1e-12)
    np.testing.assert_allclose([*mean["w"], mean["b"]], EXAMPLES_PER_MICRO_BATCH[size], atol=1e-12)


@pytest.mark.parametrize(
    ("rho", "u", "v"),
    [
        (0.0, (0.1, 0.21185, 0.30225), (0.0048, 0.1237, -0.10675)),
        (0.5, (0.0987908707, 0.19768871203906, 0.30160150824609), (0.00503803875, 0.11758452867578, -0.10698015858203)),
    ],
    ids=["gradient descent", "n-SAM"],
)
def test_one_step_of_a_diagonal_linear_network(rho, u, v):
    x, y = jnp.array([[1.0, 2, 0], [0, 1, -1]]), jnp.array([1, 0.5])
    loss_fn = lambda p: jnp.sum((x @ (p["u"] * p["v"]) - y) ** 2) / 4  # noqa: E731
    start = {"u": jnp.array([0.1, 0.2, 0.3]), "v": jnp.array([0, 0.1, -0.1])}
    point = descend(optax_sam.usam(rho), loss_fn, start, 0.1, 1)
    np.testing.assert_allclose(point["u"][0], u, atol=1e-13)
    np.testing.assert_allclose(point["v"][0], v, atol=1e-13)


def saddle(w):
    return w[0] ** 2 - w[1] ** 2


@pytest.mark.parametrize(
    ("link", "first", "escapes"),
    [
        (optax.identity(), (-2.94, -0.0102), True),
        (optax_sam.sam(0.5), (-2.9300000556, -0.0101666669), False),
        (optax_sam.usam(0.4), (-2.892, -0.01004), True),
        (optax_sam.usam(0.6), None, False),
    ],
    ids=["gd", "sam", "usam-below", "usam-above"],
)
def test_saddle_attracts_sam(link, first, escapes):
    trajectory = np.asarray(descend(link, saddle, jnp.array([-3.0, -0.01]), 0.01, 2_000))
    if first is not None:
        np.testing.assert_allclose(trajectory[0], first, atol=1e-10)
    assert (np.abs(trajectory[-1, 1]) > 0.01) == escapes


@pytest.mark.parametrize(
    ("link", "first"),
    [
        (optax.identity(), (0.997859375, 1.996525)),
        (optax_sam.sam(0.5), (0.9924245230, 1.9878129849)),
    ],
    ids=["gd", "sam"],
)
def test_first_step_on_beale(link, first):
    beale = lambda w: sum((c - w[0] + w[0] * w[1] ** k) ** 2 for k, c in ((1, 1.5), (2, 2.25), (3, 2.625)))  # noqa: E731
    np.testing.assert_allclose(descend(link, beale, jnp.array([1.0, 2.0]), 1.25e-5, 1)[0], first, atol=1e-9)


@pytest.mark.parametrize(
    ("link", "limit"),
    [
        (optax.identity(), 0.20),
        (optax_sam.usam(0.1), 0.10),
        (optax_sam.renormalized(optax_sam.usam(0.1)), 0.20),
    ],
    ids=["gd", "usam", "stable-usam"],
)
def test_largest_learning_rate_on_a_quadratic(link, limit):
    loss_fn = lambda w: (10 * w[0] ** 2 + w[1] ** 2) / 2  # noqa: E731
    for rate, converges in ((limit - 0.01, True), (limit + 0.01, False)):
        final = np.asarray(descend(link, loss_fn, jnp.ones(2), rate, 400))[-1]
        assert (np.linalg.norm(final) < np.sqrt(2)) == converges


def test_late_usam_leaves_the_sharp_minimum_of_a_valley():
    valley = lambda w: (w[0] * w[1]) ** 2 / 2  # noqa: E731
    start, rate, rho, switch = jnp.array([2.0, 1e-3]), 0.4, 0.2, 200
    stays = np.asarray(descend(optax.identity(), valley, start, rate, 2_000))
    leaves = np.asarray(descend(optax_sam.late(optax_sam.usam(rho), switch), valley, start, rate, 2_000))
    assert np.abs(stays[-1, 0]) > 1.99
    np.testing.assert_array_equal(leaves[:switch], stays[:switch])
    growth = np.abs(1 - rate * 4 * (1 + rho * 4))
    sharp = stays[switch - 1]
    link = optax_sam.late(optax_sam.usam(rho), 0)
    nudged = np.asarray(descend(link, valley, jnp.array([sharp[0], 1e-9]), rate, 5))
    np.testing.assert_allclose(np.abs(nudged[1:, 1] / nudged[:-1, 1]), growth, rtol=0.01)  # u is a little below 2
    assert np.abs(leaves[-1, 0]) < 1.758
