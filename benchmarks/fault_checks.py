"""The checks of ``benchmarks/faults.py``: what SAM is asked for, against closed forms or NumPy in float64.

None compares with what a library returned. Each takes what it checks, so that a broken link can be seen to fail.
"""

import collections
import importlib.resources
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import optax_sam

RHO, RATE = 0.5, 0.1
TOLERANCE = 1e-5
CURVATURES, START = np.array([1.0, 4.0, 9.0]), np.array([1.0, -1.0, 0.5])
MICRO_BATCHES = 4

Wrap = Callable[[optax.GradientTransformation], Any]
Make = Callable[[optax.ScalarOrSchedule, optax.GradientTransformation], optax.GradientTransformationExtraArgs]


class Outcome(NamedTuple):
    """What came out of a check, and whether it is what was asked."""

    is_right: bool
    text: str


# Three ways to have SAM in front of an optimizer.


def opaque(rho: optax.ScalarOrSchedule, base: optax.GradientTransformation, **options: Any) -> Any:
    """``optax.contrib.sam``, both gradients in one update."""
    return transparent(rho, base, opaque_mode=True, **options)


def transparent(rho: optax.ScalarOrSchedule, base: optax.GradientTransformation, **options: Any) -> Any:
    """``optax.contrib.sam``, two updates for one step of SAM."""
    return optax.contrib.sam(base, optax.chain(optax.contrib.normalize(), optax.sgd(rho)), **options)


def chained(rho: optax.ScalarOrSchedule, base: optax.GradientTransformation) -> Any:
    return optax.chain(optax_sam.sam(rho), base)


# The loss, the formula, and what the checks have in common.


def gradient(params: Any, *_: Any) -> Any:
    """Of a quadratic loss with the curvatures; the step number that ``optax.contrib.sam`` passes is not needed."""
    return CURVATURES * params


def sam_gradient(params: np.ndarray, rho: float, gradient: Callable[[Any], Any] = gradient) -> np.ndarray:
    """The formula of SAM, in NumPy."""
    clean = gradient(params)
    return gradient(params + rho * clean / np.linalg.norm(clean))


def trajectory(num_steps: int) -> list[np.ndarray]:
    """Params before and after each step of SAM with gradient descent, by the formula."""
    points = [START]
    for _ in range(num_steps):
        points.append(points[-1] - RATE * sam_gradient(points[-1], RHO))
    return points


def step(tx: Any, params: Any, state: Any, gradient: Callable[..., Any] = gradient) -> tuple[Any, Any]:
    updates, state = tx.update(gradient(params), state, params, grad_fn=gradient)
    return optax.apply_updates(params, updates), state


def train(tx: Any, calls: int, start: Any = START, gradient: Callable[..., Any] = gradient) -> list[np.ndarray]:
    """Params after each of some calls of ``update``."""
    params, seen = jnp.asarray(start, jnp.float32), []
    state = tx.init(params)
    for _ in range(calls):
        params, state = step(tx, params, state, gradient)
        seen.append(np.asarray(params, np.float64))
    return seen


def points_of(tx: Any, grads: Any, params: Any, calls: int = 1) -> list[Any]:
    """The points at which the SAM gradient is evaluated."""
    points, state = [], tx.init(params)

    def record(point, *_):
        points.append(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), point))
        return grads

    for _ in range(calls):
        _, state = tx.update(grads, state, params, grad_fn=record)
    return points


def both(*outcomes: Outcome) -> Outcome:
    """Right if all are."""
    return Outcome(all(outcome.is_right for outcome in outcomes), "; ".join(outcome.text for outcome in outcomes))


def compared(what: str, actual: Any, formula: Any, tolerance: float = TOLERANCE) -> Outcome:
    """Right if the largest difference is nothing, relative to the largest element of the formula."""
    difference = float(np.max(np.abs(np.asarray(actual, np.float64) - formula)) / np.max(np.abs(formula)))
    size = f"{difference:.0%}" if difference >= 0.01 else f"{difference:.1g}"
    return Outcome(difference <= tolerance, f"{what}: off by {size}")


def noted(outcome: Outcome, note: Outcome) -> Outcome:
    """The outcome, with the text of another one that is not judged."""
    return Outcome(outcome.is_right, f"{outcome.text} ({note.text})")


def raised(what: str, error: Exception, is_right: bool = False) -> Outcome:
    """The first words of an error."""
    words = str(error).split()
    message = " ".join(words[:9]) + (" …" if len(words) > 9 else "")
    return Outcome(is_right, f"{what}: {type(error).__name__}: {message}")


