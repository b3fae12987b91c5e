"""Your own training loop, made private: any model, any optimizer, three calls.

The loop predicts late arrivals from the flights of 2013 (pip install 'dp-flash-attention[demo]').

    python examples/own_training_loop.py
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dp_flash_attention import PrivacyPlan, make_private
from dp_flash_attention.training.data.flights import load_flights


class Classifier(nn.Module):
    """A small network over the mean of a record's field embeddings: nothing in it knows about privacy."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 32)
        self.layers = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 2))

    def forward(self, ids: Tensor, mix: Tensor) -> Tensor:
        """Returns logits [B, 2] of ids [B, F, 2] with weights [B, F, 2]."""
        fields = (self.embedding(ids) * mix.unsqueeze(-1)).sum(dim=2)
        logits: Tensor = self.layers(fields.sum(dim=1))
        return logits


def losses(model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
    """One loss for each record: ``reduction="none"`` is what makes clipping possible."""
    return cross_entropy(model(rows["ids"], rows["mix"]), rows["label"], reduction="none")


def main() -> None:
    """Trains with ε = 1 and prints how far the model got."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8192)
    options = parser.parse_args()

    flights = load_flights()
    model = Classifier(flights.schema.vocab_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    plan = PrivacyPlan.for_budget(
        epsilon=1.0,
        delta=1e-6,
        expected_batch_size=options.batch,
        dataset_size=327_346,  # published with the data; without a public number, pass sampling_prob
        num_steps=options.steps,
        l2_clip_norm=1.0,
    )
    session = make_private(model, optimizer, plan)
    for step in session.steps(flights, microbatch_size=1024):
        for microbatch in step:
            session.accumulate(microbatch, losses)
        session.apply(step)
    print(session.guarantee.theorem)
    print(f"noise multiplier {plan.noise_multiplier:.3f}, ε spent {session.epsilon_spent:.4f}")

    # The flights are public, so an exact figure may be shown. For private records use dpfa train.
    rows = flights.take(torch.arange(0, len(flights), 10))
    with torch.no_grad():
        right = model(rows["ids"], rows["mix"]).argmax(1) == rows["label"]
    print(f"accuracy {right.double().mean():.3f}")


if __name__ == "__main__":
    main()
