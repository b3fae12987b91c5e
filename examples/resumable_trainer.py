"""A trainer that survives being killed: checkpoints, progress, and the same result after a restart.

python examples/resumable_trainer.py --out runs/mine            # press Ctrl-C, or kill -9
python examples/resumable_trainer.py --out runs/mine --resume   # goes on at the last finished step
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dp_flash_attention import ExecutionConfig, PrivacyPlan, PrivateTrainer, StepReport
from dp_flash_attention.training.data.texts import ByteTokenizer, TextDataset, Texts
from dp_flash_attention.training.losses import language_model_loss
from dp_flash_attention.training.models import TextTransformer, TextTransformerConfig


def losses(model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
    """Mean next-token loss of each text, over that text's own tokens."""
    return language_model_loss(model(rows["input_ids"]), rows["labels"])


def show(report: StepReport) -> None:
    """Prints what is public about a step."""
    print(f"step {report.step}/{report.num_steps}  ε {report.epsilon_spent:.3f}  {report.eta_s:.0f} s left")


def main() -> None:
    """Trains a language model of bytes on this repository's own documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()

    pages = Path(__file__).resolve().parents[1].joinpath("docs").glob("*.md")
    lines = [line for page in sorted(pages) for line in page.read_text(encoding="utf-8").splitlines() if line]
    dataset = TextDataset(Texts(texts=lines), ByteTokenizer(), max_length=64)
    torch.manual_seed(0)  # initial weights only, and they are public
    model = TextTransformer(
        TextTransformerConfig(vocab_size=259, seq_len=64, d_model=64, num_heads=4, num_layers=2)
    )
    trainer = PrivateTrainer(
        model,
        plan=PrivacyPlan.for_budget(
            epsilon=8.0,
            delta=1e-3,
            expected_batch_size=32,
            sampling_prob=0.1,
            num_steps=options.steps,
            l2_clip_norm=1.0,
        ),
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        loss_fn=losses,
        out_dir=options.out,
        execution=ExecutionConfig(microbatch_size=16),
        on_step=show,
    )
    result = trainer.fit(dataset, resume=options.resume)
    print(f"({result.plan.epsilon:g}, {result.plan.delta:g})-DP model in {result.model_path}")


if __name__ == "__main__":
    main()
