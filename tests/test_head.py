"""Log-probabilities from hidden states and a head: against cross_entropy in fp64, and in models."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from hf_models import new_config
from tolerance import assert_same, chain
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GraniteConfig

import lota
from lota.data.batches import IGNORED
from lota.masks import Mask
from lota.models import head as heads
from lota.models import head_logps
from lota.models.head import find_head, logps_of_logits, token_logps
from lota.models.head_logps import After, HeadLogProbs
from scripts.family_models import tiny_model

TOKENS, WIDTH, WORDS = 9, 6, 23


def operands(dtype: torch.dtype = torch.float64, bias: bool = True) -> list[Tensor | None]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, WIDTH), torch.randn(WORDS, WIDTH)
    given = [hidden, weight, torch.randn(WORDS) if bias else None]
    return [None if x is None else x.to(dtype).requires_grad_() for x in given]


TARGETS = torch.tensor([0, 22, 5, 5, 7, 8, 15, 16, 1])
UPSTREAM = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, 1.5, -0.25, 1.0, 2.0], dtype=torch.float64)


def exact(hidden: Tensor, weight: Tensor, bias: Tensor | None, after: After) -> Tensor:
    """By cross_entropy in fp64."""
    x = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double()) * after.scale
    logits = x if after.cap is None else after.cap * torch.tanh(x / after.cap)
    return -F.cross_entropy(logits, TARGETS, reduction="none")


def fused(hidden, weight, bias, after=After(), narrow=None, keep=True) -> Tensor:  # noqa: B008
    return HeadLogProbs.apply(hidden, weight, bias, TARGETS, after, narrow or weight.dtype, keep)


def gradients(logps: Tensor, wanted: list[Tensor | None]) -> list[Tensor]:
    return list(torch.autograd.grad(logps, [x for x in wanted if x is not None and x.requires_grad], UPSTREAM.to(logps.dtype)))  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("after", [After(), After(0.0625), After(1.0, 3.0), After(0.4, 2.0)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("chunk", [1, 5 * TOKENS, 23 * TOKENS, 1 << 24])  # words at a time: 1, 5, all, all
def test_values_and_gradients_are_those_of_cross_entropy(monkeypatch, after, bias, trains, chunk):
    monkeypatch.setattr(head_logps, "CHUNK_ENTRIES", chunk)
    given = operands(bias=bias)
    for x in given[1:]:
        if x is not None:
            x.requires_grad_(trains)
    got, want = fused(*given, after), exact(*given, after)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(got, given), gradients(want, given), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_the_gradients_that_are_asked_for(trained):
    given = operands()
    for name, x in zip(["hidden", "weight", "bias"], given, strict=True):
        x.requires_grad_(name == trained)
    (ours,), (theirs,) = (gradients(logps, given) for logps in (fused(*given), exact(*given, After())))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trains", [True, False])
def test_bf16_operands_are_multiplied_and_summed_in_fp32(trains):
    """The log-probabilities have no rounding of bf16 but that of their operands; each gradient is rounded
    once or, where the gradient that arrives is multiplied in later, twice.
    """
    given = operands(torch.bfloat16)
    for x in given[1:]:
        x.requires_grad_(trains)
    got, want = fused(*given), exact(*given, After())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(got, given), gradients(want, given), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2 * 2**-8, atol=1e-6)


def test_a_token_that_is_nearly_certain_has_an_exact_gradient():
    """1 - p is 3e-7 here: taken as a difference of numbers near 1 it would be rounding, in fp32 too."""
    hidden = torch.full((TOKENS, 1), 15.0, requires_grad=True)
    weight = torch.zeros(WORDS, 1)
    weight[TARGETS] = 1.0
    weight[TARGETS[1:]] = 0.0
    got = fused(hidden, weight, None)
    want = exact(hidden, weight, None, After())
    (ours,), (theirs,) = ((torch.autograd.grad(x[0], hidden)) for x in (got, want))
    assert 0 < theirs[0] < 1e-5
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)


def test_autocast_rounds_the_operands():
    given = operands(torch.float32)
    layer = nn.Linear(WIDTH, WORDS)
    layer.weight, layer.bias = nn.Parameter(given[1].detach()), nn.Parameter(given[2].detach())
    with torch.autocast("cpu", torch.bfloat16):
        got = heads.Head(layer, After()).logps(given[0], TARGETS)
        ours = gradients(got, [given[0], layer.weight, layer.bias])
    rounded = [x.detach().bfloat16().requires_grad_() for x in given]
    want = exact(*rounded, After())
    assert got.dtype == torch.float32 and all(x.dtype == torch.float32 for x in ours)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours, gradients(want, rounded), strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=2**-8, atol=1e-5)


def test_second_derivatives_are_refused():
    given = operands()
    with pytest.raises(RuntimeError, match="have no second derivative"):
        torch.autograd.grad(fused(*given).sum(), given[0], create_graph=True)


# In models


def batch_of(words: int, rows: int = 3, length: int = 8) -> tuple[dict, Tensor]:
    """(inputs, targets); a prompt, padding and the last token of each row do not count."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, words, (rows, length), generator=generator)
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:]
    targets[0, :5] = IGNORED
    mask = torch.ones_like(ids)
    mask[1, 5:], targets[1, 4:] = 0, IGNORED
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}, targets


