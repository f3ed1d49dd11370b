r"""The plan: whether a mean over micro-batches takes less time lazily than in a loop, told from static shapes.

For each P × Q weight and each gradient of a micro-batch of K examples or tokens it counts, in multiply-adds,

.. math::
    \text{in a loop} \quad 3 K P Q + \alpha P Q, \qquad
    \text{lazily} \quad \tfrac52 K P Q + 3 K^2 (P + Q), \qquad
    \text{multiplied out} \quad 3 K P Q + \alpha' P Q

where α PQ stands for the reading and writing of arrays of the size of the weight by a turn of a loop, and α′ PQ for the
same where all micro-batches have such arrays at once. ``benchmarks/lazy.py`` measures both constants. An estimate by
these formulas decides whether the lazy program is traced at all, and then the multiply-adds of both programs decide.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core.primitives import dot_general_p, jit_p

from optax_sam._jaxpr import equations, programs_in, type_of
from optax_sam._lazy.gradients import gradient_of, is_weight, shapes_of_weights
from optax_sam._lazy.grams import RARELY
from optax_sam._lazy.interpreter import Interpreter

ALPHA, ALPHA_OF_COPIES = 80.0, 400.0  # two CPU cores, float32: 50 to 85 and 240 to 480, the more the wider a layer
MATERIALIZED = (
    "dot_general",
    "gather",
    "scatter-add",
    "reduce_sum",
    "reduce_max",
    "concatenate",
    "sort",
    "while",
    "scan",
)
MOST_TIME = 0.9  # of what a loop takes: estimates are no better
MOST_MEMORY = 1.35  # of what one micro-batch of all examples takes: XLA then takes at most 1.5, in tests/test_cost.py


class Plan(NamedTuple):
    """Estimates for the mean of a program over M micro-batches.

    Attributes:
        time: of the lazy program, relative to a loop.
        memory: of the lazy program, relative to one micro-batch of all examples, with params and gradients.
        slow: primitives in it that are slow for all micro-batches at once.
        weights: outputs that it averages without multiplying out.
        users: primitives for which sums are multiplied out.
        only_accumulates: whether it only averages gradients; a loop then needs less memory.
    """

    time: float
    memory: float
    slow: tuple[str, ...]
    weights: tuple[str, ...]
    users: tuple[str, ...]
    only_accumulates: bool

    @property
    def is_lazy(self) -> bool:
        """Whether the lazy program is the better choice."""
        return self.time < MOST_TIME and self.memory <= MOST_MEMORY and not self.slow and not self.only_accumulates

    def __str__(self) -> str:
        parts = [
            f"{'lazy' if self.is_lazy else 'a loop'}: lazily {self.time:.2f} × the time of a loop",
            f"{self.memory:.2f} × the memory of one micro-batch",
            f"outer products: {', '.join(self.weights) or 'none'}",
        ]
        parts += [f"multiplied out for: {', '.join(self.users)}"] if self.users else []
        parts += ["no more than gradient accumulation"] if self.only_accumulates else []
        parts += [f"slow for all at once: {', '.join(self.slow)}"] if self.slow else []
        return "; ".join(parts)


def why_not_lazy(closed: ClosedJaxpr, stacks: Sequence[jax.Array]) -> str | None:
    """Why a program cannot be evaluated for all micro-batches at once, or None."""
    if any(any(jax.typeof(x).sharding.spec) for x in (*closed.consts, *stacks)):
        return "arrays on an Explicit mesh"
    if any(type(effect).__name__ != "NamedAxisEffect" for effect in closed.effects):
        return "side effects"
    for eqn in equations(closed.jaxpr):
        name = eqn.primitive.name
        if name in ("pure_callback", "ffi_call"):
            return "callbacks"  # which see one micro-batch
        if name.startswith("random_") and "rbg" in str(type_of(eqn.invars[0]).dtype):
            return "rbg keys"  # many at once draw other numbers than one after another
    return None


def is_promising(closed: ClosedJaxpr) -> bool:
    """Whether the lazy program would be faster if no rule declined, and if each gradient were taken twice."""
    if any(eqn.primitive.name == "conv_general_dilated" for eqn in equations(closed.jaxpr)):
        return False
    shapes = shapes_of_weights(closed)
    gradients = [x for eqn in equations(closed.jaxpr, dot_general_p) if (x := gradient_of(eqn, shapes))]
    in_a_loop = [3 * x.terms * x.size + ALPHA * x.size for x in gradients]
    lazily = [2.5 * x.terms * x.size + 3 * x.terms**2 * sum(x.sizes) for x in gradients]
    return sum(map(min, lazily, in_a_loop)) < MOST_TIME * sum(in_a_loop)


def plan(run: Interpreter, closed: ClosedJaxpr, lazily: Jaxpr, names: Sequence[str]) -> Plan:
    """The plan for a program of one micro-batch that was evaluated into another for all of them."""
    copies = [math.prod(value.shape) for _, value in run.multiplied_out]
    copies += [x.size for x in run.formed] + list(map(math.prod, run.averaged))
    weights = sum(x.size for x in run.lazy + run.formed) + sum(map(math.prod, run.averaged))
    in_a_loop = run.size * (multiply_adds(closed.jaxpr) + ALPHA * weights)
    at_once = multiply_adds(lazily) + ALPHA * weights + run.size * ALPHA_OF_COPIES * sum(copies)

    def whole(variable: Var) -> int:
        is_activation = variable in run.own and not is_weight(type_of(variable), run.weights)
        return _bytes(variable) * (run.size if is_activation else 1)

    inputs = sum(map(_bytes, (*lazily.constvars, *lazily.invars)))
    memory = (inputs + peak_bytes(lazily, _bytes)) / (inputs + peak_bytes(closed.jaxpr, whole))
    users = dict.fromkeys(user for user, _ in run.multiplied_out)
    lazy = (name for name, is_lazy in zip(names, run.stays_lazy, strict=True) if is_lazy)
    time = at_once / max(in_a_loop, 1)
    return Plan(time, memory, tuple(sorted(run.slow)), tuple(lazy), tuple(users), only_accumulates=run.uses == 0)


def multiply_adds(jaxpr: Jaxpr) -> int:
    """Those of all matrix products of a program, of the longest branch, without what runs but rarely."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive is dot_general_p:
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += math.prod(type_of(eqn.outvars[0]).shape) * math.prod(
                type_of(eqn.invars[0]).shape[axis] for axis in contracted
            )
        elif eqn.primitive is not jit_p or eqn.params["name"] != RARELY:
            inner = [multiply_adds(program) for program in programs_in(eqn.params)]
            turns = eqn.params.get("length", 1)
            total += turns * (max(inner, default=0) if eqn.primitive.name == "cond" else sum(inner))
    return total


