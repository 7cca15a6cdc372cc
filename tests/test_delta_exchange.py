"""Deltas as files of other tools: safetensors and peft alone, without lota, make the tuned model of them."""

from __future__ import annotations

import json
import shutil

import hf_models
import pytest
import torch
from delta_models import bits, change, delta_pair, save_model, tensors
from peft import LoraConfig, PeftModel, PromptTuningConfig, ShiraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import random_mask
from transformers import AutoModelForCausalLM

from lota.delta import Delta, apply, extract
from lota.masks import Mask
from lota.share.delta.cli import main
from lota.share.delta.indices import export_indices, import_indices
from lota.share.delta.peft_adapter import export_peft, import_peft

# peft's own
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]


def masked_pair(folder, dtype=torch.bfloat16, density=None):
    """(base, tuned, delta) that differ in weights of linear layers only."""
    model = save_model(folder / "base", dtype=dtype)
    mask = random_mask(model)
    if density is not None:
        generator = torch.Generator().manual_seed(3)
        kept = {
            n: torch.rand(p.shape, generator=generator) < density
            for n, p in model.named_parameters()
            if "proj" in n
        }
        mask = Mask.from_dense(kept)
    change(model, mask=mask).save_pretrained(folder / "tuned")
    extract(folder / "base", folder / "tuned", folder / "d.safetensors")
    return folder / "base", folder / "tuned", folder / "d.safetensors"


# Indices


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_alone_makes_the_tuned_files(tmp_path, kind, dtype):
    base, tuned, delta = delta_pair(tmp_path, kind, dtype)
    told = export_indices(base, delta, tmp_path / "d.indices.safetensors")
    patch, before, after = load_file(tmp_path / "d.indices.safetensors"), tensors(base), tensors(tuned)
    names = {name.rpartition(".")[0] for name in patch}
    assert len(patch) == 2 * len(names) == 2 * told["tensors"]
    for name in names:
        indices, values = patch[f"{name}.indices"], patch[f"{name}.values"]
        assert indices.dtype == torch.int32 and values.dtype == dtype and bool((indices.diff() > 0).all())
        before[name].view(-1)[indices.long()] = values
    assert before.keys() == after.keys() and all(torch.equal(bits(before[n]), bits(after[n])) for n in after)
    assert (
        sum(len(patch[f"{name}.indices"]) for name in names) == told["entries"] == Delta.open(delta).n_changed
    )
    with safe_open(tmp_path / "d.indices.safetensors", "pt") as file:
        meta = file.metadata()
    assert {key: meta[key] for key in ("base_hash", "tuned_hash")} == {
        key: Delta.open(delta).meta[key] for key in ("base_hash", "tuned_hash")
    }


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_indices_come_back_as_the_same_delta(tmp_path, kind):
    base, _, delta = delta_pair(tmp_path, kind)
    export_indices(base, delta, tmp_path / "i.safetensors")
    import_indices(base, tmp_path / "i.safetensors", tmp_path / "again.safetensors")
    one, other = Delta.open(delta), Delta.open(tmp_path / "again.safetensors")
    assert one.meta["tuned_hash"] == other.meta["tuned_hash"] and one.names == other.names
    assert all(
        torch.equal(a, b) for n in one.names for a, b in zip(one.changes(n), other.changes(n), strict=True)
    )


