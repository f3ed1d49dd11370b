"""One table of wrong arguments: each is refused by name, with the value and the cure, as early as it can be known."""

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_sam
from optax_sam import measured
from optax_sam.sharpness import SpectralDensity, TrackedEigenvalue


class Row(NamedTuple):
    """A wrong argument.

    Attributes:
        name: the public name that gets it, or whose result does.
        argument: what the message calls it.
        error: the type, exactly.
        words: what else the message holds: the value as it shows it, then the cure.
        build: raises the error if there is no ``use``.
        use: raises the error, given what ``build`` returned without one.
    """

    name: str
    argument: str
    error: type[Exception]
    words: Sequence[str]
    build: Callable[[], Any]
    use: Callable[[Any], Any] | None = None


def loss_at(params, batch=None):
    return jnp.sum(params["w"] ** 3) + (0.0 if batch is None else 0 * jnp.sum(batch))


INTS, EIGHT, ONE, NAN, INF = jnp.arange(2), jnp.ones(8), [jnp.ones(4)], float("nan"), float("inf")
WEIGHTS, STACK, FOUR = {"w": jnp.ones((3, 2))}, {"w": jnp.ones((4, 3, 2))}, jnp.ones(4)
LIKE_WEIGHTS = {"direction": WEIGHTS, "updates": WEIGHTS}
GRAD, IDENTITY, SAM, MSAM = jax.grad(loss_at), optax.identity(), optax_sam.sam(0.1), optax_sam.msam(0.1)
DENSITY = SpectralDensity(np.zeros((1, 2)), np.full((1, 2), 0.5))

RHO = (
    "normalized_ascent unnormalized_ascent adaptive_ascent sam usam asam stable_sam msam gsam wsam friendly_sam vasso "
    "look_sam sam_every ae_sam momentum_sam lagged_sam random_sam"
)
MASKED = (
    "usam asam stable_sam gsam wsam friendly_sam vasso look_sam sam_every ae_sam momentum_sam lagged_sam random_sam"
)
INNER = "renormalized micro_batched sharded late combined one_gradient on_momentum"
LINK = "measured gradient_estimator value_and_grad"
BATCHES = (
    "hessian_eigenvalues hessian_trace spectral_density average_sharpness loss_surface track_eigenvalue "
    "directional_sharpness critical_sharpness"
)
SHARED = {
    RHO: {"rho": 0.1, "alpha": 0.3, "gamma": 0.7, "period": 2, "key": 0},
    INNER: {"inner": SAM, "axis_name": "data", "start": 3, "combine": lambda g, s, shards: s, "decay": 0.9},
    LINK: {"link": SAM, "loss_fn": loss_at},
    BATCHES: {"loss_fn": loss_at, "params": WEIGHTS, "batches": ONE, "sigma": 0.1, **LIKE_WEIGHTS},
    "sam_edge": {"gradient_norm": 1.0, "learning_rate": 0.1, "rho": 0.1},
    "m_sharpness": {"loss_fn": loss_at, "params": WEIGHTS, "batch": EIGHT, "rho": 0.1},
    "loss_along": {"loss_fn": loss_at, "first": WEIGHTS, "second": WEIGHTS, "batches": ONE},
    "sharpness_aware": {"ascent": IDENTITY},
    "switch_by": {"index_fn": lambda step: 0, "links": [SAM, SAM]},
    "switch_on": {"rule": optax.stateless(lambda updates, params: 0), "links": [SAM, SAM]},
    "rho_by_learning_rate": {
        "learning_rate": lambda step: 0.1,
        **dict.fromkeys(("lr_min", "rho_min"), 0.0),
        **dict.fromkeys(("lr_max", "rho_max"), 0.1),
    },
    "normalization_layers less_average random_direction": {},
    "norm vdot": {"tree": WEIGHTS, "a": WEIGHTS, "b": WEIGHTS},
    "switch_at measurements": {},
}


def parameters(name: str) -> set[str]:
    return set(inspect.signature(getattr(optax_sam, name)).parameters)