def peak_bytes(jaxpr: Jaxpr, size_of: Callable[[Var], int]) -> int:
    """The most bytes that are alive at once in a program, besides its inputs.

    As XLA does it, what one equation makes element by element for one other takes no memory, and what is made element
    by element takes the place of an array that ends there.
    """
    eqns = _without_repetitions(jaxpr.eqns)
    uses = collections.Counter(variable for eqn in eqns for variable in _variables(eqn.invars))
    inside = [max((peak_bytes(x, size_of) for x in programs_in(eqn.params)), default=0) for eqn in eqns]
    is_elementwise = [eqn.primitive.name not in MATERIALIZED and not x for eqn, x in zip(eqns, inside, strict=True)]
    ends = _ends(eqns, jaxpr.outvars, is_elementwise)
    changes = [0] * (len(eqns) + 2)
    for number, eqn in enumerate(eqns):
        for variable in ends.keys() & set(eqn.outvars):
            if not (is_elementwise[number] and uses[variable] == 1):
                changes[number] += size_of(variable)
                changes[ends[variable]] -= size_of(variable)
    return max(map(sum, zip(itertools.accumulate(changes), inside, strict=False)), default=0)


def _ends(eqns: Sequence[JaxprEqn], outvars: Iterable[Any], is_elementwise: Sequence[bool]) -> dict[Var, int]:
    """For each variable that is used the equation before which its array is free."""
    last = {variable: number for number, eqn in enumerate(eqns) for variable in _variables(eqn.invars)}
    ends = {variable: number if is_elementwise[number] else number + 1 for variable, number in last.items()}
    return ends | dict.fromkeys(_variables(outvars), len(eqns) + 1)


def _without_repetitions(eqns: Sequence[JaxprEqn]) -> list[JaxprEqn]:
    """The equations but for calls of one function with the same arguments, such as norms, of which XLA makes one."""
    found = {}
    for number, eqn in enumerate(eqns):
        is_call = any(programs_in(eqn.params)) and not eqn.effects
        found.setdefault((eqn.primitive, *map(id, eqn.invars)) if is_call else number, eqn)
    return list(found.values())


def _bytes(variable: Var) -> int:
    return math.prod(type_of(variable).shape) * type_of(variable).dtype.itemsize


def _variables(atoms: Iterable[Any]) -> list[Var]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]
