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
from optax_sam.sharpness import SpectralDensity
from optax_sam.sharpness.plots import plot_spectral_density


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
GRAD, IDENTITY, SAM, MSAM = jax.grad(loss_at), optax.identity(), optax_sam.sam(0.1), optax_sam.msam(0.1)
DENSITY = SpectralDensity(np.zeros((1, 2)), np.full((1, 2), 0.5))

RHO = "normalized_ascent unnormalized_ascent adaptive_ascent sam usam asam stable_sam msam"
INNER, LINK = "renormalized micro_batched sharded late", "measured gradient_estimator value_and_grad"
BATCHES = "hessian_eigenvalues hessian_trace spectral_density average_sharpness loss_surface"
SHARED = {
    RHO: {"rho": 0.1},
    INNER: {"inner": SAM, "axis_name": "data", "start": 3},
    LINK: {"link": SAM, "loss_fn": loss_at},
    BATCHES: {"loss_fn": loss_at, "params": WEIGHTS, "batches": ONE, "sigma": 0.1},
    "m_sharpness": {"loss_fn": loss_at, "params": WEIGHTS, "batch": EIGHT, "rho": 0.1},
    "loss_along": {"loss_fn": loss_at, "first": WEIGHTS, "second": WEIGHTS, "batches": ONE},
    "sharpness_aware": {"ascent": IDENTITY},
    "switch_by": {"index_fn": lambda step: 0, "links": [SAM, SAM]},
    "norm vdot": {"tree": WEIGHTS, "a": WEIGHTS, "b": WEIGHTS},
    "switch_at measurements": {},
}


def parameters(name: str) -> set[str]:
    found = set(inspect.signature(getattr(optax_sam, name)).parameters)
    return parameters("gradient_estimator") if "options" in found else found


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


def evaluate_with(estimator, state):
    return estimator.value_and_grad(WEIGHTS, state)


def returning(values):
    """Functions that return the values."""
    return [(lambda *args, value=value: value, *row) for value, *row in values]


def these(error, cure, *values, got=None):
    """Values that the message shows as they are, or as said."""
    return [(value, error, got or repr(value), cure) for value in values]


