"""Examples laid end to end: each has the loss and gradient that it has alone, in every kind of attention."""

from __future__ import annotations

import contextlib
import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from hf_models import WIDE, new_model
from runs import MODEL, base, metrics, policy, same, stopped_after, train
from tolerance import assert_same, assert_same_training, chain
from transformers import AutoModelForCausalLM, AutoTokenizer

from lota.data.batches import IGNORED, Encoded, collate, next_tokens
from lota.data.packed import pack
from lota.models import packed
from lota.models.head import find_head
from lota.models.loading import enable_activation_checkpointing, turn_dropout_off
from lota.models.packed import pack_attention
from lota.train.losses import response_logps
from scripts.family_models import tiny_model

WINDOW = 5  # shorter than most examples below
WINDOWS = {"sliding_window": WINDOW, "num_key_value_heads": 2, "head_dim": 8}
# Families of tests/hf_models.py, and others with an attention that cannot be a plain causal one.
OTHERS = {
    "mistral": (transformers.MistralConfig, WINDOWS),
    "qwen2_windows": (
        transformers.Qwen2Config, {**WINDOWS, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "gemma2": (transformers.Gemma2Config, {**WINDOWS, "attn_logit_softcapping": 0.1}),
    "gpt_oss": (transformers.GptOssConfig, {**WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "opt": (transformers.OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}  # fmt: skip
# With the attention that they end up with: inside each example, or with a mask of the whole row.
CUT = (
    "llama",
    "gpt2",
    "qwen2",
    "mixtral",
    "gpt_neox",
    "mistral",
    "qwen2_windows",
    "gemma2",
    "gpt_oss",
    "opt",
)
WHOLE = ("gptj",)


def make(kind: str):
    """A model in training mode, without dropout, its attention logits large enough to tell tokens apart."""
    if kind in OTHERS:
        config, more = OTHERS[kind]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(**{**WIDE, "pad_token_id": 0, **more}))
    else:
        model = new_model(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    turn_dropout_off(model)
    return model.train()


def rows() -> list[Encoded]:
    """Short and longer than the window; also an example of one token, and without a prompt or a response."""
    generator = torch.Generator().manual_seed(3)
    # tokens, of them of the prompt
    sizes = [(9, 4), (2, 1), (14, 3), (6, 5), (1, 1), (11, 0), (7, 7)]
    return [Encoded(torch.randint(3, 64, (n,), generator=generator).tolist(), p) for n, p in sizes]


def logps_of(model, batch) -> torch.Tensor:
    return response_logps(model, batch, contextlib.nullcontext())[0]


def alone(model) -> list[torch.Tensor]:
    """Log-probability of each row's response by torch's own log-softmax, one forward pass per row."""
    found = []
    for row in rows():
        ids = torch.tensor([row.input_ids])
        scores = model(input_ids=ids).logits[0].log_softmax(-1)  # (tokens, vocabulary)
        places = range(max(row.prompt_length, 1), len(row))  # nothing predicts the first token
        found.append(sum((scores[t - 1, ids[0, t]] for t in places), torch.zeros(())))
    return found


def gradients(model, losses) -> dict[str, torch.Tensor]:
    weights = torch.linspace(0.5, 1.5, len(losses))  # another for each example: none can stand for another
    model.zero_grad()
    (torch.stack(list(losses)) * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_rows_end_to_end():
    batch = pack([Encoded([5, 6, 7, 2], 2), Encoded([8, 2], 1), Encoded([9], 0)])
    assert batch.input_ids.tolist() == [[5, 6, 7, 2, 8, 2, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0]]
    assert batch.targets.tolist() == [[IGNORED, 7, 2, IGNORED, 2, IGNORED, IGNORED]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7, 2, IGNORED, 2, 9]]
    assert (len(batch), batch.n_tokens) == (3, 7)
    assert batch.row_sums(torch.tensor([[1.0, 2, 4, 8, 16, 32, 64]])).tolist() == [15, 48, 64]
    moved = batch.to(torch.device("meta"))
    assert {t.device.type for t in (moved.position_ids, moved.targets, *moved.inputs.values())
            if torch.is_tensor(t)} == {"meta"}  # fmt: skip
    assert len(moved) == 3


@pytest.mark.parametrize("kind", [*CUT, *WHOLE])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_each_example_alone(kind, checkpointing):
    plain = make(kind)
    model = copy.deepcopy(plain)
    pack_attention(model.eval(), kind)
    assert (model.config._attn_implementation in packed.ATTENTION.values()) == (kind in CUT)
    model.train()
    if checkpointing:
        enable_activation_checkpointing(model)
    want, got = alone(plain), logps_of(model, pack(rows()))
    terms = chain(plain, tokens=50)
    assert_same(got, torch.stack(want), terms=terms)
    wanted, found = gradients(plain, want), gradients(model, got)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        if kind == "opt" and name.endswith("k_proj.bias"):  # softmax does not notice it: all is rounding
            continue
        assert_same(found[name], grad, terms=terms, name=name)
    # and in a batch of one example, with padding, and of the same model
    first = rows()[:1]
    assert_same(logps_of(model, pack(first)), torch.stack(want[:1]), terms=terms)
    assert_same(logps_of(model, collate(rows(), 0)), torch.stack(want), terms=terms)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [(kind, "attention") for kind in ("llama", "gpt2", "gpt_oss")]
    + [("gpt2", "positions"), ("llama", "targets")],
)
def test_faults_are_noticed(kind, fault, monkeypatch):
    """The comparison above fails if positions run on, examples see each other, or one predicts the next."""
    model = make(kind)
    want = torch.stack(alone(model))
    pack_attention(model.eval(), kind)
    batch = pack(rows())
    if fault == "attention":
        monkeypatch.setattr(packed, "pairwise", lambda bounds: [(bounds[0], bounds[-1])])
    elif fault == "positions":
        running_on = torch.arange(batch.n_tokens)[None]
        model.transformer.wpe.register_forward_pre_hook(lambda *_: (running_on,))
    else:
        monkeypatch.setattr(type(batch), "targets", next_tokens(batch.labels))
    with pytest.raises(AssertionError):
        assert_same(logps_of(model, batch), want, terms=chain(model, tokens=50))


def test_work_grows_with_the_examples_and_not_with_the_row(monkeypatch):
    model, lengths = make("llama"), []
    pack_attention(model.eval(), "llama")
    find_head(model)  # asks with a few tokens
    attend = packed.sdpa_attention_forward

    def watched(module, query, key, value, mask, **options):
        lengths.append((query.shape[2], key.shape[2]))
        assert mask is None
        return attend(module, query, key, value, mask, **options)

    monkeypatch.setattr(packed, "sdpa_attention_forward", watched)
    logps_of(model, pack(rows()))
    assert lengths == [(len(row), len(row)) for row in rows()] * 2  # two layers


def varlen_by_its_documentation(query, key, value, starts, starts_k, longest, longest_k, **options):
    """torch.nn.attention.varlen.varlen_attn: (tokens, heads, d) each, cut at `starts`, causal, scaled."""
    assert starts is starts_k and longest == longest_k and options["window_size"] == (-1, 0)
    assert starts.dtype == torch.int32 and longest == starts.diff().max()
    share = query.shape[1] // key.shape[1]
    assert options["enable_gqa"] == (share > 1)
    outputs = []
    for start, end in pairwise(starts.tolist()):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))  # (heads, n, d)
        k, v = (t.repeat_interleave(share, dim=0) for t in (k, v))
        scores = q @ k.transpose(1, 2) * options["scale"]
        later = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        outputs.append((scores.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_what_the_kernel_of_a_gpu_is_given(kind, monkeypatch):
    plain, calls = make(kind), []
    model = copy.deepcopy(plain)

    def kernel(*args, **options):
        calls.append(1)
        return varlen_by_its_documentation(*args, **options)

    monkeypatch.setattr(packed, "varlen_kernel", lambda: kernel)
    no_mask = lambda *args: all(own is None for own in args[4].masks)  # noqa: E731  # the rest asks for a GPU
    monkeypatch.setattr(packed, "_kernel_fits", no_mask)
    pack_attention(model.eval(), kind)
    want, calls[:] = alone(plain), []
    assert_same(logps_of(model, pack(rows())), torch.stack(want), terms=chain(plain, tokens=50))
    assert len(calls) == (0 if kind == "mistral" else 2)  # layers; windows are masks of their own


@pytest.mark.parametrize(
    "family", ["mamba", "rwkv", "recurrent_gemma", "bloom", "roformer", "mpt", "openai-gpt"]
)
def test_models_that_do_not_keep_examples_apart_are_refused(family):
    model = tiny_model(family)
    said = r"packing=true: here: \w+ .*\(an example depends on the one before it\); set packing=false"
    with pytest.raises(ValueError, match=said):
        pack_attention(model, "here")
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_models_without_position_ids_are_refused(monkeypatch):
    model = make("gpt2").eval()
    monkeypatch.setattr(packed, "ATTENTION", {})  # transformers' mask, which the position ids cut
    model.transformer.wpe.register_forward_pre_hook(lambda _, at: (torch.arange(at[0].shape[1])[None],))
    with pytest.raises(ValueError, match="its positions do not begin anew with each example"):
        pack_attention(model, "here")


def test_convolutions_over_tokens_are_refused():
    config = transformers.Lfm2Config(**WIDE, layer_types=["conv", "full_attention"], num_key_value_heads=2)
    with pytest.raises(ValueError, match="an example depends on the one before it"):
        pack_attention(AutoModelForCausalLM.from_config(config).eval(), "here")


# Runs

PACKED = "packing=true"


@pytest.fixture
def runs(mask, workplace):
    """One run padded, one packed, of the same settings: (trainer, state) of each."""

    def both(*overrides: str):
        found = []
        for name, how in ("padded", ()), ("packed", (PACKED,)):
            trainer, folder = train(f"exp_name={name}", "eps=1.0", *overrides, *how)
            found.append((trainer, policy(folder)))
        return found

    return both


def assert_same_runs(pair, steps: int) -> None:
    """Weights up to rounding, and every metric to 1e-5."""
    (padded, want), (one, got) = pair
    terms = chain(padded.model, tokens=200)
    assert_same_training(got, want, base().state_dict(), terms=terms, steps=steps)
    for before, after in zip(metrics(padded), metrics(one), strict=True):
        assert before.keys() == after.keys()
        unlike = {"tokens_per_second", "examples_per_second", "peak_memory_bytes"}
        if abs(before.get("rewards_train/margins", 1)) < 1e-6:  # a policy that is the reference yet: rounding
            unlike.add("rewards_train/accuracies")
        for key in before.keys() - unlike:
            assert after[key] == pytest.approx(before[key], rel=1e-5, abs=1e-5), key


MASKED = "mask_path=0.9_mask.pt"


@pytest.mark.parametrize(
    "how",
    [MASKED, f"{MASKED} gradient_accumulation_steps=4", f"{MASKED} activation_checkpointing=true",
     "group_by_length=true", "loss.average_log_prob=true", f"{MASKED} batch_size=1 n_examples=5"],
)  # fmt: skip
def test_training_and_evaluation_are_those_without_packing(runs, how):
    pair = runs(*how.split(), "do_first_eval=true", "eval_every=16")
    (padded, _), (one, _) = pair
    assert [e.prompt for e in one.data.train] == [e.prompt for e in padded.data.train]
    assert any("loss/eval" in row for row in metrics(one))
    assert_same_runs(pair, steps=5)


@pytest.mark.parametrize("reference", ["swap", "model", "precomputed"])
def test_preferences(runs, reference):
    pair = runs(
        "loss=dpo", "datasets=[pairs]", MASKED, f"model.reference={reference}", "eval_every=16",
        "gradient_accumulation_steps=2",
    )  # fmt: skip
    assert {"rewards_eval/margins", "logps_ref_train/chosen"} <= {
        key for row in metrics(pair[1][0]) for key in row
    }
    assert_same_runs(pair, steps=5)


def test_adapters(runs):
    pair = runs("adapter=lora", "lora_rank=4")
    assert_same_runs(pair, steps=5)


def test_the_mask_of_snip(runs):
    """The same gradients give the same mask, but for entries whose scores are equal up to rounding."""
    (padded, _), (one, _) = runs("snip=true", "snip_batches=2")
    a, b = padded.data.mask, one.data.mask
    assert a.n_kept == b.n_kept
    differ = sum((a.dense(name) != b.dense(name)).sum().item() for name in a.names)
    assert differ <= 0.001 * a.n_kept


def test_bf16_computes_packed(mask):
    trainer, folder = train(MASKED, PACKED, "model.fsdp_policy_mp=bfloat16", "lr=1e-3")
    plain, _ = train(MASKED, "exp_name=padded", "model.fsdp_policy_mp=bfloat16", "lr=1e-3")
    last, before = (metrics(t)[-1]["loss/train"] for t in (trainer, plain))
    assert last == pytest.approx(before, rel=0.02)
    assert not same(policy(folder), base().state_dict())


def test_completions_are_written_as_without_packing(runs):
    (padded, _), (one, _) = runs("sample_during_eval=true", "eval_every=16", "n_eval_model_samples=4", "lr=0")
    texts = [(t.config.run_dir / "samples.jsonl").read_text().splitlines() for t in (padded, one)]
    completions = [[json.loads(line)["completion"] for line in lines] for lines in texts]
    assert completions[0] == completions[1] and completions[0]


@pytest.mark.parametrize("how", [MASKED, f"{MASKED} loss=dpo datasets=[pairs]"])
def test_a_stopped_run_ends_with_the_bits_of_a_whole_one(mask, how):
    how = [*how.split(), PACKED, "momentum=0.5", "lr_scheduler=cosine", "gradient_accumulation_steps=2"]
    with stopped_after(2):
        train("exp_name=stopped", *how)
    _, folder = train("exp_name=stopped", *how)
    _, whole = train("exp_name=whole", *how)
    assert same(policy(folder), policy(whole))
    ours, theirs = (torch.load(f / "resume.pt", weights_only=True) for f in (folder, whole))
    torch.testing.assert_close(ours["optimizer"], theirs["optimizer"], rtol=0, atol=0)


def test_a_run_is_not_continued_with_the_other_layout(mask):
    with stopped_after(2):
        train(MASKED, PACKED)
    with pytest.raises(ValueError, match="packing: True -> False"):
        train(MASKED)


def test_a_model_that_cannot_be_packed_is_refused_before_the_first_step(workplace):
    folder = Path("recurrent")
    save_tiny_mamba(folder)
    with pytest.raises(ValueError, match=r"packing=true: recurrent: MambaForCausalLM .* set packing=false"):
        train(f"model.name_or_path={folder}", PACKED)


def save_tiny_mamba(folder: Path) -> None:

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    config = transformers.MambaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4, eos_token_id=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
