"""LoTA in Hugging Face's Trainer: python -m examples.hf_trainer [--fused] [--steps N] [--resume]"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import lota
from examples.common import arguments, load, rows, trainer_settings


def encode(tokenizer, row):
    """Token ids and labels; the prompt's labels are -100."""
    prompt = tokenizer(row["prompt"]).input_ids
    answer = tokenizer(row["completion"] + tokenizer.eos_token, add_special_tokens=False).input_ids
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def main(argv: Sequence[str] | None = None):
    args = arguments(__doc__, argv)
    model, tokenizer, optimizer = load(args)
    trainer = Trainer(
        model,
        args=TrainingArguments(**trainer_settings(args)),
        train_dataset=[encode(tokenizer, row) for row in rows(200)],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        optimizers=(optimizer, None),
        callbacks=[lota.FusedCallback()],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    return trainer


if __name__ == "__main__":
    main()
