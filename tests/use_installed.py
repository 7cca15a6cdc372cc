"""Use every public name of an installed lota once: `python -I use_installed.py FOLDER [HIDDEN_MODULE ...]`.

tests/test_packaging.py runs this away from the checkout. The hidden modules cannot be imported: they are
optional. Prints one JSON object: where the package lies, its version, public names that were not used.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(sys.argv[1])
sys.modules.update(dict.fromkeys(sys.argv[2:]))  # None: `import` raises ModuleNotFoundError

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import lota as lota_module  # noqa: E402
import lota.delta as delta_module  # noqa: E402


class Recorder:
    """A module whose public names are noted when they are used."""

    def __init__(self, module: ModuleType):
        self._module, self._left = module, set(module.__all__)

    def __getattr__(self, name: str) -> Any:
        self._left.discard(name)
        return getattr(self._module, name)

    def unused(self) -> list[str]:
        return sorted(self._left)


lota, delta = Recorder(lota_module), Recorder(delta_module)
BASE, TUNED = FOLDER / "base", FOLDER / "tuned"
TOKENS = torch.arange(16).reshape(2, 8) % 29


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 29}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def loss_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def write_models() -> None:
    """A base, and a tuned model in which all weights of attention and MLP differ."""
    model = new_model()
    model.save_pretrained(BASE)
    with torch.no_grad():
        scope = lota.find_scope(model)
        assert lota.scope_share(model, scope).share == 1
        for name in scope:
            model.get_parameter(name).add_(torch.randn(model.get_parameter(name).shape), alpha=0.1)
    model.save_pretrained(TUNED)


def use_masks() -> Any:
    """Extract, save and load a mask; extract one from gradients. Returns the first."""
    mask = lota.extract(BASE, TUNED, [0.9])[0.9]
    mask.save(FOLDER / "mask.pt")
    loaded = lota.Mask.load(FOLDER / "mask.pt")
    assert loaded.n_kept == mask.n_kept > 0
    model = new_model()
    collected = lota.collect_gradients(model, lambda tokens: loss_of(model, tokens), [TOKENS])
    assert lota.extract(BASE, score="snip", collected=collected)[0.9].n_kept == mask.n_kept
    squares = lota.collect_gradients(model, lambda tokens: loss_of(model, tokens), [TOKENS], kind="squares")
    importance = lota.importance_of([squares])
    avoiding = lota.extract(BASE, TUNED, [0.9], avoid=importance, avoid_strength=10.0)[0.9]
    assert avoiding.n_kept == mask.n_kept > avoiding.overlap(mask)
    return loaded


def train_a_step(optimizer_name: str, fuse_name: str | None, mask: Any) -> None:
    """One step moves entries that the mask keeps, and no other."""
    model = new_model()
    before = weights(model)
    optimizer = getattr(lota, optimizer_name)(model, mask, lr=0.1)
    if fuse_name:
        getattr(lota, fuse_name)(optimizer)
    loss_of(model, TOKENS).backward()
    optimizer.step()
    moved = {name: p != before[name] for name, p in weights(model).items()}
    assert any(change.any() for change in moved.values())
    for name, change in moved.items():
        assert not (change & ~mask.dense(name)).any() if name in mask else not change.any()


def train_narrow_weights() -> None:
    """bf16 weights without masters lose steps of 1e-6, and a warning says how many."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = new_model().bfloat16()
        optimizer = lota.MaskedRMSprop(model, lr=1e-6, masters=False)
        for _ in range(10):
            loss_of(model, TOKENS).backward()
            optimizer.step()
    assert [True for warning in told if warning.category is lota.SwallowedUpdatesWarning]


def compile_and_undo() -> None:
    model = new_model()
    blocks = lota.compile_blocks(model)
    assert blocks.blocks == list(model.model.layers) and "forward" in vars(model.model.layers[0])
    blocks.undo()
    assert "forward" not in vars(model.model.layers[0])


def use_deltas() -> None:
    """Write the tuned model as a delta; apply it to files and to a loaded model, and undo both."""
    file, applied, reverted = FOLDER / "delta.safetensors", FOLDER / "applied", FOLDER / "reverted"
    delta.extract(BASE, TUNED, file)
    delta.verify(BASE, file)
    delta.apply(BASE, file, applied)
    delta.revert(applied, file, reverted)
    base, tuned = (weights(LlamaForCausalLM.from_pretrained(folder)) for folder in (reverted, applied))
    assert same(base, weights(new_model()))
    assert same(tuned, weights(LlamaForCausalLM.from_pretrained(TUNED))) and not same(base, tuned)
    model, opened = new_model(), lota.Delta.open(file)
    assert opened.n_changed == delta.Delta.open(file).n_changed > 0
    lota.attach(model, opened)
    assert same(weights(model), tuned) and lota.attached(model) == [opened]
    lota.detach(model, opened)
    assert same(weights(model), base)
    lota.switch(model, opened)
    assert same(weights(model), tuned)


def main() -> None:
    write_models()
    mask = use_masks()
    for optimizer in ("MaskedAdamW", "MaskedRMSprop", "MaskedSGD"):
        for fuse in (None, "fuse_in_backward", "apply_mask_in_backward"):
            train_a_step(optimizer, fuse, mask)
    train_narrow_weights()
    compile_and_undo()
    assert hasattr(lota.FusedCallback(), "on_train_begin")
    use_deltas()
    unused = [*lota.unused(), *(f"delta.{name}" for name in delta.unused())]
    print(json.dumps({"file": lota_module.__file__, "version": lota_module.__version__, "unused": unused}))


if __name__ == "__main__":
    main()
