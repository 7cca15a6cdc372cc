"""Conversion: the folder computes what the trained model computed, or nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hf_models import CONFIGS, ROWS, logits, new_model, save_policy, word_tokenizer
from safetensors.torch import load_file, save_file
from tolerance import assert_same, chain
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import convert_policy_to_hf_resize as script
import lota.share.hf_folder
from lota.models.loading import load_model, load_tokenizer, resize_vocabulary
from lota.models.provenance import RunSettings, run_settings
from lota.share.convert import convert_policy
from lota.share.hf_weights import write_weights

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
END = "<|endoftext|>"  # transformers adds this one to any tokenizer that it finds beside a Qwen2 config


@pytest.fixture
def llama(tmp_path: Path):
    return make_pair("llama", tmp_path)


def make_pair(kind: str, folder: Path, dtype: torch.dtype = torch.float32):
    base = folder / "base"
    new_model(kind).to(dtype).save_pretrained(base)
    tokenizer = word_tokenizer(ROWS, eos_token=END, unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    generation = {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 3], "max_length": 77}
    (base / "generation_config.json").write_text(json.dumps(generation))
    tuned = new_model(kind, seed=1)
    epoch = folder / "run" / "epoch-1"
    epoch.mkdir(parents=True)
    save_policy(epoch / "policy.pt", tuned.state_dict())
    return base, tuned, epoch


def loaded(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def run_script(base: Path, policy: Path, save: Path, *options: str) -> None:
    arguments = {"--model_path": base, "--policy_path": policy, "--save_path": save}
    script.main([*(str(word) for pair in arguments.items() for word in pair), *options])


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_converted_folder_is_the_base_with_the_trained_weights(kind, tmp_path):
    base, tuned, epoch = make_pair(kind, tmp_path)
    policy = (epoch / "policy.pt").read_bytes()
    run_script(base, epoch / "policy.pt", epoch)
    assert torch.equal(logits(loaded(epoch)), logits(tuned))
    assert (epoch / "policy.pt").read_bytes() == policy
    assert not list(epoch.glob("*.tmp")) and not list(epoch.glob(".*"))
    names = [set(load_file(folder / "model.safetensors")) for folder in (base, epoch)]
    assert names[0] == names[1]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, epoch)]
    assert configs[0] == configs[1]  # dropout included, although training had none
    assert (epoch / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert GenerationConfig.from_pretrained(epoch).eos_token_id == [2, 3]
    before, after = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(epoch)
    assert after.chat_template == TEMPLATE == before.chat_template
    text = f"w1 w2 {END} w5 nonsense"
    assert after(text)["input_ids"] == before(text)["input_ids"]


def test_real_model(stories, tmp_path):
    model = load_model(stories)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=1e-3
            )
    policy = save_policy(tmp_path / "policy.pt", model.state_dict())
    convert_policy(stories, policy, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer("Once upon a time, there was a little girl", return_tensors="pt")
    found, expected = loaded(tmp_path / "out").state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert (
        inputs["input_ids"].tolist()
        == load_tokenizer(stories)(["Once upon a time, there was a little girl"])["input_ids"]
    )


def test_dtype_is_the_bases_unless_asked(tmp_path):
    base, tuned, epoch = make_pair("qwen2", tmp_path, torch.bfloat16)
    assert convert_policy(base, epoch, tmp_path / "a").dtype is torch.bfloat16
    expected = {name: value.bfloat16() for name, value in tuned.state_dict().items()}
    written = load_file(tmp_path / "a" / "model.safetensors")
    assert all(
        torch.equal(value, expected[name]) and value.dtype == torch.bfloat16
        for name, value in written.items()
    )
    assert loaded(tmp_path / "a", "auto").dtype is torch.bfloat16
    convert_policy(base, epoch, tmp_path / "b", dtype=torch.float32)
    assert torch.equal(logits(loaded(tmp_path / "b", "auto")), logits(tuned))


def test_each_weight_keeps_its_own_dtype(llama, tmp_path):
    """A base with float32 norms and fp8 beside bfloat16 matrices gets a folder of the same make."""
    base, tuned, epoch = llama
    state = {k: v if "norm" in k else v.bfloat16() for k, v in load_file(base / "model.safetensors").items()}
    fp8 = "model.layers.0.mlp.up_proj.weight"
    state[fp8] = state[fp8].to(torch.float8_e4m3fn)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    convert_policy(base, epoch, epoch)
    written = load_file(epoch / "model.safetensors")
    assert {k: v.dtype for k, v in written.items()} == {k: v.dtype for k, v in state.items()}
    assert torch.equal(written["model.norm.weight"], tuned.state_dict()["model.norm.weight"])
    expected = tuned.state_dict()[fp8].to(torch.float8_e4m3fn)
    assert torch.equal(written[fp8].view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint16, torch.bool])
def test_a_buffer_of_any_dtype_is_copied(dtype, tmp_path):
    model = new_model("llama")
    model.register_buffer("flags", torch.tensor([0, 1, 1]).to(dtype))
    write_weights(model, tmp_path, torch.bfloat16, {}, "1GB")
    written = load_file(tmp_path / "model.safetensors")
    assert written["flags"].dtype == dtype and torch.equal(written["flags"], model.flags)
    assert written["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", CONFIGS)
def test_shards(kind, tmp_path):
    base, tuned, epoch = make_pair(kind, tmp_path)
    convert_policy(base, epoch, epoch, max_shard_size="20KB")
    shards = list(epoch.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (epoch / "model.safetensors").exists()
    assert torch.equal(logits(loaded(epoch)), logits(tuned))
    convert_policy(base, epoch, epoch)  # again, in one file: no shard of before may stay
    assert not list(epoch.glob("model-*")) and not (epoch / "model.safetensors.index.json").exists()
    assert torch.equal(logits(loaded(epoch)), logits(tuned))


def grown_pair(kind: str, tmp_path: Path, pad_token: str | None):
    """As make_pair, the vocabulary grown by <PAD>, its run's config.yaml naming pad_token."""
    base, tuned, epoch = make_pair(kind, tmp_path)
    resize_vocabulary(tuned, ROWS + 1)
    save_policy(epoch / "policy.pt", tuned.state_dict())
    config = {"model": {"pad_token": pad_token, "tokenizer_name_or_path": None}, "datasets": ["arc", "gsm8k"]}
    (epoch.parent / "config.yaml").write_text(yaml.safe_dump(config))
    return base, tuned, epoch