# 1 to 3: numerics.


def zero_gradient(make: Make) -> Outcome:
    """In a minimum ε is 0, and so is the step."""
    [after] = train(make(RHO, optax.sgd(RATE)), 1, start=np.zeros(3))
    return Outcome(not np.any(after), f"a zero gradient moves w by {np.max(np.abs(after)):g}")


def momentum_after_inf(tx: Any) -> Outcome:
    """The only gradient that the optimizer with momentum took is 1; then the other one met an inf."""
    params = jnp.zeros(3)
    state = tx.init(params)
    for size in (1.0, 1.0, np.inf):
        grads = jnp.full(3, size)
        _, state = tx.update(grads, state, params, grad_fn=lambda *_, grads=grads: grads)
    momentum = np.asarray(optax.tree.get(state, "trace"))
    return Outcome(np.array_equal(momentum, np.ones(3)), f"momentum of 1 after an inf: {momentum[0]:g}")


def phases() -> optax.GradientTransformationExtraArgs:
    """Two optimizers in turn, as in transparent mode; the second has momentum."""
    optimizers = [chained(RHO, optax.sgd(RATE)), optax.sgd(RATE, momentum=0.9)]
    return optax_sam.switch_by(lambda step: step % 2, optimizers)


def perturbation_length(make: Make, grads: list[jax.Array]) -> Outcome:
    """The length of ε is rho, to the precision of the gradient's dtype."""
    params = jax.tree.map(jnp.zeros_like, grads)
    [point] = points_of(make(RHO, optax.sgd(RATE)), grads, params)
    length, dtype = float(np.linalg.norm(np.concatenate(point))), grads[0].dtype
    is_right = abs(length / RHO - 1) <= float(jnp.finfo(dtype).eps)
    return Outcome(is_right, f"{dtype}: ‖ε‖ = {length / RHO:.3f} ρ")


def small_gradient() -> list[jax.Array]:
    """Squares underflow in float16."""
    return [jnp.full(100, 1e-5, jnp.float16)]


def many_leaves() -> list[jax.Array]:
    """Norm 720, and each of 256 squared norms of 1000 is less than half the spacing of bfloat16 at 512²."""
    return [jnp.full(1, 512, jnp.bfloat16)] + [jnp.full(10, 10, jnp.bfloat16)] * 256


def moved_params(make: Make, params: np.ndarray, grads: np.ndarray) -> Outcome:
    """Most params from 1 to 2 must stay, as ε is less than a rounding error: right is ε on average."""
    rho, spacing = 0.05, 2.0**-7
    start, direction = jnp.asarray(params, jnp.bfloat16), jnp.asarray(grads, jnp.bfloat16)
    [point] = points_of(make(rho, optax.sgd(RATE)), direction, start)
    moves, direction = point - np.asarray(start, np.float64), np.asarray(direction, np.float64)
    direction /= np.linalg.norm(direction)
    along = float(moves @ direction)
    # An element that moves by the spacing with probability |ε| / spacing has the variance |ε| · spacing.
    deviation = float(np.sum(rho * np.abs(direction) ** 3 * spacing)) ** 0.5
    text = f"{np.count_nonzero(moves):,} of {moves.size:,} params move, {along:.3f} along g"
    text += f", {np.linalg.norm(moves):.3f} in all"
    return Outcome(abs(along - rho) < 5 * deviation, text)


def random_and_equal_params(make: Make, size: int = 1_000_000) -> Outcome:
    """Random params and gradients, and besides them params of 1.5 whose gradients are ±1."""
    rng = np.random.default_rng(0)
    equal = moved_params(make, np.full(size, 1.5), rng.choice([-1.0, 1.0], size))
    outcome = moved_params(make, rng.uniform(1, 2, size), rng.normal(size=size))
    return both(outcome, equal._replace(text=f"all w and all g² equal: {equal.text}"))


# 4: one batch in several micro-batches.


def regression() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(MICRO_BATCHES * 2, 3)), rng.normal(size=3)


def regression_loss(params: Any, inputs: Any) -> jax.Array:
    return jnp.mean((inputs @ params - 1.0) ** 2)


