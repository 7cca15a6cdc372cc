"""What the studies share: a base and a task, training runs that are measured and stored once.

A study runs a grid of methods, sparsities, rates and seeds. Each result is a line of <out>/<workload>.jsonl,
written when it is known: the same command after an interruption goes on, and two processes may work on two
workloads of one folder. Rates and all other choices are made on validation rows, which are cut from the
training rows by hash (`validation_fraction`), with a seed that is not reported; only the chosen runs are
measured on test rows. Forgetting is the loss on text of the base's own that it never saw, in nats per byte.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lota.config import Config
from lota.data.batches import encode, seeded_sample
from lota.data.examples import rows_of
from lota.data.prompts import Prompter
from lota.data.task import Row, Task
from lota.evaluate.decoding import Decoding
from lota.evaluate.engine import TransformersEngine
from lota.evaluate.loglik import Request, logliks
from lota.evaluate.scorers import TaskRequest
from lota.evaluate.text_loss import Text, nats_per_byte
from lota.masks import Mask, kept_count
from lota.masks.extract.select import Quota, Rule, select
from lota.models.hashing import remembered_hash
from lota.models.loading import load_tokenizer
from lota.models.pair import open_pair
from lota.models.scope import find_scope, meta_model
from lota.train.lora import lora_targets
from lota.train.saliency_gradients import SaliencySettings, collect, load_saliency_data
from lota.train.trainer import Trainer
from scripts.cells import Cells, Record
from scripts.methods import DENSE, RATES, Method, best_rate
from scripts.workloads import BASES, Workload, short_rows, sizes_key

RATE_SEED = 100  # of the runs that choose learning rates
VALIDATION = 0.1  # share of the training rows
RESULTS = ("validation", "nats", "own", "score")  # losses of splits and of the base's own text, the score
TESTED = ("main", "budget", "curve")  # parts whose runs are measured on test rows
GRADIENTS = ("gradient", "fisher", "snip")  # saliencies that are read off the base's gradients


def nats_per_token(model: Any, requests: Sequence[Request]) -> float:
    """Loss per token of what follows the contexts, in nats."""
    return -sum(logliks(model, requests, batch_size=50)) / sum(len(after) for _, after in requests)


class Study:
    """All runs of one workload."""

    def __init__(
        self,
        out: Path,
        name: str,
        workload: Workload,
        *,
        sparsities: Sequence[float] = (0.9,),
        rates: Sequence[float] = RATES,
    ):
        self.out, self.name, self.workload = out, name, workload
        self.sparsities, self.rates = sparsities, rates  # of masks, which are made together; of searches
        self.folder = BASES[workload.base].folder(out)
        self.task = short_rows(workload)

    @cached_property
    def cells(self) -> Cells:
        return Cells(self.out / f"{self.name}.jsonl")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder)

    @cached_property
    def base_hash(self) -> str:
        return remembered_hash(self.folder)

    @cached_property
    def sizes(self) -> str:
        return sizes_key(self.workload, self.base_hash)

    def find_task(self, name: str) -> Task:
        assert name == self.workload.task, name
        return self.task

    def config(self, method: Method, seed: int, lr: float) -> Config:
        """The settings of a run."""
        workload = self.workload
        n_examples = workload.n_examples * method.passes
        config = Config(
            exp_name="run", datasets=[workload.task], data_dir=workload.data_dir, seed=seed, lr=lr,
            validation_fraction=VALIDATION, n_epochs=None, n_examples=n_examples,
            batch_size=workload.batch_size, lr_scheduler="linear",
            warmup_steps=n_examples // workload.batch_size // 10, max_length=workload.max_length,
            max_prompt_length=workload.max_length - 1, do_first_eval=False, eval_every=10**9,
            local_dirs=[str(self.out / "runs" / self.name)], minimum_log_interval_secs=1e9, debug=True,
            packing=True,
        )  # fmt: skip
        config.model.name_or_path = str(self.folder)
        if method.lora:
            rank = self.rank_for(method.sparsity or 0.0)
            config.adapter.name, config.lora_rank, config.lora_alpha = "lora", rank, 2.0 * rank
        elif method.saliency is not None:
            config.mask_path = str(self.mask(method, seed))
        return replace(config, **method.settings)

    def measured(self, method: Method, seed: int, lr: float, part: str, *, test: bool) -> Record:
        """A run's results, None if it diverged; it is made unless they are there."""
        cell = {"part": part, **method.key, "seed": seed, "lr": lr, "sizes": self.sizes}
        if found := self.cells.get(**cell):
            return found
        same = (self.cells.get(**{**cell, "part": other}) for other in TESTED if test)
        made = next(filter(None, same), None)  # by another study: the same run
        if made is None:
            return self.cells.add(self._trained(self.config(method, seed, lr), test=test)[0], **cell)
        return self.cells.add({key: value for key, value in made.items() if key != "cell"}, **cell)

    def _trained(self, config: Config, *, test: bool) -> tuple[Record, Trainer]:
        start, cpu = time.perf_counter(), time.process_time()
        trainer = BASES[self.workload.base].trainer(config, self.find_task)
        diverged = False
        try:
            trainer.train()
        except ValueError as error:
            if "lower lr" not in str(error):
                raise
            diverged = True
        found: Record = {"base": self.base_hash, "trained": trainer.optimizer.n_trained}
        found["steps"] = trainer.total_steps
        if config.mask_path and test:
            meta = Mask.load(config.mask_path).meta
            found["mask"] = {
                key: value for key, value in meta.items() if key not in ("base", "tuned")
            }  # paths
        found |= dict.fromkeys(RESULTS) if diverged else self.results(trainer, test=test)
        found |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        return found, trainer

    # What a model is worth

    def whole_split(self, split: str) -> list[Row]:
        """Rows that fit; validation rows are no training rows."""
        return rows_of(self.task, split, self.workload.data_dir or "", VALIDATION)

    def rows(self, split: str) -> list[Row]:
        """Validation or test rows, the same sample for every run."""
        n = self.workload.n_test if split == "test" else self.workload.n_validation
        return seeded_sample(self.whole_split(split), n, 0)

    @cached_property
    def own_text(self) -> list[Text]:
        """Documents up to the workload's bytes."""
        chosen, left = [], self.workload.own_bytes
        for before, text in BASES[self.workload.base].own_text():
            size = len(text.encode())
            if size <= left:
                chosen.append((before, text))
                left -= size
        return chosen

    def results(self, trainer: Trainer, *, test: bool) -> Record:
        """Validation loss; with test also test loss and score, and the loss on the base's own text."""
        model, tokenizer = exact(trainer).eval(), trainer.data.tokenizer
        found: Record = {"validation": self.nats(model, tokenizer, self.rows("validation"))}
        if test:
            found |= {
                "nats": self.nats(model, tokenizer, self.rows("test")),
                "own": self.own(model, tokenizer),
            }
            found |= {"score": self.score(model, tokenizer)} if self.workload.n_scored else {}
        return found

    def own(self, model: Any, tokenizer: Any) -> float:
        """Loss on the base's own text, in nats per byte."""
        return nats_per_byte(model, tokenizer, self.own_text).value

    def nats(self, model: Any, tokenizer: Any, rows: Iterable[Row]) -> float:
        """Loss per response token, in nats."""
        return nats_per_token(model, self.requests(tokenizer, rows))

    def requests(self, tokenizer: Any, rows: Iterable[Row]) -> list[Request]:
        """Token ids of prompts and responses, as a run sees them."""
        requests, prompter = [], Prompter(tokenizer)
        limits = {"max_length": self.workload.max_length, "max_prompt_length": self.workload.max_length - 1}
        for row in rows:
            coded = encode(tokenizer, prompter.example(self.task, row), **limits)
            requests.append((coded.input_ids[: coded.prompt_length], coded.input_ids[coded.prompt_length :]))
        return requests

    def score(self, model: Any, tokenizer: Any) -> float:
        """The task's metric over completions of the first test rows."""
        task, rows = self.task, self.rows("test")[: self.workload.n_scored]
        decoding = Decoding(self.workload.new_tokens or task.max_new_tokens, stop=task.stop)
        request = TaskRequest(task, rows, decoding)
        engine = TransformersEngine(model, tokenizer, batch_size=100)
        scorer = request.scorer(engine, Prompter(tokenizer), request)
        scorer.prepare()
        found: dict[int, Row] = {}
        scorer.run(list(request.numbers), 0, found.__setitem__)
        return next(iter(scorer.estimates(task, [found]).values())).value

    def base(self) -> Record:
        """The base itself: a run whose rate is 0."""
        cell = {"part": "base", "sizes": self.sizes}
        config = replace(self.config(DENSE, 0, 0.0), n_examples=1, batch_size=1, warmup_steps=0)
        return self.cells.get(**cell) or self.cells.add(
            self._trained(config, test=True)[0] | self.counts(), **cell
        )

    def counts(self) -> Record:
        """How many rows and bytes there really are."""
        rows = {"train": len(self.whole_split("train"))}
        rows |= {split: len(self.rows(split)) for split in ("validation", "test")}
        texts = [text for _, text in self.own_text]
        size = sum(len(text.encode()) for text in texts)
        return {"rows": rows, "own_text": {"documents": len(texts), "bytes": size}}

    # Learning rates

    def rate(self, method: Method, start: float | None = None) -> float:
        """The rate with the least validation loss; its neighbours are worse, unless the grid ends."""

        def loss(lr: float) -> float:
            found = self.measured(method, RATE_SEED, lr, "rate", test=False)["validation"]
            return float("inf") if found is None else found

        return best_rate(self.rates, start or method.start, loss)

    # Masks

    def calibration(self, seed: int, steps: int | None = None) -> Path:
        """A dense run at the best rate of a whole one: the folder of its checkpoint."""
        steps = steps or self.workload.steps

        def config() -> Config:
            whole = self.config(DENSE, seed, self.rate(DENSE))
            return replace(whole, n_examples=steps * whole.batch_size, warmup_steps=steps // 10)

        return self.kept(f"dense-{steps}-{seed}", config, part="calibration", steps=steps, seed=seed)

    def kept(self, name: str, config: Callable[[], Config], **cell: Any) -> Path:
        """A run whose checkpoint stays: its folder. config: makes its settings; cell: what it is."""
        cell["sizes"] = self.sizes
        found = self.cells.get(**cell)
        if found is None or not (self.out / found["folder"]).is_dir():
            named = replace(config(), exp_name=f"{name}-{self.sizes}", debug=False, overwrite=True)
            result, trainer = self._trained(named, test=False)
            if trainer.saved is None:
                sys.exit(f"{self.name}: the run {name} diverged at the rate that was best with another seed")
            found = self.cells.add({**result, "folder": str(trainer.saved[1].relative_to(self.out))}, **cell)
        return self.out / str(found["folder"])

    def mask(self, method: Method, seed: int) -> Path:
        """The mask of a method and seed; those of all sparsities are made together."""
        assert method.saliency is not None and method.sparsity is not None
        name = re.sub(r"\W+", "_", method.name)
        path = self.out / "masks" / self.name / self.sizes / str(seed) / name / f"{method.sparsity}_mask.pt"
        if not path.is_file():
            tuned = self.calibration(seed, method.budget) if method.saliency == "task_vector" else None
            needs = ("base",) if tuned is None else ("base", "tuned")
            pair = open_pair(self.folder, tuned, needs=needs)
            kind = {"granularity": method.granularity, "block": method.block, **method.rule}
            rule = Rule(method.saliency, seed=seed, **kind)
            quota = Quota(pair, sorted({*self.sparsities, method.sparsity}), rule)
            collected = self._gradients(method, seed) if method.saliency in GRADIENTS else None
            for sparsity, mask in select(quota, collected=collected).items():
                mask.meta |= self.about(replace(method, sparsity=sparsity), seed, mask)
                mask.save(path.with_name(f"{sparsity}_mask.pt"))
        return path

    def about(self, method: Method, seed: int, mask: Mask) -> Record:
        """What a study wants to know of a new mask: goes into its file, and into results under "mask"."""
        return {}

    def _gradients(self, method: Method, seed: int) -> Any:
        """Of the batches that a calibration sees, summed at the base's weights."""
        workload = self.workload
        settings = SaliencySettings(
            datasets=workload.task, score_batches=method.budget or workload.steps,
            batch_size=workload.batch_size, data_dir=workload.data_dir,
            validation_fraction=VALIDATION, max_length=workload.max_length,
            max_prompt_length=workload.max_length - 1, seed=seed,
        )  # fmt: skip
        data = load_saliency_data(settings, self.find_task, self.folder, str(self.folder))
        names = list(find_scope(meta_model(self.folder)))
        return collect(data, names, "squares" if method.saliency == "fisher" else "sum")

    def rank_for(self, sparsity: float) -> int:
        """LoRA's rank with about as many entries as a mask of that sparsity keeps, at least 1."""
        model = meta_model(self.folder)
        shapes = [model.get_submodule(path).get_parameter("weight").shape for path in lora_targets(model)[0]]
        total = sum(tensor.numel for tensor in find_scope(model).values())
        return max(1, round(kept_count(sparsity, total) / sum(sum(shape) for shape in shapes)))


@torch.no_grad()
def exact(trainer: Trainer) -> PreTrainedModel:
    """The trained model in fp32, with the exact values of what a narrower working copy has rounded."""
    values = list(trainer.optimizer.kept_values())
    parameters = dict(trainer.model.float().named_parameters())
    for name, positions, kept in values:
        whole = parameters[name].view(-1)
        whole.copy_(kept.view(-1)) if positions is None else whole.index_copy_(0, positions.long(), kept)
    return trainer.model