@pytest.mark.parametrize("kind", sorted(CONFIGS))
@pytest.mark.parametrize("how", ["run", "option"])
def test_grown_vocabulary_is_kept(kind, how, tmp_path):
    base, tuned, epoch = grown_pair(kind, tmp_path, "<PAD>" if how == "run" else None)
    done = convert_policy(base, epoch, epoch, pad_token="<PAD>" if how == "option" else None)
    model, tokenizer = loaded(epoch), AutoTokenizer.from_pretrained(epoch)
    assert done.rows == ROWS + 1 == model.config.vocab_size == len(tokenizer)
    assert torch.equal(logits(model), logits(tuned))
    assert tokenizer.pad_token == "<PAD>" and tokenizer.pad_token_id == ROWS
    assert model.config.pad_token_id == ROWS == GenerationConfig.from_pretrained(epoch).pad_token_id
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("<PAD>")["input_ids"] == [ROWS]
    assert tokenizer("w1 w2")["input_ids"] == AutoTokenizer.from_pretrained(base)("w1 w2")["input_ids"]


def test_grown_vocabulary_without_a_name_warns(tmp_path, caplog):
    base, tuned, epoch = grown_pair("llama", tmp_path, None)
    convert_policy(base, epoch, epoch)
    assert "pad_token" in caplog.text
    assert torch.equal(logits(loaded(epoch)), logits(tuned))
    assert len(AutoTokenizer.from_pretrained(epoch)) == ROWS


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_grown_vocabulary_is_cut_on_request(kind, tmp_path):
    base, tuned, epoch = grown_pair(kind, tmp_path, "<PAD>")
    convert_policy(base, epoch, epoch, vocab="base")
    model = loaded(epoch)
    assert model.config.vocab_size == ROWS == len(AutoTokenizer.from_pretrained(epoch))
    assert_same(logits(model), logits(tuned)[..., :ROWS], terms=chain(model))  # the head's product is smaller
    expected = {k: v[:ROWS] if v.shape[0] == ROWS + 1 else v for k, v in tuned.state_dict().items()}
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert json.loads((epoch / "config.json").read_text()) == json.loads((base / "config.json").read_text())