def rows(names: str, arguments: str, values: Any, use: Callable[..., Any] | None = None, **others: Any) -> list[Row]:
    """A row for each function, argument and ``(value, error, *words)``.

    Without ``use`` the function refuses its argument. With it the function is called first, and ``use(result, ...)``
    gets those of the arguments that are no parameters of the function.
    """
    found = []
    for name, argument in itertools.product(names.split(), arguments.split()):
        good = next(keywords for group, keywords in SHARED.items() if name in group.split())
        for value, error, *words in values:
            keywords = good | others | {argument: value}
            mine = {key: keywords[key] for key in keywords.keys() & parameters(name)}
            rest = {key: keywords[key] for key in keywords.keys() - parameters(name) - good.keys()}
            build = functools.partial(getattr(optax_sam, name), **mine)
            found.append(Row(name, argument, error, words, build, use and functools.partial(use, **rest)))
    return found


def update(link, updates=WEIGHTS, params=WEIGHTS, state=..., **call):
    call = {"grad_fn": GRAD, "value": 1.0, "value_fn": loss_at} | call
    return link.update(updates, link.init(WEIGHTS) if state is ... else state, params, **call)


def misspelt(link, gradfn):
    return link.update(WEIGHTS, link.init(WEIGHTS), WEIGHTS, gradfn=gradfn)


def update_each(link):
    return jax.vmap(lambda params: update(link, params, params), axis_name="data")(STACK)


def evaluate(function, params=WEIGHTS, batch=EIGHT):
    return function(params, batch)


def evaluate_split(_, batch):
    return optax_sam.value_and_grad(loss_at, SAM, num_micro_batches=2)(WEIGHTS, batch)


def returning(values):
    """Functions that return the values."""
    return [(lambda *args, value=value: value, *row) for value, *row in values]


def called(argument, rows):
    """Rows whose messages call the argument something else."""
    return [row._replace(argument=argument) for row in rows]


def these(error, cure, *values, got=None):
    """Values that the message shows as they are, or as said."""
    return [(value, error, got or repr(value), cure) for value in values]


