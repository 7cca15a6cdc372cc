"""Words of the studies in plain terms, for pages that are read without the project."""

from __future__ import annotations

import re
from collections.abc import Iterable

# word -> (what makes a text need it, what it means)
TERMS: dict[str, tuple[str, str]] = {
    "base": (
        r"\bbase\b",
        "the trained model that every run starts from.",
    ),
    "run": (
        r"\bruns?\b",
        "one training of the base on the task, from its first step to its last.",
    ),
    "full fine-tuning (FFT)": (
        r"full fine-tuning|\bFFT\b|\bdense\b",
        "training of all weights of the base.",
    ),
    "LoTA": (
        r"\bLoTA\b",
        "Lottery Ticket Adaptation. The base is fine-tuned in full once (the calibration); the entries that "
        "changed most become the mask; then the base is trained anew, and only the mask's entries may "
        "change.",
    ),
    "calibration": (
        r"calibrat",
        "the full fine-tuning that a mask is read off. Its weights are thrown away afterwards.",
    ),
    "entry": (
        r"\bentr(y|ies)\b",
        "one number of a weight matrix.",
    ),
    "mask": (
        r"\bmasks?\b",
        "a choice of entries of the attention and MLP matrices: they train, all others stay exactly the "
        "base's.",
    ),
    "sparsity": (
        r"sparsit",
        "the share of those entries that a mask holds fixed: at 0.9 every tenth entry trains. Beside LoRA: "
        "the sparsity of the mask that has about as many entries as LoRA adds.",
    ),
    "task vector": (
        r"task vector",
        "the difference between the weights after training and those of the base.",
    ),
    "random mask": (
        r"random mask",
        "a mask whose entries are drawn by lot.",
    ),
    "magnitude mask": (
        r"magnitude mask",
        "the mask of the entries that are largest in the base.",
    ),
    "gradient mask": (
        r"gradient mask|from gradients",
        "the mask of the entries whose gradients, summed over batches at the base's weights, are largest. "
        "No weight moves for it.",
    ),
    "SNIP mask": (
        r"\bSNIP\b",
        "the mask of the entries with the largest product of weight and gradient at the base (arXiv "
        "1810.02340).",
    ),
    "LoRA": (
        r"\bLoRA\b",
        "low-rank adaptation (arXiv 2106.09685): the weights stay, and to each matrix the product of two "
        "narrow matrices is added, which train.",
    ),
    "RMSprop, AdamW": (
        r"RMSprop|AdamW",
        "two usual rules by which gradients become steps of training.",
    ),
    "step, batch": (
        r"\bsteps?\b|\bbatch",
        "a step changes the weights once, by the gradient of a batch of rows.",
    ),
    "learning rate (lr)": (
        r"learning rate|\blr\b|\brates?\b",
        "the factor that the size of every step grows with.",
    ),
    "training, validation and test rows": (
        r"validation|test",
        "a row is one question of the task with its answer. Runs train on training rows, choices such as "
        "the learning rate are made on validation rows, numbers are reported on test rows. No row is in two "
        "of them.",
    ),
    "seed": (
        r"\bseeds?\b",
        "the number that fixes all that is drawn by lot, such as the order of the rows. Several seeds show "
        "how much of a difference is chance.",
    ),
    "a ± b": (
        r"±",
        "mean over the seeds, and the standard error of this mean. With three seeds the mean of very many "
        "would lie within 4.3 standard errors 19 times in 20. The rows are the same for all seeds: that "
        "others would give other numbers is not in it.",
    ),
    "nats per token": (
        r"nats per (response )?token",
        "the loss: minus the natural logarithm of the probability that the model gives to each token (piece "
        "of a word) of the right answer, averaged over tokens. Less is better; 0 is certainty.",
    ),
    "nats per byte": (
        r"nats per byte",
        "the same loss, summed over a text and divided by its bytes. It does not depend on how a model cuts "
        "text into tokens.",
    ),
    "own text": (
        r"\bown text\b",
        "text of the kind that the base was trained on, and that no run saw. A loss that grows there is what "
        "the model forgets. Less is better.",
    ),
    "score": (
        r"\bscores?\b|accuracy",
        "how good the answers are that the model writes itself, always taking the likeliest token. More is "
        "better.",
    ),
    "exact match": (
        r"exact match",
        "the share of answers that equal the right one.",
    ),
    "ROUGE-1": (
        r"ROUGE-1",
        "how many words answer and right answer have in common (F measure of precision and recall).",
    ),
    "diverged": (
        r"diverged",
        "training became unstable with one of the seeds, so that there is no number.",
    ),
    "IoU": (
        r"\bIoU\b",
        "intersection over union of two masks: entries in both, over entries in either. 1: the same mask.",
    ),
    "frontier": (
        r"frontier",
        "the settings that no other setting of the method equals or beats in both losses, the task's and "
        "that on own text.",
    ),
    "row, column, block": (
        r"\bblocks?\b",
        "units that a mask may choose instead of single entries: whole rows or columns of a matrix, or "
        "squares of 16 or 64 entries a side.",
    ),
    "step time": (
        r"step time",
        "how long one step of training takes.",
    ),
    "merging": (
        r"\bmerg",
        "making one model of several that were trained from one base, by combining their task vectors.",
    ),
    "sum, task_arithmetic": (
        r"task_arithmetic",
        "merging that adds the task vectors to the base; task_arithmetic multiplies their sum with a factor "
        "first (arXiv 2212.04089).",
    ),
    "magnitude_prune": (
        r"magnitude_prune",
        "merging that adds each task vector's largest entries alone.",
    ),
    "TIES": (
        r"\b(TIES|ties)\b|dare_ties",
        "merging that keeps each task vector's largest entries and, of those, what agrees in sign (arXiv "
        "2306.01708).",
    ),
    "DARE": (
        r"\b(DARE|dare)\b|dare_ties",
        "merging that drops entries of each task vector by lot and scales up the others (arXiv 2311.03099).",
    ),
    "bf16, fp32": (
        r"bf16|fp32",
        "numbers of 16 and of 32 bits; bf16 has about three decimal digits.",
    ),
}


def terms_in(texts: Iterable[str]) -> list[str]:
    """What each term means that the texts use, or the meanings of those that they use."""
    text, found = "\n".join(texts), dict[str, str]()
    while new := {
        word: meaning
        for word, (pattern, meaning) in TERMS.items()
        if word not in found and re.search(pattern, text)
    }:
        found |= new
        text = "\n".join(new.values())
    return [f"{word}: {found[word]}" for word in TERMS if word in found]


# What a task asks of a model
TASKS = {
    "toy_sort": "bring letters into alphabetical order, such as 'q d x b k a' to 'a b d k q x'",
    "toy_shift": "raise every digit by one, 9 becomes 0, such as '3 0 9 4 4' to '4 1 0 5 5'",
    "toy_reverse": "repeat words from the last to the first, such as 'red gold pink' to 'pink gold red'",
    "sql": "write the SQL query that answers a question, given the tables (b-mc2/sql-create-context)",
    "gsm8k": "solve a word problem of grade school step by step (GSM8K, arXiv 2110.14168)",
    "samsum": "summarize a messenger dialogue (SAMSum, arXiv 1911.12237)",
    "boolq": "answer a question with true or false, in a fixed sentence (BoolQ without its passages, arXiv "
    "1905.10044)",
}
METRICS = {"exact_match": "exact match", "rouge1": "ROUGE-1"}
