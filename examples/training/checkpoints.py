"""Checkpoints with Orbax: a run that is killed and started again goes on from the last one that is not damaged."""

import copy
import hashlib
import itertools
import json
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tqdm
from jax.experimental import multihost_utils

History = dict[str, list[float]]
DIGESTS = "digests.json"
NOTHING_SAVED, ALL_DAMAGED, UNREADABLE = -1, -2, -3


class Checkpoints:
    """The checkpoints of one network, one per epoch, the last two kept. Without a folder nothing is kept."""

    def __init__(self, folder: pathlib.Path | None) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self.manager = None
        if folder is not None:
            self.manager = ocp.CheckpointManager(folder.resolve(), options=options, handler_registry=handlers())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits until all is saved."""
        if self.manager is not None:
            self.manager.close()

    def restore(self, state: Any, history: History) -> tuple[Any, History]:
        """The state and history that were saved last, or these where nothing was.

        A damaged checkpoint is moved aside, and the one before it is used.

        Raises:
            ValueError: all checkpoints are damaged; none was moved.
        """
        if self.manager is None or (epoch := newest_sound_epoch(self.manager)) is None:
            return state, history
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target), history=ocp.args.JsonRestore())
        restored = self.manager.restore(epoch, args=items)
        return restored["state"], restored["history"]

    def save(self, epoch: int, state: Any, history: History) -> None:
        """Saves in the background; a checkpoint that is not complete when the process dies does not count."""
        if self.manager is not None:
            as_it_is = copy.deepcopy(history)  # which goes on while this is written
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), history=ocp.args.JsonSave(as_it_is))
            self.manager.save(epoch, args=items)


class Digests(ocp.CheckpointHandler):
    """Leaves the digests of an item's files beside them: Orbax restores flipped bits of arrays without a word."""

    def finalize(self, directory: Any) -> None:
        """Called in one process, when all files are written and the checkpoint does not count yet."""
        super().finalize(directory)
        folder = pathlib.Path(directory)
        digests = {path.relative_to(folder).as_posix(): digest(path) for path in folder.rglob("*") if path.is_file()}
        (folder / DIGESTS).write_text(json.dumps(digests, indent=1))


class StateHandler(Digests, ocp.StandardCheckpointHandler):
    """Arrays with digests."""


class HistoryHandler(Digests, ocp.JsonCheckpointHandler):
    """JSON with digests."""


def handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """Who saves and restores what."""
    registry, state, history = ocp.handlers.DefaultCheckpointHandlerRegistry(), StateHandler(), HistoryHandler()
    registry.add("state", ocp.args.StandardSave, state)
    registry.add("state", ocp.args.StandardRestore, state)
    registry.add("history", ocp.args.JsonSave, history)
    registry.add("history", ocp.args.JsonRestore, history)
    return registry


def newest_sound_epoch(manager: ocp.CheckpointManager) -> int | None:
    """The epoch of the last checkpoint that is not damaged, the same in all processes; None where nothing was saved."""
    folder, epoch, failure = pathlib.Path(manager.directory), NOTHING_SAVED, None
    if jax.process_index() == 0:
        try:
            epoch = set_damaged_aside(folder, manager.all_steps())
        except OSError as error:
            epoch, failure = UNREADABLE, error
    epoch = int(multihost_utils.broadcast_one_to_all(np.int32(epoch)))
    if epoch == UNREADABLE:
        raise failure or OSError(f"process 0 could not read or rename the checkpoints in {folder}")
    if epoch == ALL_DAMAGED:
        damages = "; ".join(f"{epoch}: {damage(folder / str(epoch))}" for epoch in manager.all_steps())
        raise ValueError(
            f"all checkpoints in {folder} are damaged ({damages}); put back copies of them, or move them away to begin "
            "anew"
        )
    manager.reload()
    return None if epoch == NOTHING_SAVED else epoch


def set_damaged_aside(folder: pathlib.Path, epochs: Iterable[int]) -> int:
    """Gives damaged checkpoints after the last sound one names that Orbax ignores, and says so; returns its epoch."""
    damages = {}
    for epoch in sorted(epochs, reverse=True):
        if reason := damage(folder / str(epoch)):
            damages[epoch] = reason
            continue
        for later, reason in damages.items():
            names = (f"{later}.damaged-{number}" for number in itertools.count(1))
            name = next(name for name in names if not (folder / name).exists())
            (folder / str(later)).rename(folder / name)
            message = f"{folder / str(later)} is damaged ({reason}): it is now {name}, going on from epoch {epoch}"
            tqdm.tqdm.write(message, file=sys.stderr)
        return epoch
    return ALL_DAMAGED if damages else NOTHING_SAVED


def damage(checkpoint: pathlib.Path) -> str | None:
    """What is wrong with the files of a checkpoint; None if nothing is, or if it was saved without digests."""
    items = [checkpoint / "state", checkpoint / "history"]
    if all(item.is_dir() and not (item / DIGESTS).exists() for item in items):
        return None
    for item in items:
        name = DIGESTS
        try:
            digests = json.loads((item / DIGESTS).read_bytes())
            if not digests or not isinstance(digests, dict):
                return f"{item.name}/{DIGESTS} is not as it was saved"
            for name, expected in digests.items():
                if digest(item / name) != expected:
                    return f"{item.name}/{name} is not as it was saved"
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            return f"{item.name}/{name}: {error.strerror}"
        except ValueError:
            return f"{item.name}/{DIGESTS} is not as it was saved"
    return None


def digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def claim(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a run into its checkpoint folder, or checks that they are the same.

    Raises:
        ValueError: the folder holds checkpoints of a run with other settings.
    """
    settings = json.loads(json.dumps(settings))
    path = folder / "settings.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(settings, indent=1))
        partial.rename(path)
        return
    try:
        saved = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); choose another folder") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path} is damaged (it holds {saved!r}); choose another folder")
    changed = [name for name in settings if saved.get(name) != settings[name]]
    if changed:
        differences = ", ".join(f"{name} {saved.get(name)} → {settings[name]}" for name in changed)
        raise ValueError(
            f"{folder} holds checkpoints of a run with other settings ({differences}); choose another folder, or "
            "delete this one"
        )