def test_files_of_strangers_are_refused(tmp_path):
    base, _, delta = delta_pair(tmp_path)
    export_indices(base, delta, tmp_path / "i.safetensors")
    whole = load_file(tmp_path / "i.safetensors")
    with safe_open(tmp_path / "i.safetensors", "pt") as file:
        meta = file.metadata()
    name = next(iter(whole)).rpartition(".")[0]
    indices, values = f"{name}.indices", f"{name}.values"
    moved = whole[values] + 1
    twice = whole[indices].clone()
    twice[1] = twice[0]
    for changes, message in (
        ({indices: None}, "is no file of indices"),
        ({indices: whole[indices][:-1]}, "has indices"),
        ({indices: whole[indices].float()}, "indices are int32 or int64"),
        ({indices: whole[indices] + 10**6}, "outside of its"),
        ({indices: -whole[indices] - 1}, "outside of its"),
        ({indices: twice}, "an index twice"),
        ({values: whole[values].half()}, "has it as torch.bfloat16"),
        ({values: torch.full_like(whole[values], torch.nan)}, "NaN"),
        ({values: moved}, "does not give the model that it names"),
        ({"x.indices": whole[indices].clone(), "x.values": moved}, "changes x, which .* does not have"),
    ):
        state = {key: value for key, value in {**whole, **changes}.items() if value is not None}
        save_file(state, tmp_path / "bad.safetensors", meta)
        before = delta.read_bytes()
        with pytest.raises(ValueError, match=message):
            import_indices(base, tmp_path / "bad.safetensors", delta)
        assert delta.read_bytes() == before
    save_file(whole, tmp_path / "other.safetensors", {**meta, "base_hash": "0" * 64})
    with pytest.raises(ValueError, match="was not made of"):
        import_indices(base, tmp_path / "other.safetensors", tmp_path / "x.safetensors")
    save_file({**whole, values: moved}, tmp_path / "plain.safetensors")  # nothing to compare with
    import_indices(base, tmp_path / "plain.safetensors", tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no file of indices: name a new file"):
        export_indices(base, delta, base / "model.safetensors")
    with pytest.raises(ValueError, match="is not the base"):
        export_indices(tmp_path / "tuned", delta, tmp_path / "y.safetensors")


# PEFT


def load(folder, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.02, None])
def test_peft_alone_makes_the_tuned_model(tmp_path, dtype, density):
    base, tuned, delta = masked_pair(tmp_path, dtype, density)
    told = export_peft(base, delta, tmp_path / "adapter")
    goal = dict(load(tuned, dtype).named_parameters())
    for merged_in, key in ((dtype, "differing"), (torch.float32, "differing_in_float32")):
        model = PeftModel.from_pretrained(load(base, merged_in), tmp_path / "adapter").merge_and_unload()
        wrong = {n: int((bits(p.to(dtype)) != bits(goal[n])).any()) for n, p in model.named_parameters()}
        entries = sum(int((p.to(dtype) != goal[n]).sum()) for n, p in model.named_parameters())
        assert entries == told[key] and (told[key] or not any(wrong.values()))
        assert told[key] <= 0.001 * told["entries"]
    changed = Delta.open(delta)
    assert told["entries"] == changed.n_changed and told["tensors"] == len(changed.names)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    sizes = [len(value) for name, value in stored.items() if name.endswith("values")]
    assert sum(sizes) == told["entries"] + told["padding"]
    # no sparsity that holds the fullest layer takes less
    density = max(changed.changed(name) / changed.parameters[name].numel for name in changed.names)
    assert sum(sizes) <= sum(density * changed.parameters[name].numel + 1 for name in changed.names)


def test_padding_leaves_negative_zeros(tmp_path):
    model = save_model(tmp_path / "base")
    for name, p in model.named_parameters():
        if "_proj" in name:
            p.data.view(-1)[0] = -0.0
    model.save_pretrained(tmp_path / "base")
    for i, (name, p) in enumerate(model.named_parameters()):
        if "_proj" in name:
            p.data.view(-1)[5 : 8 + 2 * i] *= 1.5
    model.save_pretrained(tmp_path / "tuned")
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "d.safetensors")
    told = export_peft(tmp_path / "base", tmp_path / "d.safetensors", tmp_path / "adapter")
    assert told["padding"] > 0 and told["differing"] == 0
    merged = PeftModel.from_pretrained(load(tmp_path / "base", torch.bfloat16), tmp_path / "adapter")
    found = merged.merge_and_unload().state_dict()
    goal = load(tmp_path / "tuned", torch.bfloat16).state_dict()
    assert all(torch.equal(bits(found[name]), bits(goal[name])) for name in goal)
    with pytest.raises(ValueError, match=rf"uneven=refuse.*{told['padding']:,} entries of padding"):
        export_peft(tmp_path / "base", tmp_path / "d.safetensors", tmp_path / "b", uneven="refuse")
    assert not (tmp_path / "b").exists()


def test_what_no_adapter_can_hold_is_refused(tmp_path):
    base, _, delta = delta_pair(tmp_path)  # embeddings and norms changed too
    with pytest.raises(ValueError, match=r"embed_tokens.weight, .* changed; .*use the format indices"):
        export_peft(base, delta, tmp_path / "adapter")
    extract(base, base, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="nothing changed"):
        export_peft(base, tmp_path / "none.safetensors", tmp_path / "adapter")
    with pytest.raises(ValueError, match="exists and is not empty"):
        export_peft(base, delta, base)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("kind", ["lora", "shira", "supertuning"])
