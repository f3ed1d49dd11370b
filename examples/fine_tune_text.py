"""Fine-tuning a pretrained sentence encoder with AdamW, warm-up, clipping, accumulation, padding and late SAM.

    python examples/fine_tune_text.py        # downloads what benchmarks/papers/text.py loads into data/: 90 MB

The last batch of an epoch is filled with rows that do not count, by ``weight_fn``. SAM takes the last third of the
steps; before it, a step costs one gradient.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

import optax_sam
from benchmarks.papers import text

BATCH, EPOCHS, SENTENCES = 64, 2, 2_000


def train(model, params, tokens, labels, epochs=EPOCHS):
    def loss_fn(params, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, batch[0]), batch[1])
        return jnp.sum(losses * batch[2]) / jnp.maximum(jnp.sum(batch[2]), 1)

    steps = epochs * (steps_per_epoch := -(-len(labels) // BATCH))
    link = optax_sam.measured(optax_sam.late(optax_sam.sam(rho=0.05), start=2 * steps // 3))
    # One ε for the whole batch; with ascent_per="micro_batch" this would be mSAM, at the same cost.
    options = {"num_micro_batches": 8, "ascent_per": "batch", "weight_fn": lambda batch: jnp.sum(batch[2])}
    estimator = optax_sam.gradient_estimator(loss_fn, link, **options)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 5e-5, steps // 10, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))

    @jax.jit
    def step(params, sam_state, state, batch):
        _, grads, sam_state = estimator.value_and_grad(params, sam_state, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), sam_state, state

    sam_state, state = estimator.init(params), tx.init(params)
    for index in (bar := tqdm.trange(steps, mininterval=10)):
        order = np.random.default_rng(index // steps_per_epoch).permutation(len(labels))
        rows = order[index % steps_per_epoch * BATCH :][:BATCH]
        filled, valid = np.resize(rows, BATCH), (np.arange(BATCH) < len(rows)).astype(np.float32)
        params, sam_state, state = step(params, sam_state, state, (tokens[filled], labels[filled], valid))
        m = optax_sam.measurements(sam_state)
        bar.set_postfix_str(f"L(w) {m.clean_loss:.3f}, L(w + ε) {m.perturbed_loss:.3f}, ‖g‖ {m.clean_norm:.2f}")
    return params


if __name__ == "__main__":
    sentences, labels = text.load_reviews(pathlib.Path("data"))
    minilm, model = text.load_minilm(pathlib.Path("data")), text.Classifier()
    tokens, order = text.tokenize(minilm.tokenizer, sentences), np.random.default_rng(0).permutation(len(labels))
    params = {**model.init(jax.random.key(0), tokens[:1])["params"], "encoder": minilm.params}
    params = train(model, params, tokens[order[:SENTENCES]], labels[order[:SENTENCES]])
    logits, expected = jnp.asarray(model.apply({"params": params}, tokens[order[-500:]])), labels[order[-500:]]
    print(f"test accuracy {100 * jnp.mean(logits.argmax(-1) == expected):.1f} %")
