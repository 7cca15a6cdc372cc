"""Delta files <-> adapters of PEFT.

Exported: a Super-Tuning adapter (peft.SupertuningConfig), float32 values that are added at flat positions to
the weights of linear layers. `PeftModel.from_pretrained` loads it without lota. Imported: whatever peft
merges into a model.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lota.models.loading import load_model
from lota.models.policy import index_torch_file
from lota.models.tensor_files import new_safetensors, read_header
from lota.models.weights import WeightSource
from lota.places import holding
from lota.share.delta.apply import check_model
from lota.share.delta.extract import write_changes
from lota.share.delta.format import as_integers
from lota.share.delta.indices import Overlay, Place
from lota.share.delta.reader import Delta
from lota.share.hf_weights import open_folder
from lota.storage import atomic_path, naming, parse_json, refuse_filled
from lota.utils import first_few

UNEVEN = ("pad", "refuse")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")  # as peft looks for them
# What a LoRA of all linear layers may take beyond what is stored, of which it may adapt few: so many times as
# many entries, and so many bytes.
_MOST_UNUSED, _UNUSED_BYTES = 64, 32 << 20
# Regular expressions of layers: a repeated group, and more repeats than this, can take exponential time.
_REPEATED_GROUP, _REPEAT, _MOST_REPEATS = re.compile(r"\)[*+{]"), re.compile(r"[*+{]"), 3


def export_peft(base: Place, delta: Place, out: Place, *, uneven: str = "pad") -> dict[str, Any]:
    """Write a delta as a Super-Tuning adapter; returns {tensors, entries, padding, bytes, differing, ...}.

    PEFT adds float32 values to the weights, and wants the same share of every adapted weight. uneven: `pad`
    adds entries of value -0.0, which change nothing, to layers with fewer changes; `refuse` raises ValueError
    if that would be needed. differing: entries whose merged value is not the tuned one if the sum is made in
    the file's dtype, as PEFT does on a model that was loaded in it; differing_in_float32: if it is made in
    float32 and then cast. Raises ValueError unless `base` is the delta's base, if something else than weights
    of `nn.Linear` changed, and for an `out` that is not empty.
    """
    if uneven not in UNEVEN:
        raise ValueError(f"uneven={uneven!r}: choose one of {', '.join(UNEVEN)}")
    out, opened = Path(out).expanduser(), Delta.open(delta)
    refuse_filled("out", out)
    source, structure = open_folder(base)
    layers = _linear_layers(structure, opened)
    check_model(source, opened, "base")
    sparsity = _common_sparsity({n: (opened.changed(n), opened.parameters[n].numel) for n in opened.names})
    sizes = {name: _n_trainable(opened.parameters[name].numel, sparsity) for name in opened.names}
    padding = sum(sizes.values()) - opened.n_changed
    if padding and uneven == "refuse":
        raise ValueError(
            f"uneven=refuse: PEFT wants the same share of every adapted weight; {padding:,} entries of "
            f"padding beside {opened.n_changed:,} changed ones would even them out (uneven=pad)"
        )
    with holding(out):
        refuse_filled("out", out)
        with atomic_path(out) as folder, naming(out):
            folder.mkdir()
            differing = _write_values(folder / "adapter_model.safetensors", source, opened, layers, sizes)
            config = json.dumps(_peft_config(base, sorted(layers.values()), sparsity), indent=2)
            (folder / "adapter_config.json").write_text(config + "\n", encoding="utf-8")
    return {
        "tensors": len(sizes),
        "entries": opened.n_changed,
        "padding": padding,
        "bytes": sum(file.stat().st_size for file in out.iterdir()),
        "differing": differing[False],
        "differing_in_float32": differing[True],
    }


def _write_values(
    file: Path, source: WeightSource, delta: Delta, layers: Mapping[str, str], sizes: Mapping[str, int]
) -> dict[bool, int]:
    """The adapter's tensors; returns how many entries differ from the tuned model (True: summed in fp32)."""
    forms: dict[str, Tensor] = {}
    for name, size in sizes.items():
        forms[_peft_key(layers[name], "indices")] = torch.empty(size, dtype=torch.int32, device="meta")
        forms[_peft_key(layers[name], "values")] = torch.empty(size, dtype=torch.float32, device="meta")
    differing = {False: 0, True: 0}
    with new_safetensors(file, forms, {"format": "pt"}) as put:
        for name, size in sizes.items():
            before, positions = source.read(name), delta.positions(name)
            start, goal = (w.view(-1)[positions] for w in (before, delta.tuned(name, before)))
            values = _addends(start, goal)
            for wide in differing:
                differing[wide] += int(_differs(start, values, goal, wide).sum())
            more = size - len(positions)  # x + -0.0 is x, also for x = -0.0
            put(_peft_key(layers[name], "indices"), torch.cat([positions, positions.new_zeros(more)]))
            put(_peft_key(layers[name], "values"), torch.cat([values, values.new_full((more,), -0.0)]))
    return differing


def _linear_layers(structure: nn.Module, delta: Delta) -> dict[str, str]:
    """Changed parameter -> path of its layer. Raises ValueError for what no Super-Tuning layer fits."""
    layers = {f"{path}.weight": path for path, m in structure.named_modules() if type(m) is nn.Linear}
    strange = [name for name in delta.names if name not in layers]
    if strange or not delta.names:
        what = f"{first_few(strange)} changed" if strange else "nothing changed"
        raise ValueError(
            f"{delta.path}: {what}; a Super-Tuning adapter holds weights of linear layers (nn.Linear) only: "
            "use the format indices"
        )
    return {name: layers[name] for name in delta.names}


def _peft_key(path: str, what: str) -> str:
    return f"base_model.model.{path}.supertuning_{what}"