def regression_gradient(params: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    return 2 * inputs.T @ (inputs @ params - 1.0) / len(inputs)


def accumulated(what: str, wrap: Wrap) -> Outcome:
    """The gradient that an optimizer with ``MultiSteps`` applies, against SAM's of the whole batch.

    Args:
        what: where ``MultiSteps`` stands.
        wrap: from gradient descent to the optimizer.
    """
    inputs, start = regression()
    shards, executed = np.split(inputs, MICRO_BATCHES), []
    tx, params = wrap(optax.sgd(1.0)), jnp.asarray(start, jnp.float32)
    state, total = tx.init(params), jnp.zeros(3)
    for shard in shards:

        def grad_fn(point, *_, shard=shard):
            jax.debug.callback(lambda: executed.append(1))
            return jax.grad(regression_loss)(point, shard)

        updates, state = tx.update(jax.grad(regression_loss)(params, shard), state, params, grad_fn=grad_fn)
        total -= updates
    jax.effects_barrier()
    outcome = compared(what, total, sam_gradient(start, RHO, lambda w: regression_gradient(w, inputs)))
    clean = regression_gradient(start, inputs)
    last = regression_gradient(start + RHO * clean / np.linalg.norm(clean), shards[-1])
    averaged = np.mean([sam_gradient(start, RHO, lambda w, x=x: regression_gradient(w, x)) for x in shards], axis=0)
    note = f", only the last of {len(executed)} SAM gradients counts" if compared("", total, last).is_right else ""
    note += ", as it is mSAM" if compared("", total, averaged).is_right else ""
    return Outcome(outcome.is_right, outcome.text + note)


def outside(make: Make) -> Wrap:
    return lambda base: optax.MultiSteps(make(RHO, base), MICRO_BATCHES)


def inside(make: Make) -> Wrap:
    return lambda base: make(RHO, optax.MultiSteps(base, MICRO_BATCHES).gradient_transformation())


def estimated() -> Outcome:
    """The same from the estimator, with the number of gradients that are executed."""
    inputs, start = regression()
    executed = []

    def loss_fn(params, batch):
        loss = regression_loss(params, batch)
        jax.debug.callback(lambda _: executed.append(1), loss)
        return loss

    function = optax_sam.value_and_grad(
        loss_fn, optax_sam.sam(RHO), num_micro_batches=MICRO_BATCHES, ascent_per="batch"
    )
    _, grads = function(jnp.asarray(start, jnp.float32), jnp.asarray(inputs, jnp.float32))
    jax.effects_barrier()
    formula = sam_gradient(start, RHO, lambda w: regression_gradient(w, inputs))
    outcome = compared('`ascent_per="batch"`', grads, formula)
    is_cheap = len(executed) == 2 * MICRO_BATCHES
    return Outcome(outcome.is_right and is_cheap, f"{outcome.text}, {len(executed)} gradients of micro-batches")


# 5 to 9: states, schedules and what stands beside SAM.


def switched_off(tx: Any) -> Outcome:
    """A constant gradient of 1 at learning rate 1: four steps go 4."""
    *_, after = train(tx, 4, start=np.zeros(3), gradient=jnp.ones_like)
    return Outcome(np.array_equal(after, np.full(3, -4.0)), f"4 steps of 1 go {-after[0]:g}")


def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    return 0.1 * (1 + jnp.asarray(step, jnp.float32))


def scheduled(what: str, tx: Any) -> Outcome:
    """The lengths of ε over three steps."""
    points = points_of(tx, jnp.asarray(START, jnp.float32), jnp.zeros(3), calls=3)
    lengths = [float(np.linalg.norm(point)) for point in points]
    return Outcome(np.allclose(lengths, [0.1, 0.2, 0.3]), f"{what}: ‖ε‖ = {', '.join(f'{n:.2f}' for n in lengths)}")


def donated(what: str, make: Make, calls: int) -> Outcome:
    """Two steps of a compiled function that takes the memory of params and state."""
    tx, params = make(RHO, optax.sgd(RATE)), jnp.asarray(START, jnp.float32)
    state = tx.init(params)
    donating = jax.jit(lambda params, state: step(tx, params, state), donate_argnums=(0, 1))
    try:
        for _ in range(calls):
            params, state = donating(params, state)
    except jax.errors.JaxRuntimeError as error:
        return raised(what, error)
    return compared(what, params, trajectory(2)[-1])


def looped(what: str, make: Make, base: optax.GradientTransformation, calls: int) -> Outcome:
    """Two steps in ``lax.scan``."""
    tx, params = make(RHO, optax.chain(base, optax.sgd(RATE))), jnp.asarray(START, jnp.float32)
    try:
        carry, _ = jax.lax.scan(lambda carry, _: (step(tx, *carry), None), (params, tx.init(params)), length=calls)
    except TypeError as error:
        return raised(what, error)
    return compared(what, carry[0], trajectory(2)[-1])


def if_finite() -> optax.GradientTransformation:
    """Has a bool in its state."""
    return optax.apply_if_finite(optax.identity(), max_consecutive_errors=5)


def noise() -> optax.GradientTransformation:
    """Has a key in its state; the noise is zero, so that the formula holds."""
    return optax.add_noise(eta=0.0, gamma=0.55, key=jax.random.key(0))


def plateau(what: str, make: Make) -> Outcome:
    """The loss never falls, so that after the first step each is half as long as the one before."""
    tx = optax.chain(make(RHO, optax.sgd(1.0)), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))
    params = jnp.zeros(3)
    state = tx.init(params)
    try:
        for _ in range(4):
            updates, state = tx.update(jnp.ones(3), state, params, grad_fn=jnp.ones_like, value=1.0)
            params = optax.apply_updates(params, updates)
    except TypeError as error:
        return raised(what, error)
    return compared(what, params, np.full(3, -1.875))


