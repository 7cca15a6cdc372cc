"""config/model/*.yaml: each composes, with the same keys, each explained."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
MODEL_CONFIGS = sorted((ROOT / "config" / "model").glob("*.yaml"))


@pytest.mark.parametrize("file", MODEL_CONFIGS, ids=lambda file: file.stem)
def test_model_config_composes_with_every_key(file):
    keys = {
        "name_or_path", "tokenizer_name_or_path", "archive", "block_name", "policy_dtype", "fsdp_policy_mp",
        "reference", "reference_archive", "reference_dtype", "pad_token", "scope",
    }  # fmt: skip
    with initialize_config_dir(str(file.parent), version_base=None):
        config = OmegaConf.to_container(compose(file.stem))
    assert set(config) == keys
    assert (config["name_or_path"] == "???") == (file.stem == "blank_model")


def test_every_model_of_the_list_has_a_config():
    wanted = """
        tiny blank_model gpt2 gpt2-large gpt2-xl gptj pythia28 pythia69 llama7b llama2_7b llama2_13b
        llama2_70b llama3 mistral7b mixtral yi_6b deepseek7b zephyr_sft llama31_8b llama32_1b llama32_3b
        qwen25_7b qwen3_8b smollm2_1b7 smollm3_3b olmo2_7b
    """
    assert set(wanted.split()) <= {file.stem for file in MODEL_CONFIGS}


@pytest.mark.parametrize("file", MODEL_CONFIGS, ids=lambda file: file.stem)
def test_every_key_has_a_comment(file):
    lines = [line for line in file.read_text().splitlines() if line and line[0] not in "# "]
    assert lines and all(" # " in line for line in lines)