# Wrong values: (value, error, how the message shows it, its cure).
TRUE = (True, np.bool_(True), np.array(True), jnp.array(True))
NOT_REAL = [
    *these(TypeError, "must be a real scalar", "0.1", [0.1], {}, IDENTITY, np.array("a"), jax.random.key(0), *TRUE),
    *these(TypeError, "must be a real scalar", 1j, jnp.complex64(1), np.complex64(1)),
    *these(ValueError, "must be a scalar", np.ones(2), jnp.ones(2), got="shape (2,)"),
]
NEGATIVE = these(ValueError, "finite and at least 0", -0.1, NAN, INF, np.float32(-1), jnp.float32(-1), np.int64(-1))
NOT_POSITIVE = these(ValueError, "finite and positive", 0, 0.0, -1, NAN, INF) + NOT_REAL
NONE, SCHEDULE = these(TypeError, "must be a real scalar", None), these(TypeError, "a real scalar;", lambda step: 0.1)
NOT_RADII = NOT_REAL + NEGATIVE + NONE + SCHEDULE
NOT_INTS = these(TypeError, "must be an int", 1.5, 2.0, "2", True, None, NAN, [2], INTS[1], jnp.ones(2))
NOT_FLAGS = these(ValueError, "one of True, False", None, "yes", 1, [], np.ones(2))
NOT_LINKS = these(TypeError, "must be an optax.GradientTransformation", None, 0.1, "sam", [SAM], optax_sam.sam)
NOT_FUNCTIONS = these(TypeError, "must be a function of", 3, "f", [GRAD], {"f": GRAD}, SAM, True)
NO_FUNCTION = these(TypeError, "must be a function of", None)
NOT_AXES = [
    *these(TypeError, "must be the name of a mapped axis", 8, True, b"a", (), {"a"}, ("a", 1), ["a", None]),
    *these(ValueError, "must hold each name once", ("a", "a")),
]
UNMAPPED = these(ValueError, "is not a mapped axis here. Call this under jax.pmap", "data")
NOT_STEPS = these(TypeError, "must be ints, the first step", "1", 0.0, 1.5, NAN, False, True, (1,), None)
NOT_STARTS = [
    *these(ValueError, "must begin at 0 and increase", [], [5], [-1], [0, 9, 4], [0, -3], [-1, 0]),
    *these(ValueError, "must fit in int32", [0, 2**31], got="got 2147483648"),
]
NOT_INDICES = [
    *these(TypeError, "must return an integer or a boolean", "a", None, 0.5, NAN, 1j, [0, 1], jnp.float32(1)),
    (INTS, ValueError, "shape (2,)", "must return a scalar"),
]
KEYS = (jax.random.split(jax.random.key(0)), jax.random.PRNGKey(0)[None])
NOT_KEYS = these(TypeError, "must be a single one, such as jax.random.key(0)", 3, "a", jnp.ones(2), INTS, *KEYS)
NOT_POSITIONS = [
    *these(TypeError, "must be a list of real numbers", "a", ["a"], [1j], [True], [None], {}),
    *[(value, ValueError, f"shape {np.shape(value)}", "must be a list of numbers") for value in (0.5, [], [[0.0]])],
    *these(ValueError, "must be finite", [NAN], [0.0, INF]),
]
NOT_MASKS = [
    (3, TypeError, "got mask=3", "a tree of booleans, one for each leaf"),
    ("w", TypeError, "got mask='w'", "a tree of booleans, one for each leaf"),
    ({"w": 1}, TypeError, "got mask['w']=1", "or a function from the params to such a tree"),
    ({"w": 0.5}, TypeError, "got mask['w']=0.5", "or a function from the params to such a tree"),
    ([True, INTS > 0], TypeError, "got mask[1]=Array([False,  True]", "a tree of booleans"),
]
WHOLE_MASKS = these(TypeError, "pass static_args='mask' there", True, False, np.bool_(True), jnp.array(False))
NOT_PREFIXES = [
    ({"v": True}, ValueError, "got PyTreeDef({'v': *})", "structure of the params, PyTreeDef({'w': *})"),
    ({"v": True, "w": True}, ValueError, "got PyTreeDef({'v': *, 'w': *})", "or be a prefix"),
    ([True], ValueError, "got PyTreeDef([*])", "or be a prefix"),
]
NOT_ARGNUMS = [
    *these(TypeError, "must be an int or a tuple of ints", None, 1.5, "1", (), [], {1}, jnp.int32(1)),
    *these(TypeError, "must be an int or a tuple of ints", True, (1, 2.0), [1, "2"], (1, None)),
    *these(ValueError, "must be different positions behind params", 0, -1, (1, 0), (1, 1), [2, 1, 2]),
]
NOT_SHARDS = these(TypeError, "`sharded(link, axis_name)` hands to the update of link", "model", None, 3, ("model",))
NOT_LIKE = [
    ([WEIGHTS["w"]], ValueError, "got PyTreeDef([*])", "must have the tree structure of"),
    ({"v": WEIGHTS["w"]}, ValueError, "got PyTreeDef({'v': *})", "must have the tree structure of"),
    ({"w": jnp.ones((3, 1))}, ValueError, "got (3, 1) instead of (3, 2) at ['w']", "must have the shapes of"),
    ({"w": 1.0}, ValueError, "got () instead of (3, 2) at ['w']", "must have the shapes of"),
]
NO_TREE = these(ValueError, "must have the tree structure of", None, got="got PyTreeDef(None)")
NOT_FLOATS = [
    ({"w": jnp.ones((3, 2), int)}, TypeError, "int32", "must have floating-point leaves"),
    ({"w": np.full((3, 2), "a")}, TypeError, "<U1 at ['w']", "must have floating-point leaves"),
]
NOT_ONLY_PARAMS = [
    *[(params, error, got, "Let the loss close over what is not") for params, error, got, _ in NOT_FLOATS],
    (eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0)), TypeError, "object at .activation", "`eqx.partition(model, "),
    (nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0))), TypeError, "uint32 at ['rngs']", "`nnx.split(model, nnx.Param,"),
]
PAIR = [((1.0, WEIGHTS), TypeError, "a tuple of length 2", "take the gradient out of it, or use jax.grad(loss_fn)")]
NOT_LOSSES = [
    (jnp.ones(2), TypeError, "got ShapedArray(float32[2])", "take the mean"),
    ((jnp.ones([]), 0), TypeError, "got (ShapedArray(float32[]), 0)", "of (loss, aux) take the loss"),
    (jnp.int32(1), TypeError, "got ShapedArray(int32[])", "must be the loss, a floating-point scalar"),
    (jnp.complex64(1), TypeError, "got ShapedArray(complex64[])", "must be the loss, a floating-point scalar"),
    *these(TypeError, "must be the loss, a floating-point scalar", "a", True, 3, [1.0], {"loss": 1.0}),
]
NO_LOSS = these(TypeError, "must be the loss, a floating-point scalar", None)
NARROW = these(TypeError, "must return float32 or wider", jnp.float16(1), jnp.bfloat16(1), got="float16")
NOT_AUX = [
    *these(TypeError, "must return (loss, aux), as has_aux=True says", (1.0, 2.0, 3.0), {"loss": 1.0}, None, 1.0),
    ((jnp.ones(2), 0), TypeError, "got ShapedArray(float32[2])", "the first of what loss_fn returns must be the loss"),
]
NOT_LOSS_AND_GRADIENT = [
    *these(TypeError, "must return the loss and its gradient", None, 1.0, (1.0, 2.0, 3.0)),
    ((WEIGHTS, 1.0), TypeError, "got {'w': ShapedArray(float32[3,2])}", "must be the loss"),
    (((1.0, 0), WEIGHTS), TypeError, "got (1.0, 0)", "of (loss, aux) take the loss"),
]
NOT_PARAMS = [
    *these(ValueError, "must have leaves", {}, None, got="an empty tree"),
    ({"n": 1}, TypeError, "int64 at ['n']", "must have real floating-point leaves"),
    ({"n": jnp.ones(3) * 1j}, TypeError, "complex64 at ['n']", "must have real floating-point leaves"),
    ("abc", TypeError, "<U3 at the only leaf", "Let the loss close over what is not trained"),
]
NOT_FINITE = [({"w": jnp.full((3, 2), value)}, ValueError, "nan or inf", "is not finite at") for value in (NAN, INF)]
NOT_BATCHES = [
    *[(value, ValueError, f"got {type(value).__name__}", "[batch]") for value in (None, 3, {"x": EIGHT})],
    (jnp.ones((2, 3)), ValueError, "got ArrayImpl", "of a stack of batches make one: list(stack)"),
    *[
        (value, ValueError, "got a tuple of arrays", "Pass [batch] for one batch, a list for several")
        for value in ((EIGHT, EIGHT), (jnp.ones((4, 2)), FOUR), (EIGHT,), (np.ones(8), None), ({"x": EIGHT}, EIGHT))
    ],
    (iter(ONE), ValueError, "got an iterator", "must be a re-iterable collection, such as a list"),
    *these(ValueError, "must hold at least one batch", [], set(), got="got none"),
]
SCALARS = [
    *these(ValueError, "must have a leading axis", 1.0, "abc", got="it is a scalar"),
    ({"x": EIGHT, "scale": jnp.ones([])}, ValueError, "batch['scale']", "must have a leading axis"),
]
NOT_A_BATCH = [
    *SCALARS,
    ({"x": EIGHT, "z": FOUR}, ValueError, "got 8 in batch['x'], 4 in batch['z']", "must agree in their leading axis"),
    (jnp.ones((0, 3)), ValueError, "of size 0", "must hold at least one example"),
]
NO_BATCH = these(ValueError, "needs a batch to split", (), got="got none")
NOT_SPLIT = NOT_A_BATCH + these(ValueError, "needs a batch to split", None, {}, ())
LATE, TWICE, TWO = optax_sam.late(SAM, 1), measured(measured(SAM)), optax.chain(measured(SAM), measured(SAM))
NOT_STATES = [
    *these(ValueError, "what init(params) or the last value_and_grad returned", EIGHT, got="PyTreeDef(*)"),
    *these(ValueError, "Call value_and_grad(params, state, batch)", None, got="PyTreeDef(None)"),
]
NOT_STATES_OF_LINKS = [
    *these(TypeError, "Call `tx.update(grads, state, params)`", None, got="got NoneType"),
    *these(TypeError, "Call `tx.update(grads, state, params)`", (), SAM.init(WEIGHTS)[:], got="got tuple"),
    *these(TypeError, "without a target", {"link_state": (), 1: ()}, got="got dict"),
]
OTHER_SWITCH = optax_sam.switch_at({0: SAM, 1: SAM, 2: SAM}).init(WEIGHTS)
BRANCHES = (optax.chain(LATE, optax.scale(2.0)), optax.conditionally_transform(SAM, lambda step: True))
NOT_MEASURABLE = these(
    ValueError, "`optax.chain(measured(late(sam(rho), start)), ", *BRANCHES, got="inside of a branch"
)
NOT_MEASURABLE_STACKS = [
    *these(ValueError, "`micro_batched(measured(sam(rho)))`", MSAM, got="a map of its own"),
    *these(ValueError, "`micro_batched(measured(sam", optax_sam.micro_batched(IDENTITY), got="averages over a leading"),
]
NOT_MEASURED = [
    *these(ValueError, "Build the transformation with one", None, 3, SAM, got="no measured link in this state, a"),
    *these(ValueError, "Build the transformation with one", LATE.init(WEIGHTS), got="in this state, a SwitchState"),
    *[(link.init(WEIGHTS), ValueError, "2 measured links in this state", "Read the part") for link in (TWO, TWICE)],
    *[
        (optax_sam.switch_at({0: first, 3: second}).init(WEIGHTS), ValueError, *words)
        for first, second, *words in (
            (IDENTITY, measured(SAM), "phase 0 of a switch has no", "a plain one is `measured(optax.identity())`"),
            (measured(SAM), SAM, "phase 1 of a switch has no", "Measure each phase"),
            (measured(SAM), TWICE, "2 measured links in phase 1", "Read the part of the state"),
        )
    ],
]


