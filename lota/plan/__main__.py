"""Plan a run before anything is loaded: the memory that it needs and when, its files, what it sends.

    python -m lota.plan model=llama31_8b sparsity=0.99 model.fsdp_policy_mp=bfloat16
    python -m lota.plan model=qwen25_7b mask_path=masks/gsm8k/0.9_mask.pt gpu_memory=24
    python -m lota.plan model=llama31_8b trainer=FSDPTrainer processes=8 json=plan.json

Settings: those of train_single_gpu.py, and the plan's own in config/plan.yaml. Of the model only its
config.json is read.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from lota.plan.config import PlanConfig, plan_problems
from lota.train.cli import guarded, register, resolve
from lota.train.overrides import start

CONFIG = Path(__file__).resolve().parent.parent.parent / "config"
register("plan", PlanConfig)


def plan(config: PlanConfig) -> None:
    """Print the plan of a run, and write its file. Raises ValueError for what cannot be planned."""
    import torch  # slow to import: settings are checked first

    from lota.models.policy import model_folder
    from lota.models.scope import meta_model
    from lota.plan.predict import Setup, predict
    from lota.plan.table import advice_lines, headline, numbers, table
    from lota.plan.ways import Way, advise, compared
    from lota.storage import write_json
    from lota.train.run_model import check_positions

    on_gpu = config.gpu_memory is not None or torch.cuda.is_available()
    device = config.device or ("cuda" if on_gpu else "cpu")
    setup = Setup(device, config.processes, config.tokens, config.sparsity, config.all_blocks)
    model = meta_model(model_folder(config.model.name_or_path, config.model.archive))
    check_positions(model, setup.length or config.max_length)
    run = Way("this run", config, setup)
    first = predict(config, model, setup)
    others = compared(run)[1:] if config.compare else []
    planned = [(run, first), *((way, predict(way.config, model, way.setup)) for way in others)]
    lines, advice = [*headline(run, model, first), "", *table(planned, setup)], None
    if config.gpu_memory is not None:
        limit = round(config.gpu_memory * 2**30)
        if first.peak.peak > limit:
            advice = advise(run, first, lambda way: predict(way.config, model, way.setup), limit)
        lines += ["", *advice_lines(first, advice, limit)]
    print("\n".join(lines))
    if config.json is not None:
        write_json(Path(config.json).expanduser(), numbers(planned, advice))


def run(cfg: DictConfig) -> None:
    with guarded():
        for name in ("transformers", "peft"):  # which warn of a model without weights
            logging.getLogger(name).setLevel(logging.ERROR)
        plan(resolve(cfg, CONFIG.parent, PlanConfig, plan_problems))


@hydra.main(version_base=None, config_path=str(CONFIG), config_name="plan")
def main(cfg: DictConfig) -> None:
    run(cfg)


if __name__ == "__main__":
    if not CONFIG.is_dir():
        sys.exit(f"{CONFIG} is not there: plan in a checkout of the project, whose settings it reads")
    start(main, PlanConfig, CONFIG / "plan.yaml")
