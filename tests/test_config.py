"""Settings: composed by Hydra, typed, checked all at once, and told truthfully when they are not used."""

from __future__ import annotations

import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from lota.config import Config, ModelConfig
from lota.config_checks import WEIGHT_NEUTRAL, differences, unused_settings

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config"
GROUPS = ("model", "loss", "trainer", "adapter")
ConfigStore.instance().store(name="schema", node=Config)


def settings(*overrides: str) -> Config:
    with initialize_config_dir(str(CONFIG), version_base=None):
        return OmegaConf.to_object(compose("config", overrides=["exp_name=x", *overrides]))


def keys_of(node, prefix=""):
    for f in fields(node):
        value = getattr(node, f.name)
        yield from keys_of(value, f"{prefix}{f.name}.") if is_dataclass(value) else [prefix + f.name]


def commented_keys(path: Path, prefix: str = "") -> dict[str, str]:
    """Dotted key -> comment of every `key: value # comment` line of a YAML file without the hydra section."""
    found, parents = {}, []
    for line in path.read_text().split("\nhydra:")[0].splitlines():
        match = re.match(r"( *)([\w-]+):(?: *(.*?))?(?: +# (.*))?$", line)
        if not match or match[2] == "defaults":
            continue
        depth = len(match[1]) // 2
        parents = [*parents[:depth], match[2]]
        if match[3]:
            found[prefix + ".".join(parents)] = match[4]
    return found


def test_defaults_of_yaml_and_schema_are_the_same():
    composed = settings("model=blank_model", "model.name_or_path=m")
    plain = Config("x", ModelConfig("m"), datasets=composed.datasets)
    assert asdict(composed) == asdict(plain)


def test_every_key_of_the_schema_has_a_commented_line():
    documented = commented_keys(CONFIG / "config.yaml")
    documented |= commented_keys(CONFIG / "model" / "blank_model.yaml", "model.")
    documented |= commented_keys(CONFIG / "loss" / "sft.yaml", "loss.")
    documented |= commented_keys(CONFIG / "loss" / "dpo.yaml", "loss.")
    documented |= commented_keys(CONFIG / "trainer" / "BasicTrainer.yaml", "trainer.")
    documented |= commented_keys(CONFIG / "adapter" / "none.yaml", "adapter.")
    assert set(documented) == set(keys_of(settings()))
    assert not [key for key, comment in documented.items() if not comment]


@pytest.mark.parametrize(
    ("group", "name"), [(g, p.stem) for g in GROUPS for p in sorted((CONFIG / g).glob("*.yaml"))]
)
def test_every_yaml_composes_and_comments_its_keys(group, name):
    extra = ["model.name_or_path=m"] if name == "blank_model" else []
    config = settings(f"{group}={name}", *extra)
    assert isinstance(config, Config)
    assert all(commented_keys(CONFIG / group / f"{name}.yaml").values())


def test_the_command_of_the_design():
    command = """do_first_eval=False mask_path=masks/g/0.9_mask.pt loss=sft model=llama3 model.archive=/tmp/a
        datasets=[gsm8k] exp_name=e eval_batch_size=16 sample_during_eval=false lr=1e-5 trainer=FSDPTrainer
        activation_checkpointing=True data_fraction=1.0 save_every=epoch_1 eval_every=100000 n_epochs=1
        batch_size=8 gradient_accumulation_steps=1 model.fsdp_policy_mp=bfloat16 fsdp_port=12355
        optimizer=RMSprop grad_norm_strategy=even max_grad_norm=10"""
    config = settings(*command.split())
    assert config.trainer.name == "FSDPTrainer"
    assert config.model.fsdp_policy_mp == "bfloat16"
    assert config.lr == 1e-5
    assert config.datasets == ["gsm8k"]
    assert config.save_interval == ("epoch", 1)