def integers(names: str, argument: str, least: int, **others: Any) -> list[Row]:
    small = these(ValueError, f"must be at least {least}", least - 1, np.int64(least - 1), -5)
    return rows(names, argument, NOT_INTS + small, **others)


TABLE = [
    # Ascents and recipes
    *rows(RHO, "rho", NOT_REAL + NEGATIVE + these(TypeError, "or a schedule", None)),
    *rows("sam usam asam stable_sam", "rho", returning(NOT_REAL + NONE), update),
    *rows("adaptive_ascent asam", "eta", NOT_RADII),
    *rows("stable_sam renormalized", "max_scale", NOT_REAL + NEGATIVE + SCHEDULE),
    Row("sam", "rho", ValueError, ("shape (2,)", "must be a scalar"), lambda: jax.jit(optax_sam.sam)(jnp.ones(2))),
    Row("sam", "rho", TypeError, ("JitTracer(bool[])", "real scalar"), lambda: jax.jit(optax_sam.sam)(jnp.array(True))),
    Row("sam", "rho", TypeError, ("JitTracer(complex64[])", "real"), lambda: jax.jit(optax_sam.sam)(jnp.complex64(1))),
    *rows("sam usam asam stable_sam msam sharded", "mask", NOT_MASKS),
    *rows("sam usam asam stable_sam", "mask", NOT_PREFIXES + returning(NOT_MASKS[:2]), update),
    *rows("sharded", "mask", NOT_PREFIXES + returning(NOT_MASKS[:2]), update_each),
    *rows("sam usam asam stable_sam msam", "mask", WHOLE_MASKS),
    *rows("adaptive_ascent", "params", NOT_LIKE, update),
    *rows("normalized_ascent unnormalized_ascent renormalized", "updates", NOT_FLOATS[:1], update),
    # The ascent and its repetition
    *rows("sharpness_aware", "ascent", NOT_LINKS),
    *rows("sharpness_aware", "ascent", [(optax.stateless(f), *row) for f, *row in returning(NOT_LIKE)], update),
    *integers("sharpness_aware", "steps", 1),
    *rows("sharpness_aware", "projection", NOT_FUNCTIONS),
    *rows("sharpness_aware", "projection", returning(NOT_LIKE + NO_TREE), update),
    # Updates
    *rows("sam asam adaptive_ascent", "params", these(ValueError, "calling `update`", None, got="`params`"), update),
    *rows("sam", "params", NOT_ONLY_PARAMS, update),
    *rows("sam", "updates", NOT_LIKE + NO_TREE + NOT_FLOATS + PAIR, update),
    *rows("sam", "grad_fn", NOT_FUNCTIONS + returning(NOT_LIKE + NO_TREE + NOT_FLOATS + PAIR), update),
    *rows("sam", "grad_fn", these(ValueError, "jax.grad(loss_fn)", None, got="got neither"), update, value_fn=None),
    *rows("sam", "gradfn", these(ValueError, "TrainState", GRAD, got="only gradfn"), misspelt),
    *rows("sam", "value_fn", NOT_FUNCTIONS + returning(NOT_LOSSES + NO_LOSS), update, grad_fn=None),
    *[
        Row("sam", "params", ValueError, ("MaskedNode", "Put the link before them"), lambda tx=tx: tx, update)
        for tx in (optax.masked(SAM, {"w": False}), optax.partition({"on": SAM, "off": IDENTITY}, {"w": "off"}))
    ],
    *rows("normalized_ascent sam", "state", NOT_STATES_OF_LINKS, update),
    *rows("normalized_ascent", "state", NOT_STATES_OF_LINKS, update, rho=optax.constant_schedule(0.1)),
    *rows("late measured", "state", NOT_STATES_OF_LINKS, update),
    *rows("late", "state", these(ValueError, "between 2 links", OTHER_SWITCH, got="one of 3"), update),
    # Switches
    *rows("switch_at", "phases", these(TypeError, "must be a mapping from first step to link", None, 3, [IDENTITY])),
    *rows("switch_at", "phases", [({key: SAM}, *row) for key, *row in NOT_STEPS]),
    *rows("switch_at", "phases", [(dict.fromkeys(keys, SAM), *row) for keys, *row in NOT_STARTS]),
    *rows("switch_at", "phases", [({0: SAM, 3: link}, *row) for link, *row in NOT_LINKS]),
    *integers("late", "start", 0),
    *rows("late", "start", these(TypeError, "pass int(0.9 * num_steps)", 0.9, 900.0)),
    *rows("late", "start", these(ValueError, "must fit in int32", 2**40)),
    *rows("switch_by", "links", these(TypeError, "must be a sequence", None, 3, SAM, {0: SAM}, {SAM}, iter([SAM]))),
    *rows("switch_by", "links", these(ValueError, "must hold at least one link", [], (), got="an empty sequence")),
    *rows("switch_by", "links", [([SAM, link], *row) for link, *row in NOT_LINKS]),
    *rows("switch_by", "index_fn", NOT_FUNCTIONS + NO_FUNCTION),
    *rows("switch_by", "index_fn", returning(NOT_INDICES), update),
    # Combinators
    *rows(INNER, "inner", NOT_LINKS),
    *rows("micro_batched msam sharded gradient_estimator value_and_grad", "axis_name", NOT_AXES),
    *rows("sharded", "axis_name", these(TypeError, "must be the name of a mapped axis", None)),
    *rows("micro_batched msam sharded", "axis_name", UNMAPPED, update),
    *rows("msam", "batch", these(ValueError, "a leading axis", None, got="was given no batch"), update, updates=STACK),
    *rows("msam", "batch", these(ValueError, "axis", None, got="no batch"), update, updates=STACK, value_fn=None),
    *rows("msam", "batch", these(ValueError, "axis", None, got="no batch"), update, updates=STACK, grad_fn=None),
    *rows("msam", "updates", NOT_LIKE[1:2], update, batch=FOUR[:3]),
    *rows("msam", "batch", these(ValueError, "must agree", EIGHT, got="4 in updates['w'], 8"), update, updates=STACK),
    *rows("msam", "batch", SCALARS, update, updates=STACK),
    *rows("msam", "updates", these(ValueError, "shape (3, 2) of", {"w": FOUR}, got="got (4,)"), update, batch=FOUR),
    *rows("msam", "updates", these(ValueError, "at least one", {"w": FOUR[:0]}, got="0"), update, batch=FOUR[:0]),
    *rows("msam", "grad_fn", NOT_FUNCTIONS + returning(NOT_LIKE + PAIR), update, updates=STACK, batch=FOUR),
    # Norms
    *rows("norm", "tree", NOT_FLOATS[:1]),
    *rows("vdot", "a", NOT_LIKE),
    *rows("vdot", "b", these(ValueError, "a must have the tree structure of b", {"v": 1.0}, got="got PyTreeDef({'w'")),
    *rows("norm vdot", "shards", NOT_SHARDS),
    # Estimators
    *rows(LINK, "link", NOT_LINKS),
    *rows("gradient_estimator value_and_grad", "loss_fn", NOT_FUNCTIONS + NO_FUNCTION),
    *rows("gradient_estimator value_and_grad", "has_aux", NOT_FLAGS),
    *integers("gradient_estimator value_and_grad", "num_micro_batches", 1),
    *rows("gradient_estimator value_and_grad", "ascent_per", these(ValueError, "'device', 'batch'", "loop", None, 3)),
    *rows("gradient_estimator value_and_grad", "strategy", these(ValueError, "'vmap', 'scan'", "Scan", np.ones(2))),
    *rows("gradient_estimator", "ascent_per", these(ValueError, "needs axis_name", "device", got='="device"')),
    *rows("gradient_estimator value_and_grad", "batch_argnums", NOT_ARGNUMS),
    *rows(
        "value_and_grad",
        "batch_argnums",
        these(ValueError, "there are 1. Pass them by position", (1, 2), (1, 3)),
        evaluate,
        num_micro_batches=2,
    ),
    *rows("gradient_estimator value_and_grad", "weight_fn", NOT_FUNCTIONS),
    *rows("value_and_grad", "weight_fn", returning(NOT_REAL + NONE), evaluate),
    *rows("value_and_grad", "weight_fn", returning(NOT_REAL + NONE), evaluate, num_micro_batches=2),
    *rows("value_and_grad", "axis_name", UNMAPPED, evaluate),
    *rows("value_and_grad", "link", these(ValueError, "Use `gradient_estimator", LATE, got="one: SwitchSt"), evaluate),
    *rows("value_and_grad", "loss_fn", [(f, *row[:2], "True") for f, *row in returning(NOT_LOSSES)], evaluate),
    *rows("value_and_grad", "loss_fn", returning(NO_LOSS), evaluate, num_micro_batches=2),
    *rows("value_and_grad", "loss_fn", returning(NOT_AUX), evaluate, has_aux=True),
    *rows("value_and_grad", "batch", NOT_SPLIT, evaluate, num_micro_batches=2),
    *rows("value_and_grad", "batch", NO_BATCH, lambda function, batch: function(WEIGHTS), num_micro_batches=2),
    *rows("value_and_grad", "batch", these(ValueError, "= 1 × 3", EIGHT, got="=8"), evaluate, num_micro_batches=3),
    *rows("value_and_grad", "params", NOT_ONLY_PARAMS, evaluate),
    *[
        row
        for link in (SAM, LATE, optax.chain(measured(SAM), optax.trace(0.9)))
        for row in rows("gradient_estimator", "state", NOT_STATES, evaluate_with, link=link)
    ],
    # Measurement
    *rows("measured", "value", NOT_LOSSES, update),
    *rows("measured", "value", these(ValueError, "value=loss, value_fn=loss_fn", None, got="got no value"), update),
    *rows("measured", "value_fn", these(ValueError, "use `gradient_estimator", None, got="got no value_fn"), update),
    *rows("measured", "value_fn", NOT_FUNCTIONS + returning(NOT_LOSSES + NO_LOSS), update),
    *rows("measured", "value_fn", returning(NOT_LOSSES + NO_LOSS), update, grad_fn=None),
    *rows("measured", "grad_fn", NOT_FUNCTIONS, update),
    *rows("measured", "value_and_grad_fn", NOT_FUNCTIONS + returning(NOT_LOSS_AND_GRADIENT), update),
    *rows("measured", "link", NOT_MEASURABLE, update),
    *rows("measured", "link", NOT_MEASURABLE_STACKS, update, updates=STACK, batch=FOUR),
    *rows("measurements", "state", NOT_MEASURED),
    # Instruments
    *rows(f"{BATCHES} loss_along m_sharpness", "loss_fn", NOT_FUNCTIONS + NO_FUNCTION),
    *rows(f"{BATCHES} loss_along m_sharpness", "loss_fn", returning(NOT_LOSSES + NO_LOSS + NARROW)),
    *rows(f"{BATCHES} m_sharpness", "params", NOT_PARAMS),
    *rows("loss_along", "first second", NOT_PARAMS),
    *rows("loss_along", "second", NOT_LIKE),
    *rows("loss_surface", "params", these(ValueError, "with filters", {"w": jnp.ones(3)}, got="shapes=[(3,)]")),
    *rows("hessian_eigenvalues hessian_trace spectral_density", "params", NOT_FINITE),
    *[
        row._replace(build=lambda build=row.build: jax.jit(lambda params: build(params=params))(WEIGHTS))
        for row in rows(BATCHES, "params", these(ValueError, "Call it outside of jax.jit", WEIGHTS, got="not tracers"))
    ],
    *rows(f"{BATCHES} loss_along", "batches", NOT_BATCHES),
    *[
        row._replace(argument="batch")
        for row in rows(f"{BATCHES} loss_along", "batches", [([batch], *row) for batch, *row in NOT_A_BATCH])
    ],
    *rows(f"{BATCHES} loss_along", "progress", NOT_FLAGS),
    *rows("m_sharpness", "batch", NOT_SPLIT, num_micro_batches=2),
    *rows("m_sharpness", "batch", these(ValueError, "= 1 × 3", EIGHT, got="batch_size=8"), num_micro_batches=3),
    *integers("m_sharpness", "num_micro_batches steps", 1),
    *integers("hessian_eigenvalues", "k max_products", 1),
    *integers("hessian_eigenvalues", "num_smallest", 0),
    *integers("spectral_density", "num_probes num_products", 1),
    *integers("hessian_trace", "num_probes", 2),
    *integers("average_sharpness", "num_samples", 2),
    *rows("hessian_eigenvalues", "k", these(ValueError, "got 6 params", 7)),
    *rows("hessian_eigenvalues", "num_smallest", these(ValueError, "got 6 params", 3, got="= 7 eigen"), k=4),
    *rows("hessian_eigenvalues", "k", these(ValueError, "max_products=1", 2), max_products=1),
    *rows("hessian_eigenvalues", "rtol", NOT_RADII),
    *rows("average_sharpness", "sigma", NOT_RADII),
    *rows("m_sharpness", "rho", NOT_RADII),
    *rows("loss_along", "h", NOT_POSITIVE + NONE),
    *rows("hessian_trace spectral_density average_sharpness loss_surface", "key", NOT_KEYS),
    *rows("loss_along loss_surface", "positions", NOT_POSITIONS),
    *rows("spectral_density", "positions", NOT_POSITIONS, lambda _, positions: DENSITY.smoothed(positions, 1.0)),
    *rows("spectral_density", "width", NOT_POSITIVE + NONE, lambda _, width: DENSITY.smoothed([0.0], width)),
    *rows("spectral_density", "width", NOT_POSITIVE, lambda _, width: plot_spectral_density(DENSITY, width=width)),
]


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
    assert all(
        issubclass(getattr(optax_sam, name), tuple) for name in classes
    )  # states, which hold what they are given
    functions = set(optax_sam.__all__) - classes
    assert {(name, argument) for name in functions for argument in parameters(name)} <= {row[:2] for row in TABLE}