# 10 to 13: other transformations around SAM, and what it is given.


def clipped_and_decayed(what: str, wrap: Wrap) -> Outcome:
    """Steps at learning rate 1: one that is to be clipped to 1, and how much of w another one takes besides s.

    Args:
        what: where clipping and weight decay stand.
        wrap: from clipping or weight decay to the whole optimizer.
    """
    [after] = train(wrap(optax.clip_by_global_norm(1.0)), 1)
    length = float(np.linalg.norm(after - START))
    [after] = train(wrap(optax.add_decayed_weights(0.1)), 1)
    rest = START - after - sam_gradient(START, RHO)
    is_right = abs(length - 1) <= TOLERANCE and compared("", rest, 0.1 * START).is_right
    decay = float(rest @ START / (START @ START))
    return Outcome(is_right, f"{what}: ‖update‖ = {length:.2f}, decay {round(decay, 2) + 0:.2f}")


def in_front(make: Make) -> Wrap:
    return lambda link: optax.chain(link, make(RHO, optax.sgd(1.0)))


def behind(make: Make) -> Wrap:
    return lambda link: make(RHO, optax.chain(link, optax.sgd(1.0)))


FIRST = {"first": True, "second": False}


def masked_ascent() -> optax.GradientTransformation:
    return optax.masked(optax.chain(optax.contrib.normalize(), optax.sgd(RHO)), FIRST)


def only_first(tx: Any) -> Outcome:
    """The perturbation of two leaves of which only the first is to move."""
    params = {"first": jnp.zeros(2), "second": jnp.zeros(2)}
    grads = {"first": jnp.array([3.0, 4.0]), "second": jnp.array([1.0, 2.0])}
    [point] = points_of(tx, grads, params)
    first = compared("", point["first"], RHO * np.array([0.6, 0.8]))
    lengths = [float(np.linalg.norm(point[name])) for name in ("first", "second")]
    return Outcome(
        first.is_right and lengths[1] == 0.0,
        f"the first leaf moves by {lengths[0]:.2f}, the second by {lengths[1]:.2f}",
    )


def group_gradient(params: Any, *_: Any) -> Any:
    """Of a² + 3b²/2 + ab."""
    return {"a": 2 * params["a"] + params["b"], "b": params["a"] + 3 * params["b"]}


def grouped(what: str, wrap: Wrap) -> Outcome:
    """A step of SAM where the learning rate is 1 for a and 0.5 for b, or an error that says what to do."""
    tx, params = wrap(optax.sgd(1.0)), {"a": jnp.ones([]), "b": jnp.ones([])}
    try:
        updates, _ = tx.update(group_gradient(params), tx.init(params), params, grad_fn=group_gradient)
    except TypeError as error:
        return raised(what, error)
    except ValueError as error:
        return raised(what, error, is_right="put the link in front" in str(error))
    hessian = np.array([[2.0, 1.0], [1.0, 3.0]])
    formula = -np.array([1.0, 0.5]) * sam_gradient(np.ones(2), RHO, lambda w: hessian @ w)
    return compared(what, [updates["a"], updates["b"]], formula)


