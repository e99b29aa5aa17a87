"""Trains nano from nothing and writes checkpoints/nano: `make nano`.

Knows the loop; data, loss and update are modules of their own. A killed run goes on from its last
save, and a finished one is the same bits for the same seed, machine and settings.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from checkpoints.nano_training.curve import draw_curve
from checkpoints.nano_training.draft import Draft
from checkpoints.nano_training.export import export, weights_of
from checkpoints.nano_training.grouped import GroupedExperts
from checkpoints.nano_training.objective import Batch, Measures, objective
from checkpoints.nano_training.optimizer import Weights, balance, make_optimizer
from checkpoints.nano_training.packing import Rows, pack
from checkpoints.nano_training.rendering import NANO_DIRECTORY
from checkpoints.nano_training.samples import make_samples
from checkpoints.nano_training.saves import restore, save
from checkpoints.nano_training.start import first_weights, head_of
from glm_jax.config import ModelConfig
from glm_jax.model import Glm4Moe
from glm_jax.sharding import make_mesh

# Two rooms for conversations: attention costs a row the square of its length, and most are short.
SHORT_ROW, LONG_ROW = 128, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that decides the trained weights; the defaults are nano's.

    Attributes:
      num_conversations: generated; a pass over them is an epoch of each pool.
      short_rows, long_rows: of 128 and of 512 tokens in one step.
      prompt_weight: what the loss of a token that is read, not said, counts for.
      balance_rate: how far a router's correction biases move in a step, at most.
      rising_steps, falling_steps: see rate_share.
      capacity_factor: see GroupedExperts.
    """

    seed: int = 0
    num_steps: int = 2000
    num_conversations: int = 44_000
    short_rows: int = 6
    long_rows: int = 3
    prompt_weight: float = 0.15
    muon_rate: float = 0.01
    adam_rate: float = 0.008
    weight_decay: float = 0.02
    balance_rate: float = 0.02
    capacity_factor: float = 1.5
    rising_steps: int = 60
    falling_steps: int = 500
    save_every: int = 50

    def rate_share(self, step: Any) -> jax.Array:
        """How much of their peaks the rates are at a step: up, level, then down to nothing.

        Until it begins to fall a run is the same whatever its length.
        """
        rising = (step + 1) / self.rising_steps
        falling = (self.num_steps - step) / self.falling_steps
        return jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)


class Pools(NamedTuple):
    """The training data, as rows.

    Attributes:
      short, long: conversations, in rows of 128 and of 512 tokens.
    """

    short: Rows
    long: Rows


class State:
    """What a step changes and a save holds.

    Attributes:
      weights: the decoder's under "decoder.", the draft's under "draft.".
      optimizer: the optimizer's own state.
      step: steps done.
      history: one row per step, the scalar fields of Measures.
    """

    def __init__(self, weights: Weights, optimizer: Any) -> None:
        self.weights = weights
        self.optimizer = optimizer
        self.step = 0
        self.history: list[list[float]] = []


