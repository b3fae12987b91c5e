"""Which topics do customers' messages like this one belong to? Private retrieval over text rows.

Every customer owns up to three messages. Keys are hashed character trigrams, a public encoder; values say the topic. An
answer is the mix of topics among the messages most like a question, for everything a customer wrote together: nobody
can tell from it whether a customer's messages are in the table at all (add-or-remove-one; the null rows stand in for
the number of messages, which is private too).

    python examples/private_retrieval.py
"""

from __future__ import annotations

import argparse
import random
import zlib

import torch
from torch import Tensor

from dp_flash_attention import dp_flash_attention
from dp_flash_attention.attention import AttentionBounds, CallNoise
from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget

WIDTH, SHARPNESS, MESSAGES_EACH, NULL_ROWS = 128, 4.0, 3, 20_000.0
BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-6)

TOPICS = {
    "delivery": [
        "my parcel has not arrived",
        "the courier left the box at the wrong door",
        "when will it be shipped",
    ],
    "refund": ["i want my money back", "the refund is still missing", "you charged my card twice"],
    "login": ["i forgot my password", "the sign in page rejects my code", "my account is locked"],
    "quality": ["the screen is cracked", "it stopped working after a day", "the colour is not as shown"],
}
OPENINGS = ["hello,", "hi there,", "good morning,", "please help:", ""]
ENDINGS = ["thank you", "this is urgent", "for the second time now", "what can i do?", ""]
QUESTIONS = [
    "where is my parcel",
    "i was charged twice and want a refund",
    "password code does not work",
    "broken screen",
]


def messages(num_customers: int) -> list[tuple[int, str, str]]:
    """Made-up messages: (customer, topic, text)."""
    draw = random.Random(0)
    found = []
    for customer in range(num_customers):
        for _ in range(draw.randint(1, MESSAGES_EACH)):
            topic = draw.choice(list(TOPICS))
            parts = (draw.choice(OPENINGS), draw.choice(TOPICS[topic]), draw.choice(ENDINGS))
            found.append((customer, topic, " ".join(part for part in parts if part)))
    return found


def encode(texts: list[str]) -> Tensor:
    """Unit vectors [N, WIDTH] of hashed, signed character trigrams: nothing in it was learned from the messages."""
    vectors = torch.zeros(len(texts), WIDTH)
    for row, text in enumerate(texts):
        padded = f" {text} "
        for i in range(len(padded) - 2):
            digest = zlib.crc32(padded[i : i + 3].encode())
            vectors[row, digest % WIDTH] += 1.0 if digest & 0x80000000 else -1.0
    return torch.nn.functional.normalize(vectors, dim=1)


def main() -> None:
    """Asks all questions in one private call and shows the answers beside the exact ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--customers", type=int, default=20_000)
    options = parser.parse_args()

    table = messages(options.customers)
    key = encode([text for _, _, text in table])[None, None]
    names = list(TOPICS)
    topics = torch.tensor([names.index(topic) for _, topic, _ in table])
    value = torch.nn.functional.one_hot(topics, len(names)).to(torch.float32)[None, None]
    owners = torch.tensor([customer for customer, _, _ in table])
    query = encode(QUESTIONS)[None, None]

    bounds = AttentionBounds(
        query_norm=1.0,
        key_norm=1.0,
        value_norm=1.0,
        max_rows_per_record=MESSAGES_EACH,
        null_rows=NULL_ROWS,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
    output, release = dp_flash_attention(
        query,
        key,
        value,
        bounds=bounds,
        noise=CallNoise.from_os(),
        budget=BUDGET,
        scale=SHARPNESS,
        record_ids=owners,
    )

    weights = torch.exp(SHARPNESS * query[0, 0] @ key[0, 0].T)
    exact = weights @ value[0, 0] / (weights.sum(dim=1, keepdim=True) + NULL_ROWS)
    for question, private, true in zip(QUESTIONS, output[0, 0], exact, strict=True):
        print(f"\n{question}")
        for name, noisy, right in zip(names, private.tolist(), true.tolist(), strict=True):
            print(f"  {name:9s} {noisy:+.3f}   (exactly {right:.3f})")
    error = float((output[0, 0] - exact).abs().mean())
    print(f"\n{len(table)} messages; typical error {error:.4f}; {len(QUESTIONS)} answers together are")
    print(
        f"({release.epsilon(BUDGET.delta):.4g}, {BUDGET.delta:g})-DP for all that a customer wrote, add-or-remove-one"
    )


if __name__ == "__main__":
    main()
