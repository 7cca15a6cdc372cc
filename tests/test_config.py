"""Settings: composed by Hydra, described in one place, checked all at once, listed if nothing reads them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass

import pytest
import yaml
from prepared import python
from runs import ROOT, composed

from lota.config import LOSSES, MISSING, Config, LossConfig, ModelConfig
from lota.config_checks import WEIGHT_NEUTRAL, differences, unused_settings, validated
from lota.lotto.config import LottoConfig
from lota.models.loading import DTYPES as TORCH_DTYPES
from lota.optim.clipping import GRAD_NORM_STRATEGIES
from lota.optim.optimizers import OPTIMIZERS, SCHEDULERS
from lota.plan.config import PlanConfig
from lota.settings import keys_of
from lota.train.cli import _folder_name, register, resolve
from lota.train.objectives import OBJECTIVES
from lota.train.overrides import override_problems
from lota.train.reference import REFERENCES
from lota.utils import name_problem
from scripts.settings import CONFIG, FILES, lines_of, page, with_comments
from trainers import TRAINERS

YAML = [f"{path.parent.name}={path.stem}" for path in sorted(CONFIG.glob("*/*.yaml"))]
ABOUT = {key.name: key.about for key in keys_of(LottoConfig())}


# What is known of each setting


def test_every_field_is_a_setting_or_a_group():
    groups = [Config, LottoConfig, *(type(value) for value in vars(LottoConfig()).values())]
    for group in filter(is_dataclass, groups):
        for field in fields(group):
            assert "setting" in field.metadata or is_dataclass(field.default_factory), field.name


def test_the_page_of_settings_is_current():
    """If not: python -m scripts.settings > docs/SETTINGS.md"""
    assert (ROOT / "docs" / "SETTINGS.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("file", FILES)
def test_the_comments_of_the_yaml_files_are_current(file):
    """If not: python -m scripts.settings --yaml"""
    assert (CONFIG / file).read_text(encoding="utf-8") == with_comments(file)


def test_every_key_has_a_line_in_the_yaml_files():
    own = {key.name for key in keys_of(PlanConfig())}
    assert {line.key for file, prefix in FILES.items() for line in lines_of(CONFIG / file, prefix)} == {
        *ABOUT, *own
    }  # fmt: skip


def test_defaults_of_yaml_and_schema_are_the_same():
    found = composed("exp_name=x", "model=blank_model", "model.name_or_path=m")
    assert asdict(found) == asdict(Config("x", ModelConfig("m"), datasets=found.datasets))


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_has_its_own_keys_with_their_defaults(name):
    loss = composed(f"loss={name}").loss
    assert loss == Config(loss=LossConfig(name)).loss
    for key in keys_of(loss, "loss."):
        own = key.name == "loss.name" or f"loss.name={name}" in key.about.needs
        assert (key.value is not None) == own


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("optimizer", OPTIMIZERS),
        ("lr_scheduler", SCHEDULERS),
        ("grad_norm_strategy", GRAD_NORM_STRATEGIES),
        ("trainer.name", TRAINERS),
        ("loss.name", OBJECTIVES),
        ("model.reference", (None, *REFERENCES)),
        ("model.policy_dtype", TORCH_DTYPES),
    ],
)
def test_choices_are_what_the_code_has(key, names):
    assert set(ABOUT[key].choices) == set(names)


def test_settings_are_checked_without_importing_torch():
    code = "import sys, lota.lotto.config_checks, lota.train.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# The YAML files


@pytest.mark.parametrize("choice", [choice for choice in YAML if not choice.startswith("experiment")])
def test_every_yaml_composes_and_comments_its_keys(choice):
    group, _, name = choice.partition("=")
    assert all(line.comment for line in lines_of(CONFIG / group / f"{name}.yaml"))
    config = composed(choice, *(["model.name_or_path=m"] if name == "blank_model" else []))
    assert config.model.name_or_path not in (MISSING, None)


def test_every_model_of_the_list_has_a_config():
    wanted = """
        tiny blank_model gpt2 gpt2-large gpt2-xl gptj pythia28 pythia69 llama7b llama2_7b llama2_13b
        llama2_70b llama3 mistral7b mixtral yi_6b deepseek7b zephyr_sft llama31_8b llama32_1b llama32_3b
        qwen25_7b qwen3_8b smollm2_1b7 smollm3_3b olmo2_7b
    """
    assert {f"model={name}" for name in wanted.split()} <= set(YAML)


def test_the_command_of_the_design():
    command = """do_first_eval=False mask_path=masks/g/0.9_mask.pt loss=sft model=llama3 model.archive=/tmp/a
        datasets=[gsm8k] exp_name=e eval_batch_size=16 sample_during_eval=false lr=1e-5 trainer=FSDPTrainer
        activation_checkpointing=True data_fraction=1.0 save_every=epoch_1 eval_every=100000 n_epochs=1
        batch_size=8 gradient_accumulation_steps=1 model.fsdp_policy_mp=bfloat16 fsdp_port=12355
        optimizer=RMSprop grad_norm_strategy=even max_grad_norm=10"""
    config = composed(*command.split())
    assert (config.trainer.name, config.model.fsdp_policy_mp, config.lr) == ("FSDPTrainer", "bfloat16", 1e-5)
    assert (config.datasets, config.save_interval) == (["gsm8k"], ("epoch", 1))


def test_only_what_cannot_change_weights_is_left_out_of_the_names_of_jobs():
    hydra = yaml.safe_load((CONFIG / "config.yaml").read_text())["hydra"]
    assert set(hydra["job"]["config"]["override_dirname"]["exclude_keys"]) == WEIGHT_NEUTRAL


# Checks


def test_all_problems_in_one_error():
    bad = """optimizer=Adam lr=-1 batch_size=9 gradient_accumulation_steps=2 max_prompt_length=512
        data_fraction=0 save_every=epoch_0 datasets=[a,a]"""
    with pytest.raises(ValueError) as error:
        composed(*bad.split())
    heading, *lines = str(error.value).splitlines()
    assert heading == "invalid settings:"
    assert lines == [
        "  data_fraction=0.0: must be above 0 and at most 1",
        "  optimizer=Adam: choose one of RMSprop, AdamW, SGD; did you mean AdamW?",
        "  lr=-1.0: must be at least 0",
        "  datasets=['a', 'a']: a task is named twice",
        "  max_prompt_length=512 leaves no room for a response in max_length=512: make it smaller",
        "  batch_size=9 is not divisible by gradient_accumulation_steps=2, the parts a batch is cut into",
        "  save_every=epoch_0: give epoch_N (N epochs) or N (examples), N at least 1",
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("lr_scheduler=cosin", "choose one of constant, linear, cosine; did you mean cosine?"),
        ("grad_norm_strategy=evn", "did you mean even?"),
        ("model.fsdp_policy_mp=float16", "model.fsdp_policy_mp=float16: choose one of null, bfloat16"),
        ("model.fsdp_policy_mp=bfloat16 model.policy_dtype=float16", "choose float32 or bfloat16"),
        ("alpha=1", "alpha=1.0: must be at least 0 and below 1"),
        ("lr=inf", "lr=inf: must be finite and at least 0"),
        ("betas=[0.9]", "betas=[0.9]: give two numbers"),
        ("betas=[0.9,1]", "betas=1.0: must be at least 0 and below 1"),
        ("n_epochs=0", "n_epochs=0: must be at least 1, or null"),
        ("n_epochs=null n_examples=null", "n_epochs and n_examples are both null"),
        ("max_grad_norm=0", "max_grad_norm=0.0: must be above 0 (or grad_norm_strategy=none)"),
        ("save_every=soon", "save_every=soon: give epoch_N"),
        ("replay=[a,a]", "replay=['a', 'a']: a task is named twice"),
        ("datasets=[a] replay=[b,a]", "datasets=['a'] trains on all rows of a already; drop one"),
        ("replay=[b] replay_fraction=0", "replay_fraction=0.0: must be above 0 and at most 1"),
        ("flip_mask=true", "flip_mask=true needs a mask_path"),
        ("freeze_odd_layers=true freeze_even_layers=true", "freeze_odd_layers and freeze_even_layers"),
        ("exp_name=../up", "exp_name=../up: must be a name inside the folder"),
        ("exp_name=/abs", "exp_name=/abs: must be a name inside the folder"),
        ("exp_name=.", "exp_name=.: must name a folder"),
        ("exp_name=a/.replaced", "no part may begin with a dot"),
        (f"exp_name=a/{'x' * 300}", "no part may be longer than 200 bytes"),
        ("exp_name=x/step-16", "step-16 is the name of a checkpoint"),
        ("exp_name=x/epoch-1/y", "epoch-1 is the name of a checkpoint"),
        ("exp_name=", "exp_name is not given"),
        ("model.pad_token=", "model.pad_token='': give a token, such as <PAD>, or null"),
        ("seed=100000000000000000000000", "seed=100000000000000000000000: must be at least 0 and at most"),
        ("datasets=[]", "datasets is empty"),
        ("loss=dpo loss.average_log_prob=true", "loss.average_log_prob=True: a setting of loss=sft"),
        ("loss=dpo loss.average_log_prob=false", "loss.average_log_prob=False: a setting of loss=sft"),
        ("loss=sft loss.beta=0.1 loss.ipo=true", "loss.beta=0.1, loss.ipo=True: settings of loss=dpo"),
        ("loss.name=dpo", "choose loss=sft (loss=, not loss.name=)"),
        ("loss.name=dop", "loss.name=dop: choose one of sft, dpo; did you mean dpo?"),
        ("loss=dpo loss.beta=0", "loss.beta=0.0: must be above 0"),
        ("loss=dpo loss.beta=inf", "loss.beta=inf: must be finite and above 0"),
        ("loss=dpo loss.robust_eps=0.5", "loss.robust_eps=0.5: must be at least 0 and below 0.5"),
        ("loss=dpo loss.robust_eps=0.1 loss.ipo=true", "loss.robust_eps=0.1 with loss.ipo=true"),
        ("loss=dpo loss.reference_free=true loss.importance_correction=true", "correction needs a reference"),
        ("loss=dpo model.reference=swapped", "model.reference=swapped: choose one of null, swap"),
        ("loss=dpo model.reference=swap model.reference_archive=a", "model.reference=model or precomputed"),
        ("optimizer_state=factor", "choose one of float32, bfloat16, factored; did you mean factored?"),
        ("stochastic_rounding=true model.policy_dtype=float16", "set model.policy_dtype=bfloat16"),
    ],
)  # fmt: skip
def test_each_bad_setting_is_named_with_its_remedy(overrides, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        composed(*overrides.split())


@pytest.mark.parametrize(
    "overrides",
    [
        "max_length=512 max_prompt_length=511",
        "batch_size=12 gradient_accumulation_steps=4",
        "n_epochs=null n_examples=5", "n_epochs=1 n_examples=null",
        "save_every=epoch_1", "save_every=1", "datasets=[a,b]",
        "max_grad_norm=0.1", 'model.pad_token="<PAD>"', "model.pad_token=null",
        "model.fsdp_policy_mp=bfloat16", "model.policy_dtype=float16",
        "flip_mask=true mask_path=a", "mask_path=a", "snip=true",
        "freeze_odd_layers=true", "freeze_even_layers=true", "adapter=lora",
        "loss=dpo loss.ipo=true", "loss=dpo loss.robust_eps=0.1", "loss=dpo loss.beta=0.5",
        "loss=sft loss.average_log_prob=true",
        "loss=dpo loss.reference_free=true", "loss=dpo loss.importance_correction=true",
        "loss=dpo model.reference=swap", "loss=dpo model.reference_archive=a",
        "loss=dpo model.reference=precomputed model.reference_archive=a",
        "snip=true model.reference_archive=a",
        "snip=true loss=dpo", "snip=true loss=dpo loss.reference_free=true model.reference_archive=a",
        "exp_name=a/epoch-x/step-", "exp_name=step-1b",
        "stochastic_rounding=true model.policy_dtype=bfloat16 mask_path=a",
        "optimizer_state=factored optimizer=AdamW freeze_odd_layers=true",
        "optimizer_state=bfloat16 snip=true", "optimizer_state=bfloat16 adapter=lora",
    ],
)  # fmt: skip
def test_what_is_just_not_bad_is_taken(overrides):
    assert composed(*overrides.split())


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("snip=true flip_mask=true", ["flip_mask=true with snip=true: store the mask with save_snip_mask_p"]),
        ("snip=true mask_path=a", ["snip=true with mask_path=a: snip computes the mask itself; drop one"]),
        ("snip=true loss=dpo model.reference_archive=a",
         ["snip=true with model.reference_archive=a: the mask's gradients are those against the run's own"]),
        ("adapter=lora mask_path=a", ["mask_path=a with adapter=lora: LoRA freezes every weight of the mod"]),
        ("adapter=lora freeze_odd_layers=true protect_masks=[a]",
         ["protect_masks=['a'] with adapter=lora: LoRA freezes", "freeze_odd_layers=True with adapter=lora"]),
        ("max_prompt_length=512", ["max_prompt_length=512 leaves no room for a response in max_length=512"]),
        ("exp_name=", ["exp_name is not given: name the run, as in exp_name=my_run"]),
        ("exp_name=../step-3", ["exp_name=../step-3: must be a name"]),
        ("exp_name=a/b/step-3", ["exp_name=a/b/step-3: step-3 is the name of a checkpoint; name the run ot"]),
        ("save_every=0", ["save_every=0: give epoch_N (N epochs) or N (examples), N at least 1"]),
        ("loss=sft loss.ipo=false", ["loss.ipo=False: a setting of loss=dpo, and this run has loss=sft"]),
        ("gradient_accumulation_steps=0", ["gradient_accumulation_steps=0: must be at least 1"]),
        ("stochastic_rounding=true model.fsdp_policy_mp=bfloat16",
         ["stochastic_rounding=true with model.policy_dtype=float32: it is for weights that are held in b"]),
        ("stochastic_rounding=true model.policy_dtype=bfloat16 adapter=lora",
         ["stochastic_rounding=true with adapter=lora: A and B are held in float32; drop one of them"]),
        ("optimizer_state=factored snip=true", ["optimizer_state=factored with snip=true: a mask keeps"]),
        ("optimizer_state=factored optimizer=SGD momentum=0.9",
         ["optimizer_state=factored with optimizer=SGD: it has no squared-gradient average; drop it"]),
    ],
)  # fmt: skip
def test_each_problem_is_told_alone_and_once(overrides, told):
    with pytest.raises(ValueError) as error:
        composed(*overrides.split())
    heading, *lines = str(error.value).splitlines()
    assert heading == "invalid settings:" and len(lines) == len(told), lines
    assert all(line.startswith(f"  {start}") for line, start in zip(lines, told, strict=True)), lines


def test_a_problem_that_is_found_twice_is_told_once():
    config = composed()
    assert validated(config, lambda c: iter(())) is config
    with pytest.raises(ValueError) as error:
        validated(config, lambda c: iter(["b", "a", "b"]))
    assert str(error.value) == "invalid settings:\n  b\n  a"


@pytest.mark.parametrize("key", ["PROJECT_CACHE", "local_dirs", "exp_name"])
def test_a_file_in_the_place_of_the_runs_folder(tmp_path, monkeypatch, key):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "file" if key == "PROJECT_CACHE" else tmp_path))
    override = {"local_dirs": f"local_dirs=[{tmp_path}/file/runs]", "exp_name": "exp_name=file/x"}.get(key)
    with pytest.raises(ValueError, match=rf"{key}: the run's folder would be .*/file is a file; choose"):
        composed(*([override] if override else []))


def test_a_number_of_processes_that_is_no_number(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(ValueError, match="WORLD_SIZE=abc: the environment variable must be a number"):
        composed()
    for size in ("", "8", "16"):
        monkeypatch.setenv("WORLD_SIZE", size)
        assert composed("batch_size=16")


@pytest.mark.parametrize(
    "overrides", ["lr=" + "ä" * 150, "lr=" + "x" * 199, "model.archive=../" + "a/" * 150]
)
def test_the_folder_of_a_job_is_one_name_that_a_file_system_takes(overrides):
    assert name_problem(_folder_name(overrides)) == ""
    assert _folder_name(overrides) != _folder_name(overrides + "b")


def test_a_configuration_can_be_made_without_checks():
    with pytest.raises(
        ValueError, match=r"(?s)^invalid settings:.*exp_name is not given.*model\.name_or_path"
    ):
        validated(Config())


def test_a_limit_that_is_not_used_may_be_infinite():
    assert composed("max_grad_norm=0", "grad_norm_strategy=none")
    assert composed("max_grad_norm=inf")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("", []),
        (
            "optimizer=SGD alpha=0.5 betas=[0.8,0.9] momentum=0.5 fsdp_port=1",
            ["alpha=0.5 (optimizer=SGD)", "betas=[0.8, 0.9] (optimizer=SGD)", "fsdp_port=1 (one process)"],
        ),
        ("n_eval_model_samples=3", ["n_eval_model_samples=3 (sample_during_eval=false)"]),
        ("n_eval_model_samples=3 sample_during_eval=true", []),
        ("grad_norm_strategy=none max_grad_norm=3", ["max_grad_norm=3.0 (grad_norm_strategy=none)"]),
        ("overwrite=true resume=never", ["resume=never (overwrite=true)"]),
        ("debug=true save_every=5", ["save_every=5 (debug=true)"]),
        ("wandb.mode=offline", ["wandb.mode=offline (wandb.enabled=false)"]),
        ("wandb.enabled=true debug=true", ["wandb.enabled=True (debug=true)"]),
        ("lora_rank=4", ["lora_rank=4 (adapter=none)"]),
        ("snip_batches=4 save_snip_mask_path=x",
         ["save_snip_mask_path=x (snip=false)", "snip_batches=4 (snip=false)"]),
        ("model.scope=mlp",
         ["model.scope=mlp (flip_mask=false, snip=false, adapter=none; a mask file has its own scope)"]),
        ("model.scope=mlp adapter=lora", []),
        ("model.scope=mlp snip=true", []),
        ("model.scope=mlp flip_mask=true mask_path=a", []),
        ("model.reference=model model.reference_dtype=float32",
         ["model.reference=model (loss=sft)", "model.reference_dtype=float32 (loss=sft)"]),
        ("loss=dpo loss.ipo_sum=true", ["loss.ipo_sum=True (loss.ipo=false)"]),
        ("loss=dpo loss.ipo_sum=true loss.ipo=true loss.beta=0.5", []),
        ("loss=dpo loss.reference_free=true model.reference=swap",
         ["model.reference=swap (loss.reference_free=true)"]),
        ("loss=dpo model.reference=swap model.reference_dtype=float32",
         ["model.reference_dtype=float32 (model.reference=swap computes with the policy)"]),
        ("loss=dpo model.reference=model model.reference_dtype=float32", []),
        ("loss=dpo model.reference=precomputed model.reference_archive=a model.reference_dtype=float32", []),
    ],
)  # fmt: skip
def test_what_nothing_reads_is_listed_with_the_reason(overrides, expected):
    assert sorted(unused_settings(composed(*overrides.split())).values()) == expected


def test_differences_name_what_changes_weights_only():
    old = asdict(composed())
    new = composed("lr=1e-4", "model.policy_dtype=bfloat16", "eval_every=5", "wandb.project=p")
    assert differences(old, new) == ["lr: 1e-05 -> 0.0001", "model.policy_dtype: float32 -> bfloat16"]
    assert differences(old, composed("betas=[0.8,0.9]", "model.reference_dtype=float32")) == []
    assert differences(old, composed("betas=[0.8,0.9]", "optimizer=AdamW")) == [
        "betas: [0.9, 0.999] -> [0.8, 0.9]",
        "optimizer: RMSprop -> AdamW",
    ]


def test_a_key_that_an_older_run_does_not_have_counts_as_its_default():
    old = asdict(composed())
    del old["lr_scheduler"], old["model"]["scope"]
    assert differences(old, composed()) == []
    assert differences(old, composed("lr_scheduler=cosine")) == ["lr_scheduler: constant -> cosine"]


# The command line, before Hydra sees it


def told(command: str, schema=Config, file="config.yaml") -> list[str]:
    return list(override_problems(command.split(), schema, CONFIG / file))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("lr=abc", "lr=abc: should be a number"),
        ("lr=", "lr=: should be a number"),
        ("seed=1e23", "seed=1e23: should be a whole number"),
        (f"seed={'9' * 5000}", "5000 digits"),
        ("n_epochs=soon", "n_epochs=soon: should be a whole number or null"),
        ("do_first_eval=2", "do_first_eval=2: should be true or false"),
        ("datasets=gsm8k", "datasets=gsm8k: should be a list, as in datasets=[gsm8k]"),
        ("betas=[0.9,x]", "betas=[0.9,x]: should be a list of numbers"),
        ("exp_name=[a]", "exp_name=[a]: should be text"),
        ("learning_rate=1e-4", "unknown key learning_rate=1e-4; did you mean lr, "),
        ("+learning_rate=1e-4", "unknown key learning_rate=1e-4; did you mean lr, "),
        ("model.policy_dtyp=float32", "did you mean model.policy_dtype"),
        ("losss=dpo", "did you mean loss?"),
        ("loss=dop", "loss=dop: there is no config/loss/dop.yaml; did you mean dpo?"),
        ("-m model=tiny,tinny", "model=tinny: there is no config/model/tinny.yaml; did you mean tiny?"),
        ("-m lr=abc,1e-4", "lr=abc: should be a number"),
        ("experiment=fft", "experiment is added, with a plus"),
        ("+experiment=lota_0.8", "did you mean lota_0.9"),
        ("+lr=1", "+lr=1: the key is there already; leave out the plus"),
        ("lr=[1", "lr=[1: cannot be read"),
        ("bogus", "bogus: settings are given as key=value"),
        ("--lr 1e-4", "--lr 1e-4: settings are given as key=value: lr=1e-4"),
        ("loss=sft --batch-size=4", "--batch-size=4: settings are given as key=value: batch_size=4"),
        ("--debug", "--debug: settings are given as key=value: debug=true"),
        ("--learning-rate 1", "--learning-rate 1: settings are given as key=value; did you mean lr, "),
        ("seed=1 -m lr=1,2", "lr=1,2: put flags such as -m in front of all settings"),
    ],
)
def test_what_hydra_would_refuse_is_told_with_its_remedy(given, words):
    (line,) = told(given)
    assert words in line and "+learning_rate" not in line


@pytest.mark.parametrize(
    "given",
    [
        "lr=1 seed=0 datasets=[a,b] do_first_eval=0 wandb.enabled=yes save_every=epoch_2 n_epochs=null",
        "-m lr=1e-4,1e-3 seed=range(0,3) model=tiny,gpt2 +experiment=fft",
        "hydra/launcher=basic hydra.job.name=x ~lr model.name_or_path=${exp_name} loss.beta=null",
        "--config-dir mine +own=key model=mine",
        "--help x",
        "--cfg job debug=true",
    ],
)
def test_what_hydra_takes_is_taken(given):
    assert told(given) == []


def test_all_of_a_command_line_at_once():
    assert len(told("lr=abc optimizr=SGD datasets=x --lr 3")) == 4
    lines = told("tasks=a sparsity=x +task_overrides.a.lr=1 calibrate.steps=1", LottoConfig, "lotto.yaml")
    assert [line.split(":")[0].split(";")[0] for line in lines] == [
        "tasks=a", "sparsity=x", "unknown key calibrate.steps=1"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("lr=abc losss=sft", "invalid settings:\n  lr=abc: should be a number\n  unknown key losss=sft"),
        ("exp_name=x hydra.job.nmae=y", "Could not override 'hydra.job.nmae'."),  # Hydra's own words
        ("-m exp_name=x lr=-1,-2", "error: invalid settings:\n  lr=-2.0: must be at least 0"),
    ],
)
def test_a_refused_command_has_no_traceback(given, shown, tmp_path):
    command = [python(), str(ROOT / "train_single_gpu.py"), *given.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and shown in done.stderr
    assert "Traceback" not in done.stderr and "HYDRA_FULL_ERROR" not in done.stderr


# Values that are worked out


def test_optimizer_settings_reach_the_class():
    config = composed("optimizer=AdamW", "betas=[0.8,0.9]", "eps=1e-6", "weight_decay=0.1", "max_grad_norm=3")
    assert config.optimizer_settings == {
        "lr": 1e-5, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.1, "grad_norm_strategy": "even",
        "max_grad_norm": 3.0, "optimizer_state": "float32", "stochastic_rounding": False, "seed": 0,
    }  # fmt: skip


def test_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT_CACHE", str(tmp_path / "p"))
    assert composed().run_dir == tmp_path / "p" / "run"
    (tmp_path / "second").mkdir()
    dirs = f"local_dirs=[{tmp_path}/first,{tmp_path}/second,{tmp_path}/third]"
    assert composed(dirs).run_dir == tmp_path / "second" / "run"
    (tmp_path / "second").rmdir()
    assert composed(dirs).run_dir == tmp_path / "third" / "run"
    assert composed("save_every=500").save_interval == ("step", 500)


def test_paths_that_exist_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").touch()
    config = composed("mask_path=a.pt", "protect_masks=[a.pt,b.pt]", "model=gpt2", "snip=true",
                      "save_snip_mask_path=new.pt", "model.archive=a.pt", "mask_path=null")  # fmt: skip
    config.resolve_paths()
    assert config.protect_masks == [str(tmp_path / "a.pt"), "b.pt"]
    assert (config.model.archive, config.model.name_or_path) == (f"{tmp_path}/a.pt", "openai-community/gpt2")
    assert config.save_snip_mask_path == str(tmp_path / "new.pt")


def test_unknown_tasks_and_unreadable_masks_are_told_with_the_settings(tmp_path):
    from hydra import compose, initialize_config_dir

    from tasks import get_task

    register("training", Config)
    given = ["lr=-1", "datasets=[gsm8kk]", "mask_path=no_mask.pt", f"protect_masks=[{tmp_path}]"]
    with initialize_config_dir(str(ROOT / "config"), version_base=None):
        cfg = compose("config", overrides=["exp_name=x", *given])
    with pytest.raises(ValueError) as error:
        resolve(cfg, ROOT, Config, find_task=get_task)
    for words in ("lr=-1", "gsm8kk", "no_mask.pt does not exist", f"{tmp_path} is a folder"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["adapter=lora"],
            "adapter=lora with trainer=FSDPTrainer on 3 processes: .* use trainer=BasicTrainer",
        ),
        (["compile=true"], "compile=true with .* use compile=false"),
        (["optimizer_state=factored"], "optimizer_state=factored with .* choose optimizer_state=bfloat16"),
        (["model.replicas=2"], "model.replicas=2 does not divide the 3 processes"),
    ],
)
def test_what_cannot_be_sharded_is_refused(overrides, message, monkeypatch):
    assert composed("trainer=FSDPTrainer", *overrides)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert composed("trainer=FSDPTrainer")
    with pytest.raises(ValueError, match=message):
        composed("trainer=FSDPTrainer", *overrides)