class Trainer:
    """The model, its optimizer, and the compiled step."""

    def __init__(self, config: ModelConfig, settings: Settings) -> None:
        self.settings = settings
        dtype, rngs = jnp.dtype(jnp.float32), nnx.Rngs(settings.seed)
        decoder = Glm4Moe(replace(config, is_fp8=False), dtype, rngs=rngs)
        draft = Draft(replace(config, is_fp8=False), dtype, rngs=rngs)
        for layers in (decoder.layers, draft.layers):
            layers.moe.experts = GroupedExperts(layers.moe.experts, settings.capacity_factor)
        self._decoder, self._draft = nnx.eval_shape(lambda: (decoder, draft))
        self._optimizer = make_optimizer(
            settings.rate_share,
            muon_rate=settings.muon_rate,
            adam_rate=settings.adam_rate,
            weight_decay=settings.weight_decay,
        )
        weights = first_weights(
            config,
            _prefixed("decoder.", weights_of(decoder)) | _prefixed("draft.", weights_of(draft)),
        )
        # The model's sums over devices need a mesh, also when it is of one device.
        self._mesh = make_mesh(1)
        self.state = self.state_from(weights)
        self._update = jax.jit(self._make_update(), donate_argnums=(0, 1))

    def state_from(self, weights: Weights) -> State:
        """The state of a run that starts at these weights; the arrays stay the caller's."""
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        weights, optimizer = jax.device_put(
            (weights, self._optimizer.init(weights)), everywhere, may_alias=False
        )
        return State(weights, optimizer)

    def step(self, batches: tuple[Batch, ...]) -> Measures:
        """One update of the state."""
        state = self.state
        balance_rate = self.settings.balance_rate * self.settings.rate_share(state.step)
        state.weights, state.optimizer, measures = self._update(
            state.weights,
            state.optimizer,
            batches,
            balance_rate,
        )
        state.step += 1
        measures = jax.device_get(measures)
        state.history.append([float(value) for value in measures[:-1]])
        return measures

    def measure(self, weights: Weights, batch: Batch) -> tuple[jax.Array, Measures]:
        """The objective of one batch, as a function of the weights."""
        decoder = _bound(self._decoder, decoder_of(weights))
        draft = _bound(self._draft, draft_of(weights))
        return objective(decoder, draft, batch, self.settings.prompt_weight)

    def _make_update(self) -> Any:
        @partial(
            jax.shard_map,
            mesh=self._mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        def gradients(weights: Weights, batches: tuple[Batch, ...]) -> tuple[Weights, Measures]:
            found = [jax.grad(self.measure, has_aux=True)(weights, batch) for batch in batches]
            return jax.tree.map(lambda *each: sum(each) / len(each), *found)

        def update(
            weights: Weights, optimizer: Any, batches: tuple[Batch, ...], balance_rate: jax.Array
        ) -> tuple[Weights, Any, Measures]:
            gradient, measures = gradients(weights, batches)
            updates, optimizer = self._optimizer.update(gradient, optimizer, weights)
            weights = jax.tree.map(jnp.add, weights, updates)
            weights = balance(weights, measures.expert_load, balance_rate)
            return weights, optimizer, measures

        return update


def main() -> None:
    """Reads the command line, trains, writes weights and curve."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--directory", type=Path, default=NANO_DIRECTORY, help="has a config.json")
    parser.add_argument("--saves", type=Path, default=Path("build/nano"), help="to go on from")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--num-steps", type=int, default=defaults.num_steps)
    parser.add_argument("--num-conversations", type=int, default=defaults.num_conversations)
    options = parser.parse_args()
    settings = Settings(
        seed=options.seed,
        num_steps=options.num_steps,
        num_conversations=options.num_conversations,
    )
    trainer = Trainer(ModelConfig.from_directory(options.directory), settings)
    restore(options.saves, asdict(settings), trainer.state)
    train(trainer, make_pools(options.directory, settings), options.saves)
    weights = trainer.state.weights
    export(options.directory, decoder_of(weights), draft_of(weights))
    history = np.array(trainer.state.history)
    curve = draw_curve({"loss": history[:, 0], "draft loss": history[:, 2]})
    (options.directory / "loss.svg").write_text(curve, encoding="utf-8")


def train(trainer: Trainer, pools: Pools, saves: Path) -> None:
    """Takes the steps that are left, with a bar and regular saves."""
    settings, state = trainer.settings, trainer.state
    steps = tqdm(range(state.step, settings.num_steps), initial=state.step,
                 total=settings.num_steps, unit="step")  # fmt: skip
    for step in steps:
        measures = trainer.step(batches_of_step(pools, step, settings))
        steps.set_postfix(
            loss=f"{measures.loss:.3f}",
            right=f"{measures.accuracy:.3f}",
            draft=f"{measures.draft_accuracy:.3f}",
        )
        if state.step % settings.save_every == 0:
            save(saves, asdict(settings), state)


def make_pools(directory: Path, settings: Settings) -> Pools:
    """The training data."""
    count = settings.num_conversations
    samples = list(tqdm(make_samples(directory, settings.seed, count), total=count, desc="data"))
    short = [sample for sample in samples if len(sample.tokens) <= SHORT_ROW]
    long = [sample for sample in samples if len(sample.tokens) > SHORT_ROW]
    return Pools(pack(short, SHORT_ROW), pack(long, LONG_ROW))


def batches_of_step(pools: Pools, step: int, settings: Settings) -> tuple[Batch, Batch]:
    """The short and the long rows of a step; as many of each in every step."""
    seed = settings.seed
    return (
        rows_of_step(pools.short, settings.short_rows, step, seed),
        rows_of_step(pools.long, settings.long_rows, step, seed),
    )


def rows_of_step(pool: Rows, size: int, step: int, seed: int) -> Batch:
    """The pool's rows in an order that changes every epoch, cut into steps."""
    steps_per_epoch = len(pool) // size
    epoch, place = divmod(step, steps_per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(len(pool))
    chosen = pool.take(order[place * size : (place + 1) * size])
    return Batch(chosen.tokens, chosen.segments, chosen.positions, chosen.learned)  # pyright: ignore[reportArgumentType]


def decoder_of(weights: Weights) -> Weights:
    """The decoder's weights, its head included."""
    decoder = _under("decoder.", weights)
    return decoder | {"lm_head.values": head_of(decoder["embed_tokens.values"])}


def draft_of(weights: Weights) -> Weights:
    """The MTP layer's weights."""
    return _under("draft.", weights)


def _prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + path: weight for path, weight in weights.items()}


def _under(prefix: str, weights: Weights) -> Weights:
    return {
        path.removeprefix(prefix): weight
        for path, weight in weights.items()
        if path.startswith(prefix)
    }


def _bound[M: nnx.Module](module: M, weights: Weights) -> M:
    """The module holding these weights."""
    graphdef, state = nnx.split(module, nnx.Param)
    flat = nnx.to_flat_state(state)
    filled = [(path, param.replace(weights[".".join(map(str, path))])) for path, param in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


if __name__ == "__main__":
    main()