def by_logits(model, inputs: dict, targets: Tensor) -> Tensor:
    """Sum over each row, from all logits in fp64."""
    logits = model(**inputs).logits.double()
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return -nats.view(targets.shape).sum(1)


def model_of(kind: str) -> nn.Module:
    """A small model: of tests/tiny.py, or of a family."""
    return tiny.make(kind) if kind in tiny.ARCHITECTURES else tiny_model(kind)


AFTER = {
    "llama": After(), "qwen2": After(), "gpt2": After(), "gpt_neox": After(), "mixtral": After(),
    "gemma2": After(1.0, 30.0), "cohere": After(0.0625), "granite": After(), "nanochat": After(1.0, 15.0),
    "gptj": After(),  # its head has a bias
}  # fmt: skip


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", AFTER)
def test_models_give_what_their_logits_say(kind, frozen):
    model, other = model_of(kind), model_of(kind)
    for m in (model, other):
        m.get_output_embeddings().requires_grad_(not frozen)
    head = find_head(model)
    assert head is not None and head.after == AFTER[kind]
    inputs, targets = batch_of(min(model.config.vocab_size, 60))
    got, want = token_logps(model, inputs, targets), by_logits(other, inputs, targets)
    assert got.dtype == torch.float32 and got.shape == targets.shape
    assert (got == 0).tolist() == (targets == IGNORED).tolist()
    assert_same(got.sum(1).double(), want, terms=chain(model), dtype=torch.float32)
    weights = torch.tensor([1.0, -0.5, 2.0])
    (got.sum(1) * weights).sum().backward()
    (want * weights).sum().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert_same(p.grad, q.grad, terms=chain(model, targets.numel()), name=name)


def test_scales_other_than_powers_of_two_are_found():
    config = new_config("llama", vocab_size=tiny.VOCAB).to_dict()
    config = GraniteConfig(**{**config, "model_type": "granite"}, logits_scaling=6.0)
    model = AutoModelForCausalLM.from_config(config).eval()
    head = find_head(model)
    assert head is not None and head.after.scale == pytest.approx(1 / 6, rel=1e-7)
    for dtype in (torch.float32, torch.bfloat16):
        again = find_head(copy.deepcopy(model).to(dtype))
        assert again is not None and again.after == head.after


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_no_counted_token_gives_zero(kind):
    model = model_of(kind)
    inputs, targets = batch_of(60)
    logps = token_logps(model, inputs, torch.full_like(targets, IGNORED))
    logps.sum().backward()
    assert logps.abs().max() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


@contextlib.contextmanager
def largest():
    """`.entries`: of the largest tensor that an operation within the block has given."""
    found = SimpleNamespace(entries=0)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, Tensor):
                    found.entries = max(found.entries, x.numel())
            return out

    with Watch():
        yield found


@pytest.mark.parametrize("kind", ["frozen", "trained", "bf16", "evaluated"])
def test_logits_of_all_tokens_are_never_there(monkeypatch, kind):
    """With 200 of 400 tokens counted and 2,000 words, a tensor of 50 x 2,000 would be seen."""
    monkeypatch.setattr(head_logps, "CHUNK_ENTRIES", 16_000)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        new_config("llama", vocab_size=2_000, hidden_size=16, tie_word_embeddings=False)
    )
    model.get_output_embeddings().requires_grad_(kind == "trained")
    model.to(torch.bfloat16 if kind == "bf16" else torch.float32)
    inputs, targets = batch_of(2_000, rows=8, length=50)
    targets[:, :25] = IGNORED
    find_head(model)  # asks with 2 x 9 tokens

    def step(logps: Tensor) -> None:
        if logps.requires_grad:
            logps.sum().backward()

    with largest() as found, torch.set_grad_enabled(kind != "evaluated"):
        step(token_logps(model, inputs, targets))
    assert found.entries < 50 * 2_000
    with largest() as found, torch.set_grad_enabled(kind != "evaluated"):
        step(logps_of_logits(model(**inputs).logits, targets))
    assert found.entries >= 400 * 2_000