def partition(base: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.partition({"a": base, "b": optax.sgd(0.5)}, {"a": "a", "b": "b"})


def masked(base: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    rest = optax.masked(optax.sgd(0.5), {"a": False, "b": True})
    return optax.chain(optax.masked(base, {"a": True, "b": False}), rest)


def grouped_both_ways(make: Make) -> Outcome:
    """SAM for one of the groups."""
    around = {"partition": partition, "masked": masked}
    return both(*(grouped(name, lambda base, f=f: f(make(RHO, base))) for name, f in around.items()))


def tupled(make: Make) -> Outcome:
    """Gradient functions that return a pair: the gradient out of it, or an error that says so."""
    loss_fn = lambda params: jnp.sum(CURVATURES * params**2) / 2  # noqa: E731
    functions = {
        "value_and_grad": jax.value_and_grad(loss_fn),
        "has_aux": jax.grad(lambda params: (loss_fn(params), loss_fn(params)), has_aux=True),
    }
    outcomes, params = [], jnp.asarray(START, jnp.float32)
    for name, function in functions.items():
        tx = make(RHO, optax.sgd(1.0))
        try:
            updates, _ = tx.update(
                gradient(params), tx.init(params), params, grad_fn=lambda point, *_, function=function: function(point)
            )
        except (TypeError, ValueError) as error:
            outcomes.append(raised(name, error, is_right="Take the gradient alone" in str(error)))
            continue
        if isinstance(updates, tuple):
            outcomes.append(Outcome(False, f"{name}: the update is a tuple of {len(updates)}"))
        else:
            outcomes.append(compared(name, updates, -sam_gradient(START, RHO)))
    return both(*outcomes)


# 14 and 15: what the caller sees, and the formula.


def tally(counts: collections.Counter[str], name: str) -> optax.GradientTransformation:
    """Counts the updates that come through."""

    def count(updates, params):
        del params
        counts[name] += 1
        return updates

    return optax.stateless(count)


def seen_params(make: Callable[[Any, Any], Any], calls: int) -> Outcome:
    """Params after each call, and how often both optimizers run, in two steps of SAM.

    Args:
        make: from what stands before the ascent and the optimizer to SAM.
        calls: of ``update``, for two steps.
    """
    counts = collections.Counter()
    tx = make(tally(counts, "ascent"), optax.chain(tally(counts, "optimizer"), optax.sgd(RATE)))
    clean = trajectory(2)
    distances = [min(float(np.linalg.norm(seen - point)) for point in clean) for seen in train(tx, calls)]
    away = sum(distance > TOLERANCE for distance in distances)
    text = f"after {away} of {calls} updates the caller sees w + ε"
    text += f", {max(distances):.2f} from w" if away else ""
    text += f"; in 2 steps the ascent runs {counts['ascent']} times, the optimizer {counts['optimizer']}"
    return Outcome(away == 0 and counts["ascent"] == counts["optimizer"] == 2, text)


def transparent_tallied(before: Any, base: optax.GradientTransformation) -> Any:
    return optax.contrib.sam(base, optax.chain(before, optax.contrib.normalize(), optax.sgd(RHO)))


def chained_tallied(before: Any, base: optax.GradientTransformation) -> Any:
    return optax.chain(optax_sam.sharpness_aware(optax.chain(before, optax_sam.normalized_ascent(RHO))), base)


def one_step(make: Make, num_starts: int = 100) -> Outcome:
    """The params after one step from random points, in float64, for a loss that is not convex."""
    rng = np.random.default_rng(0)
    factor, targets, starts = rng.normal(size=(6, 4)), rng.normal(size=6), rng.normal(size=(num_starts, 4))

    def by_hand(w):
        output = np.tanh(factor @ w)
        return factor.T @ ((output - targets) * (1 - output**2))

    with jax.enable_x64(True):
        tx = make(RHO, optax.sgd(RATE))
        grad_fn = jax.grad(lambda w: jnp.sum((jnp.tanh(factor @ w) - targets) ** 2) / 2)
        stepped = jax.jit(lambda w: step(tx, w, tx.init(w), lambda w, *_: grad_fn(w))[0])
        after = np.stack([stepped(jnp.asarray(start)) for start in starts])
    formula = np.stack([start - RATE * sam_gradient(start, RHO, by_hand) for start in starts])
    return compared(f"one step from {num_starts} points", after, formula, tolerance=1e-12)


def one_step_of_contrib() -> Outcome:
    """The same, and the tests that are installed with Optax."""
    outcome = one_step(opaque)
    path = importlib.resources.files("optax.contrib") / "_sam_test.py"
    names = re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8")) if path.is_file() else []
    if names == ["test_optimization"]:
        note = "; no test of it: its only one is of where 50,000 updates end"
    else:
        note = f"; its tests: {', '.join(names)}" if names else ""
    return Outcome(outcome.is_right, outcome.text + note)