def test_smaller_vocabulary(llama):
    base, tuned, epoch = llama
    resize_vocabulary(tuned, ROWS - 8)
    save_policy(epoch / "policy.pt", tuned.state_dict())
    refusal = rf"error: --vocab base: the checkpoint has {ROWS - 8} embedding rows.*; use --vocab checkpoint"
    with pytest.raises(SystemExit, match=refusal):
        run_script(base, epoch, epoch, "--vocab", "base")
    with pytest.raises(
        SystemExit, match=rf"has 8 tokens more than the {ROWS - 8} embedding rows of .*policy"
    ):
        run_script(base, epoch, epoch)
    word_tokenizer(ROWS - 8, eos_token="</s>", unk_token="<unk>").save_pretrained(base)
    convert_policy(base, epoch, epoch)
    assert torch.equal(logits(loaded(epoch)), logits(tuned))


def test_full_disk_leaves_no_new_folder(llama, full_disk):
    base, _, epoch = llama
    with pytest.raises(SystemExit, match="File too large"):
        run_script(base, epoch, epoch.parent / "new")
    assert not (epoch.parent / "new").exists()


def test_full_disk_leaves_the_earlier_conversion(llama, request):
    base, _, epoch = llama
    run_script(base, epoch, epoch)
    before = everything(epoch)
    request.getfixturevalue("full_disk")
    with pytest.raises(SystemExit, match="File too large"):
        run_script(base, epoch, epoch, "--dtype", "float32")
    assert everything(epoch) == before


def test_kill_while_files_move_is_repaired_by_the_next_conversion(llama, monkeypatch):
    base, tuned, epoch = llama
    convert_policy(base, epoch, epoch, max_shard_size="20KB")
    moved = []
    replace = lota.share.hf_folder.os.replace

    def killed(source, target):
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(lota.share.hf_folder.os, "replace", killed)
    monkeypatch.setattr(
        lota.share.hf_folder, "remove", lambda path: None if path.suffix == ".tmp" else remove(path)
    )
    remove = lota.storage.remove
    with pytest.raises(KeyboardInterrupt):
        convert_policy(base, epoch, epoch)
    assert not (epoch / "config.json").exists()  # no loader takes the folder for a model
    monkeypatch.undo()
    convert_policy(base, epoch, epoch)
    assert torch.equal(logits(loaded(epoch)), logits(tuned))
    assert not list(epoch.glob("model-*"))


def test_a_record_removes_nothing_but_what_a_conversion_writes(llama):
    base, _, epoch = llama
    convert_policy(base, epoch, epoch)
    for name in ("notes.txt", "model-old.safetensors"):
        (epoch / name).write_text("mine")
    record = json.loads((epoch / "conversion.json").read_text())
    record["files"] += ["..", "../config.yaml", "notes.txt", "policy.pt", "model-old.safetensors"]
    (epoch / "conversion.json").write_text(json.dumps(record))
    convert_policy(base, epoch, epoch)
    assert (epoch / "notes.txt").exists() and (epoch / "policy.pt").exists()
    assert not (epoch / "model-old.safetensors").exists()
    before = everything(epoch.parent)
    for text in ("[]", "{", '{"files": 3}'):
        (epoch / "conversion.json").write_text(text)
        with pytest.raises(ValueError, match=r"conversion\.json is not the record"):
            convert_policy(base, epoch, epoch)
        assert everything(epoch.parent).keys() == before.keys()


