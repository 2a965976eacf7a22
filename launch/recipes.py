"""Recipes: named sets of values. A flag beats the recipe, the recipe beats the default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from launch.config import (
    BackboneConfig,
    DataConfig,
    LossConfig,
    OptimConfig,
    RecipeName,
    TrainConfig,
    WatchConfig,
    flag_values,
)
from nsi.errors import UsageError
from nsi.model import ModelConfig

# What the public NSI code does otherwise than the defaults, each by the one flag that brings it back; all the rest are
# the public defaults already. `launch/README.md` sets them side by side.
_REFERENCE = {
    "data": DataConfig(squash_size=128),
    "backbone": BackboneConfig(normalization="none"),
    "model": ModelConfig(attend_padding=True, schema_dropout=0.0, position_std=1.0),
    "loss": LossConfig(reconstruction="sum"),
    "optim": OptimConfig(schedule="plateau", plateau_in_warmup=True, clip_scope="slot_encoder", weight_decay=0.0),
    "watch": WatchConfig(select_by="loss"),
}

# Small enough for two CPU cores and minutes: 64 patches, narrow layers, no schema transformer. What it shows is the
# whole road, and that held-out scenes are recognised far above chance.
_DEMO = {
    "data": DataConfig(image_size=64),
    "backbone": BackboneConfig(backbone="dct"),
    "model": ModelConfig(
        num_slots=11,
        num_iterations=2,
        slot_dim=64,
        mlp_hidden_size=128,
        embed_dim=64,
        num_blocks=0,
        d_model=64,
        num_heads=4,
        dropout=0.0,
        decoder_hidden_dim=128,
        decoder_depth=1,
    ),
    "loss": LossConfig(tau=0.5, score="mean"),
    "optim": OptimConfig(batch_size=64, lr=3e-3, lr_warmup_steps=50, max_steps=1200),
    "watch": WatchConfig(checkpoint_every=300, validate_every=300),
}


_RECIPES = {"default": {}, "reference": _REFERENCE, "demo": _DEMO}


def recipe_defaults(recipe: RecipeName, config: TrainConfig) -> TrainConfig:
    """`config` with the recipe's values in place of the defaults."""
    return replace(config, recipe=recipe, **_RECIPES[recipe])


def starting_point(arguments: Sequence[str]) -> TrainConfig:
    """What `nsi train` starts from before flags are read: the defaults, changed by the recipe that is asked for.

    Raises UserError for an unknown recipe.
    """
    name = "default"
    for place, argument in enumerate(arguments):
        flag, given, value = argument.partition("=")
        if flag == "--recipe":
            name = value if given else next(iter(arguments[place + 1 :]), "")
    if name not in get_args(RecipeName):
        raise UsageError(f"--recipe {name}: unknown; there are {', '.join(get_args(RecipeName))}")
    return recipe_defaults(name, TrainConfig("", Path()))  # type: ignore[arg-type]


def describe(recipe: RecipeName) -> str:
    """The flags that a recipe sets, each beside its default: the help shows it."""
    plain = flag_values(TrainConfig("", Path()))
    changed = {
        name: value
        for name, value in flag_values(recipe_defaults(recipe, TrainConfig("", Path()))).items()
        if value != plain[name] and name != "recipe"
    }
    if not changed:
        return f"The recipe {recipe!r} keeps every default."
    listed = ", ".join(f"--{name} {value} (default {plain[name]})" for name, value in changed.items())
    return f"The recipe {recipe!r} sets {listed}."
