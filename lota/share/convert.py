"""policy.pt + its base -> a Hugging Face folder, on the CPU, in the memory of about one model.

Tensors are mapped from policy.pt and written shard by shard under the base's names on disk.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lota.models.loading import (
    add_pad_token,
    load_tokenizer,
    model_from_policy,
    resize_vocabulary,
    set_pad_token_id,
    special_id,
)
from lota.models.opening import check_tokenizer, embedding_rows, open_model
from lota.models.policy import find_policy, read_policy
from lota.models.provenance import run_settings
from lota.models.scope import load_config, meta_model
from lota.models.tensor_files import has_weights
from lota.models.weights import open_weights
from lota.share.hf_folder import (
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    check_replaceable,
    copy_small_files,
    disk_dtypes,
    new_model_files,
)
from lota.share.hf_weights import check_shard_size, write_weights

logger = logging.getLogger(__name__)
VOCABULARIES = ("checkpoint", "base")


@dataclass(frozen=True)
class Converted:
    """What was written."""

    folder: Path
    dtype: torch.dtype  # of most weights
    rows: int  # of the embedding
    step_idx: int  # the policy's
    datasets: tuple[str, ...]  # of its run, if that is known
    data_dir: str | None  # where that run's settings say that data lie


def convert_policy(
    model_path: str | Path,
    policy_path: str | Path,
    save_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer_path: str | Path | None = None,
    max_shard_size: str = "2GB",
    vocab: str = "checkpoint",
    pad_token: str | None = None,
) -> Converted:
    """Write a folder that transformers loads; save_path may be the one with policy.pt, which is only read.

    dtype: of every weight; None keeps each weight's dtype in the base. vocab: `checkpoint` keeps its rows of
    the embedding and adds the pad token (pad_token, else the run's config.yaml) to the tokenizer; `base` cuts
    back to the base's rows and keeps its tokenizer. Raises ValueError for what does not fit, OSError when
    writing fails; either way save_path stays as it was.
    """
    file, folder = find_policy(policy_path), Path(save_path).expanduser().resolve()
    _check_vocabulary(vocab, pad_token)
    check_shard_size(max_shard_size)
    check_replaceable("save_path", folder, model_path)
    run = run_settings(file)
    given = tokenizer_path or run.tokenizer
    config, tokenizer = load_config(model_path), load_tokenizer(model_path, given)
    base_rows, base_pad = embedding_rows(meta_model(model_path)), special_id(config, "pad_token_id")
    structure, _ = open_model(model_path, file)
    if vocab == "base":
        _check_rows(embedding_rows(structure), base_rows)
    check_tokenizer(tokenizer, structure, file)
    most, dtypes = disk_dtypes(model_path, config) if dtype is None else (dtype, {})

    base = open_weights(model_path, structure) if has_weights(model_path) else None
    record = read_policy(file)
    model = model_from_policy(config, record.state, file)
    if vocab == "base":
        if embedding_rows(model) > base_rows:
            resize_vocabulary(model, base_rows)
        set_pad_token_id(model.config, base_pad)
        pad_id = None
    else:
        pad_id = _add_pad_token(model, tokenizer, base_rows, pad_token or run.pad_token)
    rows = embedding_rows(model)
    written = _config_of(model, config, most)
    origin = {"base": str(model_path), "policy": str(file), "step_idx": record.step_idx, "rows": rows}
    origin |= run.prompts  # evaluation writes prompts as the run did
    with new_model_files("save_path", folder, model_path, origin) as staged:
        write_weights(model, staged, most, dtypes, max_shard_size, file, base)
        written.save_pretrained(staged)
        copy_small_files(given or model_path, TOKENIZER_FILES, staged)
        copy_small_files(model_path, ("generation_config.json", *PROCESSOR_FILES), staged)
        if pad_id is not None:
            tokenizer.save_pretrained(staged)
            _set_pad(staged / "generation_config.json", pad_id)
    return Converted(folder, most, rows, record.step_idx, run.datasets, run.data_dir)


def _check_vocabulary(vocab: str, pad_token: str | None) -> None:
    if vocab not in VOCABULARIES:
        raise ValueError(f"vocab={vocab}: choose one of {', '.join(VOCABULARIES)}")
    if vocab == "base" and pad_token is not None:
        raise ValueError(f"vocab=base keeps the base's tokenizer: drop pad_token={pad_token}, or vocab=base")


def _check_rows(rows: int, base_rows: int) -> None:
    """Raise ValueError for an embedding that cannot be cut back to the base's rows."""
    if rows < base_rows:
        raise ValueError(
            f"vocab=base: the checkpoint has {rows} embedding rows, fewer than the base's {base_rows};"
            " use vocab=checkpoint"
        )


def _add_pad_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base_rows: int, pad_token: str | None
) -> int | None:
    """Add the pad token to tokenizer and config; returns its id, None if there is no such token."""
    rows = embedding_rows(model)
    if pad_token is None:
        if rows > base_rows:
            logger.warning(
                "the checkpoint has %d embedding rows more than the base, with no token for them:"
                " name it with pad_token, or cut them off with vocab=base",
                rows - base_rows,
            )
        return None
    pad_id = add_pad_token(tokenizer, pad_token)
    if pad_id >= rows:
        raise ValueError(
            f"pad_token={pad_token} would be id {pad_id}, but the checkpoint has {rows} embedding rows: it"
            " was trained without this token or with another tokenizer; name the right pad_token or"
            " tokenizer_path, or use vocab=base"
        )
    set_pad_token_id(model.config, pad_id)
    return pad_id


def _config_of(model: PreTrainedModel, base: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedConfig:
    """The config to write: the model's, or the base's with towers whose text config the model's replaces."""
    config = model.config
    if type(config) is type(base):
        config.architectures = [type(model).__name__]
    else:
        config, text = base, base.get_text_config()
        text.vocab_size = model.config.vocab_size
        set_pad_token_id(config, special_id(model.config, "pad_token_id"))
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    return config


def _set_pad(file: Path, pad_id: int) -> None:
    """Name the pad token in a generation config, if there is one."""
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8")) | {"pad_token_id": pad_id}
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