# Wrong values: (value, error, how the message shows it, its cure).
REAL, TRUE = "must be a real scalar", (True, np.bool_(True), np.array(True), jnp.array(True))
NOT_REAL = [
    *these(TypeError, REAL, None, "0.1", [0.1], {}, IDENTITY, np.array("a"), jax.random.key(0), *TRUE),
    *these(TypeError, REAL, 1j, jnp.complex64(1), np.complex64(1), np.ones(2), jnp.ones(2)),
]
NEGATIVE = these(ValueError, "finite and at least 0", -0.1, NAN, INF, np.float32(-1), jnp.float32(-1), np.int64(-1))
NOT_POSITIVE = these(ValueError, "finite and above 0", 0, 0.0, -1, NAN, INF)
BAD_RADIUS = [NOT_REAL[0], NOT_REAL[-1], NEGATIVE[0]]
NOT_INTS = these(TypeError, "must be an int", 1.5, 2.0, "2", True, None, NAN, [2], INTS[1], jnp.ones(2))
NOT_LINKS = these(TypeError, "must be an optax.GradientTransformation", None, 0.1, "sam", [SAM], optax_sam.sam)
NOT_AXES = these(TypeError, "must be the name of an axis", 8, True, b"a", (), {"a"}, ("a", 1), ["a", None])
NOT_PHASES = [
    *these(ValueError, "phases must begin at 0", {}, {5: SAM}, {0: SAM, 9: SAM, 4: SAM}, got="got ["),
    *these(ValueError, "increase in int32", {0: SAM, 2**31: SAM}, got="2147483648"),
]
NOT_INDICES = [
    *[(value, TypeError, "float32[]", "an integer or a boolean, a scalar") for value in (0.5, NAN, jnp.ones([]))],
    (INTS, TypeError, "got int32[2]", "an integer or a boolean, a scalar"),
]
NOT_POSITIONS = these(ValueError, "must be a list of finite real numbers", "a", [1j], [True], 0.5, [], [[0.0]], [INF])
MASK = "must be a tree of booleans like the params, or a function"
NOT_MASKS = [
    *[({"w": leaf}, TypeError, f"got mask['w']={leaf!r}", MASK) for leaf in (1, 0.5, "w", NAN)],
    ([True, INTS > 0], TypeError, "got mask[1]=Array([False,  True]", MASK),
]
WHOLE_MASKS = these(TypeError, "Pass static_args='mask' there", True, False, np.bool_(True), jnp.array(False))
NOT_ARGNUMS = [
    *[(value, TypeError, f"={value!r}", "must be an int") for value in (None, 1.5, "1", jnp.int32(1))],
    *[(value, TypeError, "batch_argnums=", "must be an int") for value in ((1, 2.0), [1, "2"], (1, None))],
    *[(value, ValueError, "batch_argnums=", "must be at least 1") for value in (0, -1, (1, 0))],
    *these(ValueError, "must be different positions", (1, 1), [2, 1, 2], ()),
]
LIKE = "must have the tree structure of"
NOT_LIKE = [
    ([WEIGHTS["w"]], ValueError, "got PyTreeDef([*])", LIKE),
    (None, ValueError, "got PyTreeDef(None)", LIKE),
    ({"w": jnp.ones((3, 1))}, ValueError, "got (3, 1) instead of (3, 2) at ['w']", "must have the shapes of"),
    ({"w": 1.0}, ValueError, "got () instead of (3, 2) at ['w']", "must have the shapes of"),
]
FLOATS = "must have floating-point leaves"
NOT_ONLY_PARAMS = [
    ({"w": jnp.ones((3, 2), int)}, TypeError, "int32", FLOATS),
    ({"w": np.full((3, 2), "a")}, TypeError, "<U1 at ['w']", FLOATS),
    (eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0)), TypeError, "object at .activation", "eqx.partition(model, "),
    (nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0))), TypeError, "uint32 at ['rngs']", "optax_sam.nnx for models"),
    ({"w": jnp.ones((3, 2), jnp.float8_e5m2)}, TypeError, "got float8_e5m2", "16 bits or more"),
    (nnx.BatchNorm(2, rngs=nnx.Rngs(0)), TypeError, "a model of Flax NNX, BatchNorm", "optax_sam.nnx.value_and_grad("),
]
PAIR = [((1.0, WEIGHTS), ValueError, "got PyTreeDef((*, {'w': *}))", "Take the gradient alone, as jax.grad(loss_fn)")]
LOSS = "must be the loss, a floating-point scalar"
NOT_LOSSES = [
    (jnp.ones(2), TypeError, "got ", "Take the mean over examples"),
    ((jnp.ones([]), 0), TypeError, "got (", "has_aux=True to the estimator"),
    *[(loss, TypeError, "got ", LOSS) for loss in (jnp.int32(1), jnp.complex64(1), "a", True, 3, [1.0], {"loss": 1.0})],
]
NO_LOSS = [(None, TypeError, "got None", LOSS)]
AUX = "loss_fn must return (loss, aux), as has_aux=True says"
NOT_AUX = [
    *these(TypeError, AUX, (1.0, 2.0, 3.0), {"loss": 1.0}, None, 1.0),
    (jnp.ones(2), TypeError, "got ", AUX),
    ((jnp.ones(2), 0), TypeError, "the first of what loss_fn returns", LOSS),
]
NARROW = [(loss(1), TypeError, "float16", "must return float32 or wider") for loss in (jnp.float16, jnp.bfloat16)]
REAL_FLOATS = "must have real floating-point leaves"
NOT_PARAMS = [
    ({"n": 1}, TypeError, "got int64 at ['n']", REAL_FLOATS),
    ({"n": jnp.ones(3) * 1j}, TypeError, "got complex64 at ['n']", REAL_FLOATS),
    ("abc", TypeError, "got <U3 at the only leaf", REAL_FLOATS),
]
SHORTER = TrackedEigenvalue(1.0, 0.0, {"w": jnp.ones(2)}, 1)
NOT_SCALES = these(ValueError, "broadcast to them", {"w": jnp.ones((2, 3, 2))}, got="got (2, 3, 2) for (3, 2)")
NOT_FINITE = [({"w": jnp.full((3, 2), value)}, ValueError, "nan or inf", "is not finite at") for value in (NAN, INF)]
A_LIST, ONE_BATCH = "must be a list of batches", ({"x": EIGHT}, jnp.ones((2, 3)), (EIGHT, EIGHT), (np.ones(8), None))
NOT_BATCHES = [
    (value, ValueError, f"got a {type(value).__name__}", A_LIST) for value in (None, 3, [], iter(ONE), *ONE_BATCH)
]
SCALARS = [
    (1.0, ValueError, "its shape is ()", "must have a leading axis of at least 1"),
    (jnp.ones((0, 3)), ValueError, "its shape is (0, 3)", "must have a leading axis of at least 1"),
    ({"x": EIGHT, "scale": jnp.ones([])}, ValueError, "['scale']", "must have a leading axis"),
]
NOT_A_BATCH = [*SCALARS, ({"x": EIGHT, "z": FOUR}, ValueError, "4 in ", "must agree in their leading axis")]
NOT_SPLIT = NOT_A_BATCH + [
    (empty, ValueError, "got none", "need a batch, at batch_argnums=(1,)") for empty in (None, {}, ())
]
LATE, TWICE, TWO = optax_sam.late(SAM, 1), measured(measured(SAM)), optax.chain(measured(SAM), measured(SAM))
NOT_STATES = [
    (state, TypeError, f"got {type(state).__name__}", "Pass the state of all of tx")
    for state in (None, (), SAM.init(WEIGHTS)[:], {"link_state": ()})
]
OTHER_SWITCH = optax_sam.switch_at({0: SAM, 1: SAM, 2: SAM}).init(WEIGHTS)
BRANCHES = (optax.chain(LATE, optax.scale(2.0)), optax.conditionally_transform(SAM, lambda step: True))
NOT_MEASURABLE = [(link, ValueError, "in a branch, a loop or a map", "the switch alone") for link in BRANCHES]
NOT_MEASURED = [
    *[(state, ValueError, type(state).__name__, "without a measured link") for state in (None, 3, LATE.init(WEIGHTS))],
    *[(link.init(WEIGHTS), ValueError, "2 measured links in this state", "Pass the part") for link in (TWO, TWICE)],
    *[
        (optax_sam.switch_at({0: first, 3: second}).init(WEIGHTS), ValueError, *words)
        for first, second, *words in (
            (IDENTITY, measured(SAM), "phase 0 of a switch has no", "a plain one by `measured(optax.identity())`"),
            (measured(SAM), SAM, "phase 1 of a switch has no", "Measure the switch"),
            (measured(SAM), TWICE, "2 measured links in phase 1", "Pass the part"),
        )
    ],
]