def test_what_cannot_be_done_is_refused_before_anything_is_written(llama, tmp_path):
    base, _, epoch = llama
    other = tmp_path / "other"
    shutil.copytree(base, other)
    before = everything(tmp_path)
    cases = {
        "is the base itself": (base, epoch, base, {}),
        "that no conversion wrote": (base, epoch, other, {}),
        "is a file: name a folder": (base, epoch, epoch / "policy.pt", {}),
        "no policy file at": (base, tmp_path / "none.pt", epoch, {}),
        "none does not exist: give a Hugging Face folder": (
            tmp_path / "none",
            epoch,
            epoch,
            {"tokenizer_path": base},
        ),
        "no tokenizer at": (base, epoch, epoch, {"tokenizer_path": epoch}),
        "vocab=all: choose one of": (base, epoch, epoch, {"vocab": "all"}),
        "drop pad_token=<PAD>": (base, epoch, epoch, {"vocab": "base", "pad_token": "<PAD>"}),
        "max_shard_size=big": (base, epoch, epoch, {"max_shard_size": "big"}),
        "would be id 64, but the checkpoint has 64": (base, epoch, epoch, {"pad_token": "<PAD>"}),
    }
    for message, (model_path, policy, save_path, options) in cases.items():
        with pytest.raises(ValueError, match=message):
            convert_policy(model_path, policy, save_path, **options)
    assert everything(tmp_path) == before


def test_policy_of_another_model_is_refused(llama, tmp_path):
    base, _, _ = llama
    policy = save_policy(tmp_path / "policy.pt", new_model("gpt_neox").state_dict())
    with pytest.raises(SystemExit, match=r"(?s)does not belong to.*missing there: .*only there: "):
        run_script(base, policy, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_next_command_is_printed(tmp_path, capsys):
    base, _, epoch = grown_pair("llama", tmp_path, "<PAD>")
    run_script(base, epoch / "policy.pt", epoch)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"wrote {epoch} (float32, {ROWS + 1} embedding rows, step 7)"
    assert lines[1] == f"next: python eval_model_all.py --model {epoch} --datasets arc,gsm8k"
    settings = yaml.safe_load((epoch.parent / "config.yaml").read_text()) | {"data_dir": "/my data"}
    (epoch.parent / "config.yaml").write_text(yaml.safe_dump(settings))
    run_script(base, epoch / "policy.pt", epoch)
    assert capsys.readouterr().out.splitlines()[1].endswith("gsm8k --data_dir '/my data'")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no settings of a run"),
        ("- 1", "holds no settings of a run"),
        ("model: 3", "holds no settings of a run"),
        ("a: [", "cannot be read"),
        ("\0", "cannot be read"),
        ("model: {}\ndatasets: gsm8k", "datasets='gsm8k' should be a list"),
        ("model: {pad_token: 5}", "model.pad_token=5 should be text or null"),
        ("model: {}\nmax_length: long", "max_length='long' should be a whole number"),
    ],
)
def test_a_config_that_is_no_runs_is_told_and_not_used(tmp_path, caplog, text, reason):
    (tmp_path / "config.yaml").write_text(text)
    assert run_settings(tmp_path) == RunSettings()
    (said,) = caplog.messages
    assert said.startswith(str(tmp_path / "config.yaml")) and reason in said and said.endswith("; not used")


def test_nan_and_values_out_of_range_are_refused(llama):
    base, tuned, epoch = llama
    name = "model.layers.0.mlp.up_proj.weight"
    for value, options, message in (
        (float("nan"), [], "holds NaN or infinity"),
        (1e6, ["--dtype", "float16"], r"has values that torch\.float16 cannot hold; choose another dtype"),
    ):
        state = {n: v.clone() for n, v in tuned.state_dict().items()}
        state[name][1, 1] = value
        save_policy(epoch / "policy.pt", state)
        with pytest.raises(SystemExit, match=rf"policy\.pt: {name} {message}"):
            run_script(base, epoch, epoch.parent / "new", *options)
        assert not (epoch.parent / "new").exists()


def test_a_policy_of_integers_is_refused(llama):
    base, tuned, epoch = llama
    save_policy(epoch / "policy.pt", {name: value.int() for name, value in tuned.state_dict().items()})
    with pytest.raises(SystemExit, match=r"policy\.pt is quantized \(.* is torch\.int32\)"):
        run_script(base, epoch, epoch)


def test_a_hugging_face_folder_needs_no_conversion(stories, tmp_path):
    with pytest.raises(ValueError, match="is a Hugging Face folder already, with nothing to convert"):
        convert_policy(stories, stories, tmp_path / "converted")