@pytest.mark.parametrize("density", [0.01, 0.3, "rows"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_head_under_a_mask_trains_its_kept_entries(kind, density):
    """The layer has a forward of its own then, which comes back, and the hook of its weight runs once."""
    model, other = model_of(kind), model_of(kind)
    name = next(n for n, p in model.named_parameters() if p is model.get_output_embeddings().weight)
    generator = torch.Generator().manual_seed(1)
    p = model.get_parameter(name)
    if density == "rows":
        kept = (torch.rand(len(p), 1, generator=generator) < 0.3).expand_as(p).contiguous()
    else:
        kept = torch.rand(p.shape, generator=generator) < density
    mask = Mask.from_dense({name: kept})
    optimizer = lota.MaskedSGD(model, mask, lr=0.1)
    lota.fuse_in_backward(optimizer)
    own = vars(model.get_output_embeddings()).get("forward")
    assert own is not None
    runs = []
    p.register_post_accumulate_grad_hook(lambda p: runs.append(1))
    inputs, targets = batch_of(60)
    start = p.detach().clone()
    token_logps(model, inputs, targets).sum().mul(-0.05).backward()
    optimizer.step()
    assert vars(model.get_output_embeddings())["forward"] is own and len(runs) == 1
    by_logits(other, inputs, targets).sum().mul(-0.05).backward()
    gradient = other.get_parameter(name).grad
    assert torch.equal(p[~kept], start[~kept])
    want = start - 0.1 * gradient.masked_fill(~kept, 0)
    assert_same(p - start, want - start, terms=chain(model, targets.numel()))
    assert (p != start)[kept].float().mean() > 0.5


def spoilt(model, how):
    """The model with something done to its logits that is no function of each."""
    forward = model.forward

    def other(*args, **given):
        output = forward(*args, **given)
        output.logits = how(output.logits)
        return output

    model.forward = other
    return model


OTHERS = {
    "a word is left out": lambda x: x.index_fill(-1, torch.tensor([3]), -1e4),
    "words are cut off": lambda x: x[..., :-1],
    "another function": lambda x: x.relu() - 0.1 * x.abs(),
    "tokens are mixed": lambda x: x + x.cumsum(1),
    "logits are shifted": lambda x: x + 1.0,
    "normalised": lambda x: x.log_softmax(-1) * 2,
}


@pytest.mark.parametrize("how", OTHERS)
def test_other_models_give_their_own_logits(how, caplog):
    caplog.set_level("INFO", logger="lota.models.head")
    model = spoilt(model_of("llama"), OTHERS[how])
    assert find_head(model) is None and find_head(model) is None
    assert [r.message for r in caplog.records] == [
        "LlamaForCausalLM: the logits of all tokens are computed at once"
    ]
    inputs, targets = batch_of(60)
    want = by_logits(model, inputs, targets)
    got = token_logps(model, inputs, targets)
    assert (got == 0).tolist() == (targets == IGNORED).tolist()
    torch.testing.assert_close(got.sum(1).double(), want, rtol=1e-5, atol=1e-5)


def test_a_head_that_becomes_another_is_asked_again():
    model = model_of("llama")
    first = find_head(model)
    assert first is not None and find_head(model).layer is first.layer
    model.resize_token_embeddings(tiny.VOCAB + 3)
    second = find_head(model)
    assert second is not None and second.layer is not first.layer
    assert second.layer is model.get_output_embeddings()
    model.lm_head = nn.Sequential(model.lm_head)
    assert find_head(model) is None
    inputs, targets = batch_of(60)
    assert_same(
        token_logps(model, inputs, targets).sum(1).double(),
        by_logits(model, inputs, targets),
        terms=chain(model),
        dtype=torch.float32,
    )


def test_lora_around_the_head_is_part_of_it():
    from lota.train.lora import add_lora

    model = model_of("llama")
    assert find_head(model) is not None
    add_lora(model, ["lm_head"], rank=2, alpha=4, dropout=0.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    inputs, targets = batch_of(60)
    got, want = token_logps(model, inputs, targets), by_logits(model, inputs, targets)
    assert_same(got.sum(1).double(), want, terms=chain(model), dtype=torch.float32)
    got.sum().backward()
    assert model.lm_head.lora_A["default"].weight.grad.abs().max() > 0


def test_asking_draws_no_random_number_and_leaves_nothing():
    model = model_of("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda m, x, out: F.dropout(out, 0.1))
    before = torch.get_rng_state()
    assert find_head(model) is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert "forward" not in vars(model.lm_head) and all(p.grad is None for p in model.parameters())


def test_an_error_in_the_model_leaves_its_head_as_it_was():
    model = model_of("llama")
    inputs, targets = batch_of(60)
    find_head(model)
    with pytest.raises(IndexError):
        token_logps(model, {**inputs, "input_ids": inputs["input_ids"] + 1000}, targets)
    assert "forward" not in vars(model.lm_head)
