"""What was the outcome for flights like this one? Private answers over a large table, one question or a thousand.

Every flight of 2013 is a record: its key is what was known at departure, encoded by public random features, its value
whether it arrived late. A question is a flight, too, and the answer the share of late arrivals among the flights like
it: one attention call, with noise. One budget pays for all questions of a call, and a filter for all calls.

    python examples/private_lookup.py            # all flights, about a minute (pip install 'dp-flash-attention[demo]')
    python examples/private_lookup.py --rows 20000
    python examples/private_lookup.py --noise exact   # whole numbers on a grid: no float's rounding to leak through
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from dp_flash_attention import dp_flash_attention, plan_attention_release
from dp_flash_attention.accounting import GaussianFilter
from dp_flash_attention.attention import AttentionBounds, CallNoise
from dp_flash_attention.core.errors import BudgetExhaustedError
from dp_flash_attention.core.privacy import PrivacyBudget
from dp_flash_attention.training.data.flights import load_flights
from dp_flash_attention.training.data.tabular import TabularDataset

WIDTH, SHARPNESS, DELTA, QUESTIONS = 64, 2.0, 1e-6, 1000


def encode(flights: TabularDataset, rows: Tensor) -> Tensor:
    """Unit vectors [N, WIDTH]: a public random vector for every field's value, most of all the delay at departure."""
    table = torch.randn(flights.schema.vocab_size, WIDTH, generator=torch.Generator().manual_seed(1))
    encoded = []
    for part in rows.split(1 << 14):
        taken = flights.take(part)
        fields = (table[taken["ids"]] * taken["mix"].unsqueeze(-1)).sum(dim=2)  # [N, fields, WIDTH]
        fields[:, 0] *= 16.0  # the schema's first field
        encoded.append(torch.nn.functional.normalize(fields.sum(dim=1), dim=1))
    return torch.cat(encoded)


def main() -> None:
    """Answers one question and a thousand at several ε, and shows how far the answers are from the exact ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=None, help="use so many flights only")
    parser.add_argument("--noise", choices=("secure", "exact"), default="secure", help="kind of noise")
    options = parser.parse_args()

    flights = load_flights()
    order = torch.randperm(len(flights), generator=torch.Generator().manual_seed(0))  # a public order
    context, asked = order[QUESTIONS:][: options.rows], order[:QUESTIONS]
    key = encode(flights, context)[None, None]
    value = (
        flights.labels[context].to(torch.float32).mul(2.0).sub(1.0)[None, None, :, None]
    )  # late +1, on time −1
    query = encode(flights, asked)[None, None]

    # Number of flights: published with the table. Replace-one: a flight's row may change, not whether there is one.
    bounds = AttentionBounds(query_norm=1.0, key_norm=1.0, value_norm=1.0, num_rows=len(context))
    noise = CallNoise.from_os(name=options.noise)

    def shares(questions: Tensor, budget: PrivacyBudget) -> Tensor:
        """Shares of late arrivals, [number of questions]."""
        output, release = dp_flash_attention(
            questions, key, value, bounds=bounds, noise=noise, budget=budget, scale=SHARPNESS
        )
        assert release.epsilon(DELTA) <= budget.epsilon
        return (output[0, 0, :, 0] + 1.0) / 2.0

    # The flights are public, so the exact answers may be shown beside the private ones.
    scores = torch.nn.functional.scaled_dot_product_attention(
        query, key, value.expand(-1, -1, -1, WIDTH), scale=SHARPNESS
    )
    exact = (scores[0, 0, :, 0] + 1.0) / 2.0
    late = flights.labels[asked].double()
    print(f"{len(context)} flights, {float(late.mean()):.1%} of the {QUESTIONS} questioned ones were late")
    for name, rows in (("late", late == 1), ("on time", late == 0)):
        print(f"flights like those that were {name}: exactly {float(exact[rows].mean()):.1%} late")

    print("\n  ε      questions  typical error  signal/noise planned")
    for epsilon in (0.1, 1.0, 8.0):
        budget = PrivacyBudget(epsilon=epsilon, delta=DELTA)
        for count in (1, QUESTIONS):
            plan = plan_attention_release(
                bounds, num_queries=count, query_width=WIDTH, value_width=1, scale=SHARPNESS, budget=budget,
                noise=noise.name,
            )  # fmt: skip
            asked_now = query[:, :, :count]
            repeats = (
                25 if count == 1 else 1
            )  # one answer says little about the error: the figure needs several
            errors = [(shares(asked_now, budget) - exact[:count]).abs().mean() for _ in range(repeats)]
            error = float(torch.stack(errors).mean())
            ratio = float(plan.signal_to_noise().min())
            print(f"{epsilon:5g}  {count:10d}  {error:12.4f}  {ratio:20.1f}")

    # A service answers one question at a time until the budget over all of them is used up.
    total = PrivacyBudget(epsilon=1.0, delta=DELTA)
    gate = GaussianFilter(total, finite_precision_share=0.01 if options.noise == "exact" else 0.0)
    each, answered = gate.share(10), 0
    try:
        for number in range(QUESTIONS):
            dp_flash_attention(
                query[:, :, number : number + 1], key, value,
                bounds=bounds, noise=noise, mu=each, privacy_filter=gate, scale=SHARPNESS,
            )  # fmt: skip
            answered += 1
    except BudgetExhaustedError as refusal:
        print(f"\n{answered} single questions answered, then: {refusal}")
    print(
        f"every table row: ({gate.epsilon_spent:.4g}, {total.delta:g})-DP, replace-one, over the {answered} answers"
    )


if __name__ == "__main__":
    main()