def test_all_problems_in_one_error():
    bad = """optimizer=Adam lr=-1 batch_size=9 gradient_accumulation_steps=2 max_prompt_length=512
        data_fraction=0 save_every=epoch_0 datasets=[a,a]"""
    with pytest.raises(ValueError, match="cannot be honoured") as error:
        settings(*bad.split())
    text = str(error.value)
    expected_words = ("optimizer=Adam", "did you mean AdamW", "lr=-1.0", "batch_size=9", "named twice")
    for expected in (*expected_words, "max_prompt_length=512", "data_fraction=0.0", "save_every=epoch_0"):
        assert expected in text


BAD = """lr_scheduler=cosin grad_norm_strategy=evn model.policy_dtype=fp32 model.fsdp_policy_mp=float16
    resume=maybe alpha=1 betas=[0.9] n_epochs=0 max_grad_norm=0 save_every=soon seed=-1 flip_mask=true
    exp_name=../up wandb.mode=quiet warmup_steps=-1 datasets=[] freeze_odd_layers=true,freeze_even_layers=true
    n_epochs=null,n_examples=null"""


@pytest.mark.parametrize("overrides", BAD.split())
def test_each_bad_setting_is_named(overrides):
    both = ["freeze_odd_layers=true,freeze_even_layers=true", "n_epochs=null,n_examples=null"]
    overrides = overrides.split(",") if overrides in both else [overrides]
    with pytest.raises(ValueError, match=re.escape(overrides[0].split("=")[0])):
        settings(*overrides)


def test_unused_settings_are_told_and_used_ones_are_not():
    assert unused_settings(settings()) == []
    told = unused_settings(
        settings("optimizer=SGD", "alpha=0.5", "betas=[0.8,0.9]", "momentum=0.5", "fsdp_port=1")
    )
    assert [line.split("=")[0] for line in told] == ["alpha", "betas", "fsdp_port"]
    assert unused_settings(settings("n_eval_model_samples=3"))
    assert not unused_settings(settings("n_eval_model_samples=3", "sample_during_eval=true"))


def test_optimizer_settings_reach_the_class():
    config = settings("optimizer=AdamW", "betas=[0.8,0.9]", "eps=1e-6", "weight_decay=0.1", "max_grad_norm=3")
    assert config.optimizer_settings == {
        "lr": 1e-5, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.1, "grad_norm_strategy": "even",
        "max_grad_norm": 3.0,
    }  # fmt: skip


def test_differences_name_what_changes_weights_only():
    old = asdict(settings())
    new = settings("lr=1e-4", "model.policy_dtype=bfloat16", "eval_every=5", "wandb.project=p")
    assert differences(old, new) == ["lr: 1e-05 -> 0.0001", "model.policy_dtype: float32 -> bfloat16"]
    assert differences(old, settings("betas=[0.8,0.9]", "model.reference_dtype=float32")) == []
    assert differences(old, settings("betas=[0.8,0.9]", "optimizer=AdamW")) == [
        "betas: [0.9, 0.999] -> [0.8, 0.9]",
        "optimizer: RMSprop -> AdamW",
    ]
    assert set(old) >= WEIGHT_NEUTRAL


def test_only_what_cannot_change_weights_is_left_out_of_the_names_of_jobs():
    text = (CONFIG / "config.yaml").read_text()
    left_out = yaml.safe_load(text)["hydra"]["job"]["config"]["override_dirname"]["exclude_keys"]
    assert {key.split(".")[0] for key in left_out} == WEIGHT_NEUTRAL


def test_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "p"))
    assert settings().run_dir == tmp_path / "p" / "x"
    (tmp_path / "second").mkdir()
    dirs = f"local_dirs=[{tmp_path}/first,{tmp_path}/second,{tmp_path}/third]"
    assert settings(dirs).run_dir == tmp_path / "second" / "x"
    (tmp_path / "second").rmdir()
    assert settings(dirs).run_dir == tmp_path / "third" / "x"
    assert settings("save_every=500").save_interval == ("step", 500)