def test_an_adapter_becomes_a_delta(tmp_path, kind):
    base, _, delta = masked_pair(tmp_path)
    if kind == "supertuning":
        export_peft(base, delta, tmp_path / "adapter")
    else:
        targets = ["q_proj", "down_proj"]
        config = (
            LoraConfig(r=2, target_modules=targets)
            if kind == "lora"
            else ShiraConfig(r=2, target_modules=targets)
        )
        torch.manual_seed(0)
        adapted = get_peft_model(load(base, torch.bfloat16), config)
        for name, p in adapted.named_parameters():
            if "lora_" in name or "shira" in name:
                p.data += 0.05 * torch.randn(p.shape)
        adapted.save_pretrained(tmp_path / "adapter")
    import_peft(base, tmp_path / "adapter", tmp_path / "made.safetensors")
    apply(base, tmp_path / "made.safetensors", tmp_path / "out")
    merged = PeftModel.from_pretrained(load(base, torch.bfloat16), tmp_path / "adapter").merge_and_unload()
    found = load(tmp_path / "out", torch.bfloat16).state_dict()
    assert Delta.open(tmp_path / "made.safetensors").n_changed > 0
    assert all(torch.equal(bits(found[name]), bits(value)) for name, value in merged.state_dict().items())
    if kind == "supertuning":
        assert (
            Delta.open(tmp_path / "made.safetensors").meta["tuned_hash"]
            == Delta.open(delta).meta["tuned_hash"]
        )


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    base, _, delta = masked_pair(tmp_path)
    with pytest.raises(ValueError, match="is no PEFT adapter"):
        import_peft(base, tmp_path, tmp_path / "x.safetensors")
    export_peft(base, delta, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "sparsity": 0.5}))
    with pytest.raises(ValueError, match="cannot be merged"):
        import_peft(base, tmp_path / "adapter", tmp_path / "x.safetensors")
    for more, message in (
        ({"r": 10**9}, "rank 1000000000 would take far more memory"),
        ({"rank_pattern": {"q_proj": 10**7}}, "rank 10000000 would take far more memory"),
        ({"r": "8"}, "its ranks are"),
        ({"target_modules": "(.+)+x"}, r"pattern '\(\.\+\)\+x' could take forever"),
        ({"target_modules": ".*" * 20}, "could take forever"),
        ({"rank_pattern": {"(a+)+b": 1}}, "could take forever"),
        ({"rank_pattern": [1]}, "has no attribute 'values'"),
    ):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, **more}))
        with pytest.raises(ValueError, match=rf"adapter_config\.json is not used: .*{message}"):
            import_peft(base, tmp_path / "adapter", tmp_path / "x.safetensors")
    wider = hf_models.new_config("llama", hidden_size=64, intermediate_size=96)
    hf_models.AutoModelForCausalLM.from_config(wider).bfloat16().save_pretrained(tmp_path / "wider")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be merged"):
        import_peft(tmp_path / "wider", tmp_path / "adapter", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_an_adapter_without_weights_to_merge_is_refused(tmp_path):
    base = masked_pair(tmp_path)[0]
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(load(base, torch.bfloat16), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter cannot be merged into .*: .*merge_and_unload"):
        import_peft(base, tmp_path / "adapter", tmp_path / "x.safetensors")


def test_the_command_line(tmp_path, capsys):
    base, _, delta = masked_pair(tmp_path)
    for form, out in (("indices", "i.safetensors"), ("peft", "adapter")):
        line = f"export --format {form} --base {base} --delta {delta} --out {tmp_path / out}"
        assert main(line.split()) == 0
        assert "wrote" in capsys.readouterr().out
        again = f"import --format {form} --base {base} --source {tmp_path / out}"
        again += f" --out {tmp_path / form}.safetensors"
        assert main(again.split()) == 0
        assert f"{Delta.open(delta).n_changed:,} of" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "adapter")
    line = f"export --format peft --uneven refuse --base {base} --delta {delta} --out {tmp_path / 'adapter'}"
    assert main(line.split()) == 1 and "--uneven refuse" in capsys.readouterr().err


def test_a_delta_that_makes_nan_is_not_handed_on(tmp_path, monkeypatch):
    base, delta = masked_pair(tmp_path)[::2]
    plain = Delta.tuned

    def broken(self, name, value):
        result = plain(self, name, value)
        result.view(-1)[self.positions(name)[:1]] = torch.nan
        return result

    monkeypatch.setattr(Delta, "tuned", broken)
    with pytest.raises(ValueError, match=r"d\.safetensors: .* holds NaN or infinity"):
        export_indices(base, delta, tmp_path / "i.safetensors")
    assert not (tmp_path / "i.safetensors").exists()
