"""Saves of a training run: written whole or not at all, and refused by a run with other settings.

Knows pytrees, not what they train.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

_NAME = "state.npz"


class Resumable(Protocol):
    """What a save holds; see train.State."""

    weights: Any
    optimizer: Any
    step: int
    history: list[list[float]]


def save(directory: Path, settings: dict[str, Any], state: Resumable) -> None:
    """Writes the state under one name, over the one that is there."""
    directory.mkdir(parents=True, exist_ok=True)
    leaves = jax.tree.leaves((state.weights, state.optimizer))
    partial = directory / f".{_NAME}.partial"
    with partial.open("wb") as file:
        np.savez(
            file,
            allow_pickle=False,
            settings=np.array(json.dumps(settings)),
            history=np.array(state.history),
            **{f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)},
        )
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / _NAME)


def restore(directory: Path, settings: dict[str, Any], state: Resumable) -> None:
    """Fills the state from the directory's save; leaves it as it is when there is none.

    Raises:
      ValueError: the save is of a run with other settings.
    """
    path = directory / _NAME
    if not path.exists():
        return
    with np.load(path, allow_pickle=False) as saved:
        other = json.loads(str(saved["settings"]))
        if other != settings:
            changed = {key for key in settings if settings[key] != other.get(key)}
            raise ValueError(
                f"{path} is of a run with other {', '.join(sorted(changed)) or 'settings'}: "
                "remove it, or train with its settings"
            )
        structure = jax.tree.structure((state.weights, state.optimizer))
        leaves = [jnp.asarray(saved[f"leaf{i}"]) for i in range(structure.num_leaves)]
        state.weights, state.optimizer = jax.tree.unflatten(structure, leaves)
        state.history = saved["history"].tolist()
        state.step = len(state.history)