def integers(names: str, argument: str, least: int, values: Any = NOT_INTS[:1], **others: Any) -> list[Row]:
    small = these(ValueError, f"must be at least {least}", least - 1, np.int64(least - 1))
    return rows(names, argument, values + small, **others)


# A check is tried with every value at one place, and with a few wherever else it is made.
TABLE = [
    # Ascents and recipes
    *rows("normalized_ascent", "rho", NOT_REAL + NEGATIVE),
    *rows(RHO, "rho", BAD_RADIUS),
    *rows("sam usam asam stable_sam", "rho", returning(NOT_REAL[:2]), update),
    *rows("adaptive_ascent asam", "eta", BAD_RADIUS),
    *rows("stable_sam renormalized", "max_scale", BAD_RADIUS[1:]),
    Row("sam", "rho", TypeError, ("JitTracer(bool[])", REAL), lambda: jax.jit(optax_sam.sam)(jnp.array(True))),
    *rows("sam", "mask", NOT_MASKS + returning(NOT_MASKS[:2]), update),
    *rows(MASKED, "mask", NOT_MASKS[:1], update),
    *rows("gsam look_sam", "alpha", BAD_RADIUS[1:]),
    *rows("wsam", "gamma", [BAD_RADIUS[1], *these(ValueError, "must be below 1 and at least 0", -0.1, 1.0)]),
    *rows("vasso", "theta", [BAD_RADIUS[1], *NOT_POSITIVE[:1]]),
    *rows("less_average friendly_sam", "sigma", BAD_RADIUS[:1]),
    *rows(
        "less_average friendly_sam ae_sam momentum_sam lagged_sam on_momentum",
        "decay",
        [BAD_RADIUS[1], *these(ValueError, "must be below 1 and at least 0", -0.1, 1.0)],
    ),
    *rows("random_direction random_sam", "key", these(TypeError, "one PRNG key, or an int", None, 1.5, True)),
    *rows("random_sam", "key", [(INTS[1], TypeError, "Array(1", "name it in static_args")]),
    *rows("rho_by_learning_rate", "learning_rate", these(TypeError, "must be a schedule", 0.1)),
    *rows("vasso", "theta", [(1.5, ValueError, "-0.5", "at least 0")]),
    *rows("ae_sam", "threshold", BAD_RADIUS[:1]),
    *integers("look_sam sam_every", "period", 1),
    *rows("rho_by_learning_rate", "lr_max", [(0.0, ValueError, "lr_max=0.0", "must differ")]),
    *rows("normalization_layers", "params", [(WEIGHTS, ValueError, "found none", "a mask of your own")]),
    *rows("msam", "mask", NOT_MASKS[:1], update, updates=STACK, batch=FOUR),
    *rows("sharded", "mask", NOT_MASKS[:1], update_each),
    *rows("sam usam asam stable_sam msam", "mask", WHOLE_MASKS),
    *rows("adaptive_ascent", "params", NOT_LIKE[:1], update),
    *rows("normalized_ascent unnormalized_ascent renormalized", "updates", NOT_ONLY_PARAMS[:1], update),
    # The ascent and its repetition
    *rows("sharpness_aware", "ascent", NOT_LINKS),
    *rows("sharpness_aware", "ascent", [(optax.stateless(f), *row) for f, *row in returning(NOT_LIKE)], update),
    *integers("sharpness_aware", "steps", 1, NOT_INTS),
    *rows("sharpness_aware", "projection", returning(NOT_LIKE), update),
    # Updates
    *rows("sam asam adaptive_ascent", "params", these(ValueError, "calling `update`", None, got="`params`"), update),
    *rows("sam", "params", NOT_ONLY_PARAMS, update),
    *rows("sam", "updates", NOT_LIKE + PAIR, update),
    *rows("sam", "grad_fn", returning(NOT_LIKE + PAIR), update),
    *rows("sam", "grad_fn", these(ValueError, "jax.grad(loss_fn)", None, got="no grad_fn"), update, value_fn=None),
    *rows("sam", "gradfn", these(ValueError, "TrainState", GRAD, got="among ['gradfn']"), misspelt),
    *[
        Row("sam", "params", ValueError, ("MaskedNode", "put the link in front"), lambda tx=tx: tx, update)
        for tx in (optax.masked(SAM, {"w": False}), optax.partition({"on": SAM, "off": IDENTITY}, {"w": "off"}))
    ],
    *rows("sam late", "state", NOT_STATES, update),
    *rows("msam", "state", NOT_STATES[:1], update, updates=STACK, batch=FOUR),
    *rows("late", "state", these(ValueError, "not 2", OTHER_SWITCH, got="between 3 links"), update),
    # Switches
    *called("phase", rows("switch_at", "phases", [({key: SAM}, *row) for key, *row in NOT_INTS[:4]])),
    *rows("switch_at", "phases", NOT_PHASES),
    *rows("switch_at", "phases", [({0: SAM, 3: link}, *row) for link, *row in NOT_LINKS[:1]]),
    *integers("late", "start", 0),
    *rows(
        "late",
        "start",
        [(INTS[1], TypeError, "start=Array(1", "Under optax.inject_hyperparams name it in static_args")],
    ),
    *rows("switch_by switch_on", "links", [([SAM, link], *row) for link, *row in NOT_LINKS[:1]]),
    *rows("switch_by", "index_fn", these(TypeError, "must be a function of the step", 3, None)),
    *rows("switch_by", "index_fn", returning(NOT_INDICES), update),
    *rows("switch_on", "rule", NOT_LINKS[:1]),
    *called(
        "rule", rows("switch_on", "rule", [(optax.stateless(f), *row) for f, *row in returning(NOT_INDICES)], update)
    ),
    *rows("combined", "combine", these(TypeError, "must be a function of g, s and shards", 3)),
    *rows("combined", "combine", returning(NOT_LIKE), update),
    # Combinators
    *rows(INNER, "inner", NOT_LINKS[:1]),
    *rows("micro_batched", "axis_name", NOT_AXES),
    *rows("msam sharded gradient_estimator value_and_grad", "axis_name", NOT_AXES[:1]),
    *rows("msam", "batch", [(None, ValueError, "got no batch", "a leading axis")], update, updates=STACK),
    *rows("msam", "batch", [(None, ValueError, "got no batch", "sam(rho)")], update, updates=STACK, value_fn=None),
    *rows("msam", "batch", [(None, ValueError, "got no batch", "jax.grad")], update, updates=STACK, grad_fn=None),
    *rows("msam", "batch", these(ValueError, "must agree", EIGHT, got="4 in updates['w'], 8"), update, updates=STACK),
    *rows("msam", "batch", SCALARS, update, updates=STACK),
    *rows(
        "msam", "updates", [({"w": FOUR}, ValueError, "got () instead of (3, 2)", "leading axis")], update, batch=FOUR
    ),
    # Norms
    *rows("norm", "tree", NOT_ONLY_PARAMS[:1]),
    *rows("vdot", "a", NOT_LIKE),
    *rows("vdot", "b", these(ValueError, "a must have the tree structure of b", {"v": 1.0}, got="got PyTreeDef({'w'")),
    # Estimators
    *rows(LINK, "link", NOT_LINKS[:1]),
    *integers("gradient_estimator value_and_grad", "num_micro_batches", 1),
    *integers("gradient_estimator value_and_grad", "group_size", 1),
    *rows("gradient_estimator", "group_size", these(ValueError, "num_micro_batches=4", 3), num_micro_batches=4),
    *rows("gradient_estimator value_and_grad", "ascent_per", these(ValueError, "'device', 'batch'", "loop", None, 3)),
    *rows("gradient_estimator value_and_grad", "strategy", these(ValueError, "'vmap', 'scan'", "Scan", np.ones(2))),
    *rows("gradient_estimator", "ascent_per", these(ValueError, "needs axis_name", "device", got='="device"')),
    *rows("gradient_estimator", "batch_argnums", NOT_ARGNUMS),
    *rows("value_and_grad", "batch_argnums", NOT_ARGNUMS[-1:]),
    *rows("value_and_grad", "weight_fn", returning(NOT_REAL[-2:]), evaluate),
    *rows("value_and_grad", "axis_name", these(ValueError, "Call this under jax.shard_map", "data"), evaluate),
    *rows("value_and_grad", "link", these(ValueError, "Use `gradient_estimator", LATE, got="SwitchState"), evaluate),
    *rows("value_and_grad", "loss_fn", returning(NOT_LOSSES + NO_LOSS), evaluate),
    *rows("value_and_grad", "loss_fn", returning(NOT_AUX), evaluate, has_aux=True),
    *rows("value_and_grad", "batch", NOT_SPLIT, evaluate_split),
    *rows(
        "value_and_grad",
        "batch",
        [((EIGHT, jax.random.key(0)), ValueError, "batch[1]", "such as a PRNG key, as an argument of its own")],
        evaluate_split,
    ),
    *called(
        "aux",
        rows(
            "value_and_grad",
            "loss_fn",
            [(lambda *_: (jnp.ones([]), {"name": "mlp"}), TypeError, "'mlp'", "names apart")],
            evaluate,
            has_aux=True,
            num_micro_batches=2,
        ),
    ),
    *rows("value_and_grad", "params", NOT_ONLY_PARAMS, evaluate),
    # Measurement
    *rows("measured", "value", NOT_LOSSES, update),
    *rows("measured", "value", these(ValueError, "value_fn=loss_fn", None, got="got value=None"), update),
    *rows("measured", "value_fn", these(ValueError, "or use `gradient_estimator", None, got="value_fn=None"), update),
    *rows("measured", "value_fn", returning(NOT_LOSSES), update),
    *rows("measured", "link", NOT_MEASURABLE, update),
    *rows("measured", "link", [(MSAM, ValueError, "averages", "micro_batched(measured(")], update, updates=STACK),
    *rows("measurements", "state", NOT_MEASURED),
    # Instruments
    *rows(f"{BATCHES} loss_along m_sharpness", "loss_fn", returning(NARROW)),
    *rows(f"{BATCHES} m_sharpness", "params", NOT_PARAMS[1:2]),
    *rows("hessian_trace", "params", NOT_PARAMS),
    *rows("loss_along", "first second", NOT_PARAMS[1:2]),
    *rows("loss_along", "second", NOT_LIKE[:1] + NOT_LIKE[2:]),
    *rows("loss_surface", "params", these(ValueError, "with filters", {"w": jnp.ones(3)}, got="shapes=[(3,)]")),
    *called("Hessian", rows("hessian_eigenvalues hessian_trace spectral_density", "params", NOT_FINITE)),
    *rows("hessian_trace", "batches", NOT_BATCHES),
    *rows(f"{BATCHES} loss_along", "batches", NOT_BATCHES[2:3]),
    *called("batch", rows("loss_along", "batches", [([batch], *row) for batch, *row in NOT_A_BATCH])),
    *rows("m_sharpness", "batch", NOT_A_BATCH, num_micro_batches=2),
    *rows("m_sharpness", "batch", these(ValueError, "num_micro_batches=3", EIGHT, got="_size=8"), num_micro_batches=3),
    *integers("hessian_eigenvalues", "k", 1),
    *integers("hessian_eigenvalues", "num_smallest", 0),
    *rows("hessian_eigenvalues", "k", these(ValueError, "of 6 params", 7, got="= 7")),
    *rows("hessian_eigenvalues", "num_smallest", these(ValueError, "of 6 params", 3, got="= 7"), k=4),
    *rows("hessian_eigenvalues", "k", these(ValueError, "max_products=1", 2, got="= 2"), max_products=1),
    *rows("m_sharpness", "rho", BAD_RADIUS),
    *integers("m_sharpness", "steps", 1),
    *integers("track_eigenvalue", "num_products", 2),
    *integers("hessian_trace", "num_probes", 2),
    *integers("spectral_density", "num_probes", 1),
    *integers("spectral_density", "num_products", 1),
    *rows("track_eigenvalue", "previous", these(ValueError, "must have the shapes of", SHORTER, got="got (2,)")),
    *rows("hessian_eigenvalues hessian_trace spectral_density track_eigenvalue m_sharpness", "scale", NOT_SCALES),
    *rows("directional_sharpness", "direction", [*NOT_PARAMS[1:2], *NOT_LIKE[:1], *NOT_LIKE[2:]]),
    *rows("directional_sharpness", "direction", these(ValueError, "not zero", {"w": jnp.zeros((3, 2))}, got="0.0")),
    *rows("critical_sharpness", "updates", [*NOT_PARAMS[1:2], *NOT_LIKE[:1], *NOT_LIKE[2:]]),
    *rows("critical_sharpness", "rtol", NOT_POSITIVE),
    *rows("sam_edge", "gradient_norm rho", these(ValueError, "finite and at least 0", -0.1, NAN, INF)),
    *rows("sam_edge", "learning_rate", NOT_POSITIVE),
    *rows("loss_along", "h", NOT_POSITIVE + NOT_REAL[:1]),
    *rows("loss_along loss_surface", "positions", NOT_POSITIONS),
    *rows("spectral_density", "positions", NOT_POSITIONS[:1], lambda _, positions: DENSITY.smoothed(positions, 1.0)),
    *rows("spectral_density", "width", NOT_POSITIVE, lambda _, width: DENSITY.smoothed([0.0], width)),
]
# What no check of ours refuses, because a wrong value raises in JAX, NumPy or Python, or does no harm.
UNCHECKED = {
    "sharpness_aware": {"projection"},
    "gradient_estimator": {"loss_fn", "has_aux", "weight_fn"},
    "value_and_grad": {"has_aux"},
    "hessian_eigenvalues": {"rtol", "max_products"},
    "spectral_density": {"num_probes", "num_products"},
    "hessian_trace": {"num_probes"},
    "gauss_newton": {"outputs_fn", "loss_of_outputs"},
    "average_sharpness": {"sigma", "num_samples"},
    "m_sharpness": {"num_micro_batches"},
    "norm": {"shards"},
    "vdot": {"shards"},
    "rho_by_learning_rate": {"lr_min", "rho_min", "rho_max"},
    "no_vectors": {"params"},
}
ANYWHERE = {"progress", "key"}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.name}-{row.argument}")
def test_a_wrong_argument_is_refused_by_name_with_its_value_and_the_cure(row):
    call = functools.partial(row.use, row.build()) if row.use else row.build
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert type(caught.value) is row.error
    missing = [word for word in (row.argument, *row.words) if word not in str(caught.value)]
    assert not missing, str(caught.value)


def test_the_table_has_every_parameter_of_every_public_function():
    classes = {name for name in optax_sam.__all__ if inspect.isclass(getattr(optax_sam, name))}
    assert all(issubclass(getattr(optax_sam, name), tuple) for name in classes)  # states, which hold what they get
    tried = {row[:2] for row in TABLE} | {(name, argument) for name, some in UNCHECKED.items() for argument in some}
    for name in set(optax_sam.__all__) - classes:
        assert parameters(name) - ANYWHERE <= {argument for function, argument in tried if function == name}, name
