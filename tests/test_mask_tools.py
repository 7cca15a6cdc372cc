"""`python -m lota.masks` as a user runs it: tables, pictures, new masks, refusals."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
import torch
from memory import needs_proc, printed

import lota
from lota.masks import Mask
from lota.masks import __main__ as mask_tools
from lota.masks.combine import combine, random_like
from lota.masks.views import density, overlap
from lota.models.scope import find_scope, meta_model, scope_share
from lota.utils import aligned, short_names

OWN_MEMORY = """
from lota.masks.__main__ import load_masks

before = memory("RssAnon")  # of the process, and no file's
masks = load_masks([sys.argv[1]] * 4)
print(memory("RssAnon") - before)
"""


@pytest.fixture
def files(tmp_path):
    """Two masks of the embedded model: a_mask.pt keeps 10 %, b_mask.pt 30 %."""
    runs.write_mask(tmp_path / "a_mask.pt", 0.1, seed=0)
    runs.write_mask(tmp_path / "b_mask.pt", 0.3, seed=1)
    return str(tmp_path / "a_mask.pt"), str(tmp_path / "b_mask.pt")


def bools(path) -> dict[str, torch.Tensor]:
    mask = Mask.load(path)
    return {name: mask.dense(name) for name in mask.names}


def refusal(*arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        mask_tools.main([str(argument) for argument in arguments])
    return str(stopped.value)


def test_show_is_the_density_by_layer_and_module(files, tmp_path, capsys):
    mask_tools.main(["show", files[0], "--png", str(tmp_path / "png")])
    shown = capsys.readouterr().out
    kept = bools(files[0])
    total = sum(int(k.sum()) for k in kept.values())
    entries = sum(k.numel() for k in kept.values())
    assert f"{total:,} of {entries:,} entries kept ({100 * total / entries:.4g} %" in shown
    header = re.search(r"^layer +(.*)$", shown, re.MULTILINE)[1].split()
    assert header == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all"]
    for layer in range(4):
        row = re.search(rf"^{layer} +(.*)$", shown, re.MULTILINE)[1].split()
        for module, cell in zip(header[:-1], row[:-1], strict=True):
            (name,) = (n for n in kept if f"layers.{layer}." in n and f".{module}." in n)
            assert cell == f"{100 * kept[name].double().mean().item():.2f}"
        of_layer = torch.cat([k.reshape(-1) for n, k in kept.items() if f"layers.{layer}." in n])
        assert row[-1] == f"{100 * of_layer.double().mean().item():.2f}"
    last = re.search(r"^all +(.*)$", shown, re.MULTILINE)[1].split()
    assert last[-1] == f"{100 * total / entries:.2f}"
    assert (tmp_path / "png" / "density_a_mask.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tool", ["show", "compare"])
def test_pictures_replace_pictures_of_ours_alone(tool, files, tmp_path):
    picture = tmp_path / {"show": "density_a_mask.png", "compare": "overlap.png"}[tool]
    for _ in range(2):
        mask_tools.main([tool, *files, "--png", str(tmp_path)])
    picture.write_bytes(b"\x89PNG of a holiday")
    assert f"{picture} exists and is no picture of masks" in refusal(tool, *files, "--png", tmp_path)
    assert picture.read_bytes() == b"\x89PNG of a holiday"


@pytest.mark.parametrize("pattern", [None, "self_attn"])
def test_show_tells_the_share_of_the_matrices(files, pattern, tmp_path, capsys):
    """As recorded, also in what is made of a mask; files of before do not say it, and a model does."""
    model = meta_model(runs.MODEL)
    found = scope_share(model, find_scope(model, "mlp"))
    meta = {"scope": pattern, "scope_share": found.share, "left_out": found.largest}
    mask = Mask.load(files[0])
    Mask(mask.bits, mask.shapes, meta).save(tmp_path / "new.pt")
    mask_tools.main(["flip", str(tmp_path / "new.pt"), "--out", str(tmp_path / "flipped.pt")])
    for file in ("new.pt", "flipped.pt"):
        mask_tools.main(["show", str(tmp_path / file)])
        shown = capsys.readouterr().out
        assert f"the scope takes {100 * found.share:.1f} % of the matrices" in shown
        assert ("left out are model.layers.#.self_attn" in shown) == (pattern is None)
        assert "scope_share" not in shown and "left_out:" not in shown
    mask_tools.main(["show", files[0]])
    assert "share of the matrices is not recorded (--model FOLDER" in capsys.readouterr().out
    mask_tools.main(["show", files[0], "--model", str(runs.MODEL)])
    assert "the scope takes 100.0 % of the matrices" in capsys.readouterr().out


def test_the_heat_map_has_the_tables_numbers(files):
    table = density(Mask.load(files[0]))
    image = table.draw(None, "t").axes[0].images[0].get_array()
    assert np.allclose(image, 100 * table.kept / table.entries)
    assert table.kept.sum() == Mask.load(files[0]).n_kept


@pytest.mark.parametrize(
    ("names", "layers", "modules"),
    [
        (["h.0.attn.c_attn.weight", "h.1.mlp.c_fc.weight"], ["0", "1"], ["c_attn", "c_fc"]),
        (["lm_head.weight", "l.2.a.w1.weight", "l.10.b.w1.weight"], ["2", "10", "outside"], ["a.w1", "b.w1"]),
        (["enc.l.0.q.weight", "dec.l.0.q.weight"], ["dec.l.0", "enc.l.0"], ["q"]),
        (["l.0.experts.gate_up_proj", "l.0.experts.down_proj"], ["0"], ["gate_up_proj", "down_proj"]),
    ],
)
def test_layers_and_modules_come_from_the_names(names, layers, modules):
    table = density(Mask.from_dense({name: torch.ones(2, 3, dtype=torch.bool) for name in names}))
    assert table.layers == layers
    assert table.modules[: len(modules)] == modules
    assert table.entries.sum() == 6 * len(names)


def test_overlap_against_brute_force_and_against_chance(files, tmp_path, capsys):
    first, second = (bools(path) for path in files)
    both = sum(int((first[n] & second[n]).sum()) for n in first)
    either = sum(int((first[n] | second[n]).sum()) for n in first)
    found = overlap(*(Mask.load(path) for path in files))
    assert (found.both, found.iou) == (both, both / either)
    assert found.expected == pytest.approx(
        sum(int(first[n].sum()) * int(second[n].sum()) / first[n].numel() for n in first)
    )
    mask_tools.main(["compare", *files, "--png", str(tmp_path)])
    line = re.search(r"^a_mask\.pt +b_mask\.pt +(.*)$", capsys.readouterr().out, re.MULTILINE)[1].split()
    assert line[0] == f"{both:,}" and line[3] == f"{both / either:.4f}"
    assert (tmp_path / "overlap.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_chance_is_what_random_masks_give():
    generator = torch.Generator().manual_seed(0)
    kept = {
        "a": torch.rand(40, 25, generator=generator) < 0.3,
        "b": torch.rand(7, 9, generator=generator) < 0.8,
    }
    mask = Mask.from_dense(kept)
    draws = [overlap(mask, random_like(mask, seed)) for seed in range(300)]
    shared = np.array([draw.both for draw in draws])
    assert abs(shared.mean() - draws[0].expected) < 4 * draws[0].deviation / np.sqrt(len(shared))
    assert shared.std() == pytest.approx(draws[0].deviation, rel=0.15)


def test_union_intersect_and_flip_against_booleans(files, tmp_path):
    first, second = (bools(path) for path in files)
    for tool, rule in (("union", torch.logical_or), ("intersect", torch.logical_and)):
        mask_tools.main([tool, *files, files[0], "--out", str(tmp_path / "new" / f"{tool}.pt")])
        made = Mask.load(tmp_path / "new" / f"{tool}.pt")
        assert all(torch.equal(made.dense(n), rule(first[n], second[n])) for n in first)
        assert made.meta["kept"] == made.n_kept
        assert made.meta["made_by"].startswith(f"{tool} of {files[0]}")
    mask_tools.main(["flip", files[0], "--out", str(tmp_path / "flip.pt")])
    assert all(torch.equal(kept, ~first[name]) for name, kept in bools(tmp_path / "flip.pt").items())


def test_metadata_of_a_new_mask_are_true_of_it(files, tmp_path):
    for path, score in zip(files, ("task_vector", "magnitude"), strict=True):
        mask = Mask.load(path)
        mask.meta |= {"score": score, "base": "assets/tiny-llama", "threshold": 0.5, "sparsity": 0.9}
        mask.save(path)
    mask_tools.main(["union", *files, "--out", str(tmp_path / "u.pt")])
    meta = Mask.load(tmp_path / "u.pt").meta
    assert meta["base"] == "assets/tiny-llama"
    assert "score" not in meta and "threshold" not in meta
    assert meta["sparsity"] == 1 - Mask.load(tmp_path / "u.pt").density


def test_random_like_keeps_the_counts_and_follows_the_seed(files, tmp_path):
    outs = [tmp_path / f"{name}.pt" for name in "xyz"]
    for out, seed in zip(outs, (3, 3, 4), strict=True):
        mask_tools.main(["random-like", files[0], "--seed", str(seed), "--out", str(out)])
    original, first, again, other = (Mask.load(path) for path in (files[0], *outs))
    for name in original.names:
        assert first.kept(name) == other.kept(name) == original.kept(name)
        assert torch.equal(first.bits[name], again.bits[name])
        assert not torch.equal(first.bits[name], other.bits[name])
    assert first.meta["score"] == "random" and first.meta["seed"] == 3
    assert (
        abs(overlap(original, first).both - overlap(original, first).expected)
        < 5 * overlap(first, other).deviation
    )


def test_a_random_mask_has_the_origin_of_the_first_but_not_how_it_was_made(files):
    mask = Mask.load(files[0])
    mask.meta |= {"scope": "mlp", "base": "b", "base_hash": "h", "score": "snip", "threshold": 1.0}
    made = combine("random-like", [mask.flip()], ["a.pt"])
    described = {"made_by": "random-like of a.pt", "kept": made.n_kept, "sparsity": 1 - made.density}
    own = {"score": "random", "per": "tensor", "seed": 0}
    assert made.meta == {"scope": "mlp", "base": "b", "base_hash": "h", **own, **described}
    drawn = random_like(mask.flip(), 0)
    assert all(torch.equal(made.bits[name], drawn.bits[name]) for name in mask.names)


def test_a_random_mask_is_drawn_anew_also_under_its_own_seed():
    drawn = lota.extract(runs.MODEL, score="random", sparsities=[0.9], seed=0)[0.9]
    found = overlap(drawn, random_like(drawn, 0))
    assert abs(found.both - found.expected) < 5 * found.deviation


@pytest.mark.slow
def test_every_entry_is_as_likely_as_any_other():
    mask = Mask.from_positions({"w": torch.arange(4)}, {"w": (4, 5)})  # all kept ones at the front
    counts = sum(random_like(mask, seed).dense("w").reshape(-1).int() for seed in range(2000))
    assert (counts - 400).abs().max() < 5 * (2000 * 0.2 * 0.8) ** 0.5


def test_the_older_layout_has_no_scope_until_the_model_gives_it(files, tmp_path, capsys):
    old, model = tmp_path / "old.pt", str(runs.MODEL)
    mask_tools.main(["flip", files[0], "--out", str(old), "--format", "dense", "--model", model])
    content = torch.load(old, weights_only=True)
    assert content["model.norm.weight"].all() and "model.embed_tokens.weight" in content
    capsys.readouterr()
    mask_tools.main(["show", str(old)])
    assert "older layout" in capsys.readouterr().out
    assert "give --model FOLDER" in refusal("flip", old, "--out", tmp_path / "n.pt")
    assert not (tmp_path / "n.pt").exists()
    mask_tools.main(["flip", str(old), "--out", str(tmp_path / "n.pt"), "--model", model])
    original, again = Mask.load(files[0]), Mask.load(tmp_path / "n.pt")
    assert again.names == original.names
    assert all(torch.equal(again.bits[name], original.bits[name]) for name in original.names)
    mask_tools.main(["union", str(old), files[0], "--out", str(tmp_path / "u.pt")])
    assert "older layout" in refusal("flip", tmp_path / "u.pt", "--out", tmp_path / "no.pt")
    content["model.norm.weight"][0] = False  # kept, though no scope has norms
    torch.save(content, old)
    assert "keeps entries outside of the scope: model.norm.weight" in refusal("show", old, "--model", model)


def test_masks_of_different_models_are_refused_and_nothing_is_written(files, tmp_path):
    tiny.random_mask(tiny.make("llama")).save(tmp_path / "other.pt")
    gpt2 = tiny.random_mask(tiny.make("gpt2"))
    gpt2.save(tmp_path / "gpt2.pt")
    for other in ("other.pt", "gpt2.pt"):
        for tool in (
            ["compare"],
            ["union", "--out", tmp_path / "n.pt"],
            ["intersect", "--out", tmp_path / "n.pt"],
        ):
            message = refusal(tool[0], files[0], tmp_path / other, *tool[1:])
            assert "a_mask.pt and" in message and other in message and "different models" in message
    assert not (tmp_path / "n.pt").exists()
    assert "gpt2.pt: the mask does not belong" in refusal("show", tmp_path / "gpt2.pt", "--model", runs.MODEL)


def test_a_shallower_model_of_the_same_width_is_another_model(files, tmp_path):
    mask = Mask.load(files[0])
    less = {name: mask.dense(name) for name in mask.names if "layers.3." not in name}
    for meta in ({"scope": "usual"}, {"layout": "dense"}):
        whole = Mask.from_dense({name: mask.dense(name) for name in mask.names}, meta)
        with pytest.raises(ValueError, match=r"only one of them lists model\.layers\.3\."):
            whole.check_same_model(Mask.from_dense(less, meta))
    whole.only(less).check_same_model(mask)  # a part of the scope is no other model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "A"], "at least two"),
        (["union", "A", "--out", "n.pt"], "two mask files or more"),
        (["flip", "A", "B", "--out", "n.pt"], "one mask file"),
        (["random-like", "A", "B", "--out", "n.pt"], "one mask file"),
        (["show", "absent.pt"], "absent.pt does not exist"),
        (["show", "A", "--scope", "mlp"], "give --model"),
        (["flip", "A", "--out", "n.pt", "--format", "dense"], "give --model"),
        (["flip", "A", "--out", "A"], "a_mask.pt is one of the masks that it is made of"),
        (["intersect", "A", "notA", "--out", "n.pt"], "keeps no entry"),
    ],
)
def test_refusals(files, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Mask.load(files[0]).flip().save("not_a.pt")
    named = {"A": files[0], "B": files[1], "notA": "not_a.pt"}
    before = Path(files[0]).read_bytes()
    assert message in refusal(*(named.get(argument, argument) for argument in arguments))
    assert not (tmp_path / "n.pt").exists()
    assert Path(files[0]).read_bytes() == before


@pytest.mark.slow
def test_as_a_module_without_warnings(files):
    command = [sys.executable, "-W", "error", "-m", "lota.masks", "compare", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=runs.ROOT)
    assert "IoU" in done.stdout and not done.stderr


@pytest.mark.slow
@needs_proc
def test_many_masks_stay_on_disk(tmp_path):
    """Mapped bits: four masks of 32 MB each add less than one of them to the process."""
    bits = torch.zeros(1 << 25, dtype=torch.uint8)
    Mask({"l.0.w.weight": bits}, {"l.0.w.weight": (1 << 14, 1 << 14)}).save(tmp_path / "big.pt")
    assert printed(OWN_MEMORY, tmp_path / "big.pt")[0] < 2**25


def test_tables_and_short_names():
    assert aligned([["a", "bb", "1"], ["ccc", "d", "22"]], left=2) == ["a    bb   1", "ccc  d   22"]
    assert short_names(["x/gsm8k/0.9_mask.pt", "x/arc/0.9_mask.pt"]) == [
        "gsm8k/0.9_mask.pt",
        "arc/0.9_mask.pt",
    ]
    assert short_names(["x/a.pt", "y/b.pt"]) == ["a.pt", "b.pt"]
    assert short_names(["/x/a", "/x/a", "/y/a"]) == ["x/a", "x/a", "y/a"]
    assert short_names([]) == []
    runs = ["/r/a", "/r/a/1/adapt", "/r/b/1/adapt", "/r/c"]
    assert short_names(runs, alike=False) == ["a", "a/1/adapt", "b/1/adapt", "c"]
    assert short_names(["/a", "/x/a"], alike=False) == ["a", "x/a"]
