"""The programs of every recipe, combinator and way of the estimator, as text: the same before and after a move?

    git stash && python -m tests.programs runs/before && git stash pop
    python -m tests.programs runs/after && diff -r runs/before runs/after

Names of inner functions are left out, for they may change in a move. An error counts by its type.
"""

import argparse
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import PartitionSpec

import optax_sam
from tests.helpers.problems import mlp_batch, mlp_loss, mlp_params, split
from tests.helpers.registry import COMBINATORS, MEMBERS, batch_for

RHOS = {"constant": 0.1, "scheduled": optax.linear_schedule(0.1, 0.2, 10)}
WAYS = list(itertools.product((1, 4), ("micro_batch", "device", "batch"), ("vmap", "scan", "unroll", "auto")))
MAPS = ("none", "vmap", "checked", "unchecked")


def in_a_chain(link, stacked_member):
    """The program of one update, with every keyword that a link may take."""
    params, batch = mlp_params(), batch_for(stacked_member)

    def step(state, params, batch):
        value_and_grad = jax.value_and_grad(mlp_loss)
        mapped = jax.vmap(value_and_grad, in_axes=(None, 0)) if stacked_member.stacked else value_and_grad
        value, grads = mapped(params, batch)
        keywords = {"grad_fn": jax.grad(mlp_loss), "value_fn": mlp_loss, "value": jnp.mean(value), "batch": batch}
        return link.update(grads, state, params, **keywords)

    return jax.make_jaxpr(step)(link.init(params), params, batch)


def in_the_estimator(link, num_micro_batches, ascent_per, strategy, where):
    """The program of one estimate, by itself or on the members of an axis."""
    params, batch = mlp_params(), mlp_batch(size=32)
    axis = None if where == "none" else "data"
    estimator = optax_sam.gradient_estimator(
        mlp_loss,
        link,
        num_micro_batches=num_micro_batches,
        ascent_per=ascent_per,
        strategy=strategy,
        axis_name=axis,
    )
    function, state = estimator.value_and_grad, estimator.init(params)
    if where == "vmap":
        function, batch = jax.vmap(function, in_axes=(None, None, 0), axis_name=axis), split(batch, 4)
    elif where != "none":
        mesh = jax.make_mesh((4,), (axis,), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
        specs = PartitionSpec(), PartitionSpec(), PartitionSpec(axis)
        function = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=where == "checked"
        )
    return jax.make_jaxpr(function)(params, state, batch)


def programs():
    """Pairs of a name and a function that makes the program."""
    for member, (rho_name, rho) in itertools.product(MEMBERS, RHOS.items()):
        yield f"chain {member.name} {rho_name}", lambda m=member, r=rho: in_a_chain(m.make(r), m)
        for name, combinator in COMBINATORS.items():
            yield (
                f"chain {name} {member.name} {rho_name}",
                lambda c=combinator, m=member, r=rho: in_a_chain(c(m.make(r)), m),
            )
    for member, where, way in itertools.product(MEMBERS, MAPS, WAYS):
        if not member.stacked:
            name = f"estimator {member.name} {where} {' '.join(map(str, way))}"
            yield name, lambda m=member, o=where, w=way: in_the_estimator(m.make(0.1), *w, o)


def described(make):
    try:
        jaxpr = make().jaxpr
        used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)  # what nobody reads may go
        program = used.pretty_print(name_stack=False, source_info=False, use_color=False)
    except Exception as error:
        return type(error).__name__
    return re.sub(r"(let |name=|jaxpr=)\w+", r"\1…", program)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    for name, make in programs():
        (folder / name.replace(" ", "_")).write_text(described(make) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main()
