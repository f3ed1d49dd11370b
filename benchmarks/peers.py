"""What a user would pick instead: Optax's own SAM, SAM and mSAM as in textbooks, and SAM in PyTorch."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from benchmarks import networks

RHO = 0.05
State = tuple[Any, ...]
Step = Callable[[State, networks.Batch], State]


def contrib_opaque(task: networks.Task, optimizer: optax.GradientTransformation) -> tuple[State, Step]:
    """``optax.contrib.sam``, both gradients in one update."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    tx = optax.contrib.sam(optimizer, ascent, sync_period=2, opaque_mode=True)

    def step(state, batch):
        params, state = state
        grads = jax.grad(task.loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, grad_fn=lambda point, _: jax.grad(task.loss_fn)(point, batch))
        return optax.apply_updates(params, updates), state

    params = task.init()
    return (params, tx.init(params)), step


def contrib_transparent(task: networks.Task, optimizer: optax.GradientTransformation) -> tuple[State, Step]:
    """``optax.contrib.sam``, two updates for one step of SAM."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    tx = optax.contrib.sam(optimizer, ascent, sync_period=2)

    def step(state, batch):
        params, state = state
        for _ in range(2):
            updates, state = tx.update(jax.grad(task.loss_fn)(params, batch), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params = jax.tree.map(jnp.copy, task.init())
    return (params, tx.init(jax.tree.map(jnp.copy, params))), step


def _textbook_gradient(loss_fn: Callable[..., jax.Array], params: Any, batch: networks.Batch) -> Any:
    grads = jax.grad(loss_fn)(params, batch)
    norm = optax.tree.norm(grads)
    return jax.grad(loss_fn)(jax.tree.map(lambda w, g: w + RHO * g / (norm + 1e-12), params, grads), batch)


def textbook_sam(task: networks.Task, optimizer: optax.GradientTransformation) -> tuple[State, Step]:
    """Five lines by hand."""

    def step(state, batch):
        params, state = state
        updates, state = optimizer.update(_textbook_gradient(task.loss_fn, params, batch), state, params)
        return optax.apply_updates(params, updates), state

    params = task.init()
    return (params, optimizer.init(params)), step


def textbook_msam(task: networks.Task, optimizer: optax.GradientTransformation) -> tuple[State, Step]:
    """The same under ``vmap`` over 8 micro-batches."""

    def step(state, batch):
        params, state = state
        micro_batches = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
        grads = jax.vmap(lambda one: _textbook_gradient(task.loss_fn, params, one))(micro_batches)
        updates, state = optimizer.update(jax.tree.map(lambda g: g.mean(axis=0), grads), state, params)
        return optax.apply_updates(params, updates), state

    params = task.init()
    return (params, optimizer.init(params)), step


PEERS = {
    "optax.contrib.sam, opaque": contrib_opaque,
    "optax.contrib.sam, transparent": contrib_transparent,
    "textbook SAM": textbook_sam,
    "textbook mSAM, M = 8, vmap": textbook_msam,
}


def torch_steps(name: str, task: networks.Task, optimizer: str) -> dict[str, Callable[[], Any]]:
    """Plain and SAM steps of the same network in PyTorch with pytorch-optimizer, on as many threads as cores.

    Empty where PyTorch is not installed.
    """
    try:
        import pytorch_optimizer  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    from benchmarks import torch_networks

    torch.set_num_threads(os.cpu_count() or 1)
    inputs, labels = (torch.asarray(jax.device_get(x).copy()) for x in task.batch())
    inputs = inputs if task.has_tokens else inputs.permute(0, 3, 1, 2).contiguous()
    labels = labels.long()
    make = {
        "sgd": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
        "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
    }
    base, options = make[optimizer]

    def loss(model):
        logits = model(inputs.int() if task.has_tokens else inputs)
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def plain_step(model, base_optimizer):
        base_optimizer.zero_grad()
        loss(model).backward()
        base_optimizer.step()

    def sam_step(model, sam):
        loss(model).backward()
        sam.first_step(zero_grad=True)
        loss(model).backward()
        sam.second_step(zero_grad=True)

    plain, sharp = torch_networks.make(name), torch_networks.make(name)
    plain_optimizer = base(plain.parameters(), **options)
    sam_optimizer = pytorch_optimizer.SAM(sharp.parameters(), base, rho=RHO, **options)
    return {
        "PyTorch, plain": lambda: plain_step(plain, plain_optimizer),
        "PyTorch, SAM of pytorch-optimizer": lambda: sam_step(sharp, sam_optimizer),
    }