def _n_trainable(numel: int, sparsity: float) -> int:
    """How many entries peft gives a weight; as `SupertuningLayer._num_trainable`."""
    return int(numel * (1 - sparsity))


def _common_sparsity(counts: Mapping[str, tuple[int, int]]) -> float:
    """The largest sparsity that leaves every weight its changed entries. counts: (changed, all) of each."""
    density = max(changed / numel for changed, numel in counts.values())
    sparsity = 1 - density
    # what `1 - (1 - density)` loses in fp64 can cost the last entry
    while sparsity > 0 and any(_n_trainable(numel, sparsity) < c for c, numel in counts.values()):
        density *= 1 + 2**-50
        sparsity = max(0.0, 1 - density)
    return sparsity


def _addends(start: Tensor, goal: Tensor) -> Tensor:
    """fp32 (c,): what brings `start` to `goal` (c,), by a sum in their own dtype if any value does.

    The exact difference need not be a number of a narrow dtype; of its rounding and the two numbers beside
    that, the first is taken that arrives.
    """
    exact = goal.float() - start.float()
    values = exact.clone()
    missed = _differs(start, values, goal, False)
    near = as_integers(exact.to(start.dtype).contiguous())
    for step in (-1, 1):
        there = (near + step).view(start.dtype).float()
        better = missed & there.isfinite() & ~_differs(start, there, goal, False)
        better &= ~_differs(start, there, goal, True)
        values = torch.where(better, there, values)
        missed &= ~better
    return values


def _differs(start: Tensor, values: Tensor, goal: Tensor, wide: bool) -> Tensor:
    """Bool (c,): where start + values has other bits than goal; wide: summed in fp32, then cast."""
    total = (start.float() + values).to(goal.dtype) if wide else start + values.to(start.dtype)
    return as_integers(total.contiguous()) != as_integers(goal.contiguous())


def _peft_config(base: Place, targets: list[str], sparsity: float) -> dict[str, Any]:
    from peft import SupertuningConfig  # slow to import

    settings = SupertuningConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        target_modules=targets,
        sparsity=sparsity,
        inference_mode=True,
    )
    return {**settings.to_dict(), "target_modules": targets}


def import_peft(base: Place, adapter: Place, out: Place) -> dict[str, Any]:
    """Make a delta of a base and a PEFT adapter (LoRA, SHiRA, Super-Tuning ...) merged into it by peft.

    The base is loaded in the dtype of its files, in which peft merges. Memory: the model. Raises ValueError
    for what is no adapter, does not fit, or trains more than the base's parameters, and, before peft reads
    it, for an adapter whose config would take far more memory or time than its weights can need.
    """
    from peft import PeftModel  # slow to import

    source, structure = open_folder(base)
    folder = Path(adapter).expanduser()
    _check_adapter(folder, structure)
    model = load_model(str(base), dtype=source.main_dtype, device="cpu")
    try:
        with warnings.catch_warnings():  # peft tells of weights that it did not find in a warning
            warnings.filterwarnings("error", message="Found missing adapter keys")
            for of_peft in ("`is_gradient_checkpointing` is deprecated", "Sparse invariant checks"):
                warnings.filterwarnings("ignore", message=of_peft)
            merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, UserWarning) as error:
        # AttributeError: prompts and prefixes have no weights to merge
        raise ValueError(f"{folder} cannot be merged into {source.id}: {str(error)[:300]}") from error
    values = {name: value.detach() for name, value in merged.named_parameters()}
    if strange := [n for n, v in values.items() if n not in source or source.shape(n) != tuple(v.shape)]:
        raise ValueError(f"{folder} makes {strange[0]} of another shape, or anew: no delta holds that")

    def value_of(name: str) -> Tensor | None:
        return values[name].to(source.dtype(name)) if name in values else None

    overlay = Overlay(source, str(folder), value_of)
    return write_changes(source, overlay, Path(out).expanduser(), {"tuned": str(folder)})


def _check_adapter(folder: Path, structure: nn.Module) -> None:
    """Raise ValueError for what is no adapter or what peft could not bound: it believes the config."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no PEFT adapter: it has no adapter_config.json")
    weights = [folder / name for name in _ADAPTERS if (folder / name).is_file()]
    if not weights:
        raise ValueError(f"{folder} is no PEFT adapter: it has no {_ADAPTERS[0]}")
    stored = read_header(weights[0]).entries if weights[0].suffix == ".safetensors" else None
    stored = index_torch_file(weights[0]) if stored is None else stored
    try:
        config = parse_json(file.read_bytes())
        ranks = [config.get("r") or 0, *(config.get("rank_pattern") or {}).values()]
        patterns = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
        for key in ("target_modules", "exclude_modules", "layers_pattern", "target_parameters"):
            named = config.get(key) or []
            patterns += [named] if isinstance(named, str) else [str(name) for name in named]
        # LoRA has two matrices per layer, each of as many rows or columns as its rank
        sides = sum(sum(m.weight.shape) for m in structure.modules() if type(m) is nn.Linear)
        n_stored = sum(tensor.numel for tensor in stored.values())
        if not all(type(rank) is int for rank in ranks):
            raise ValueError(f"its ranks are {ranks!r:.60}")
        if max(ranks) * sides > _MOST_UNUSED * n_stored + (_UNUSED_BYTES >> 2):
            raise ValueError(f"the rank {max(ranks)} would take far more memory than its weights")
        slow = [p for p in patterns if _REPEATED_GROUP.search(p) or len(_REPEAT.findall(p)) > _MOST_REPEATS]
        if slow:
            raise ValueError(f"the pattern {slow[0]!r:.60} could take forever: list the modules by name")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not used: {error}") from error
