"""LoTA in TRL's DPOTrainer: python -m examples.trl_dpo [--fused] [--steps N] [--resume]"""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import lota
from examples.common import arguments, load, rows, trainer_settings


def main(argv: Sequence[str] | None = None):
    args = arguments(__doc__, argv)
    model, tokenizer, optimizer = load(args)
    # TRL's default is mixed precision; either will do
    settings = DPOConfig(**trainer_settings(args), bf16=False)
    trainer = DPOTrainer(
        model,
        args=settings,
        train_dataset=Dataset.from_list(rows(200)).rename_column("completion", "chosen"),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=[lota.FusedCallback()],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    return trainer


if __name__ == "__main__":
    main()
