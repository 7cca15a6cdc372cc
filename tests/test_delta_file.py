"""Delta files: what is read is what two models differ in; nothing damaged is read."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
from tempfile import TemporaryFile

import hf_models
import numpy as np
import pytest
import safetensors
import torch
import zstandard
from delta_models import bits, change, delta_pair, save_model
from tiny import random_mask

from lota.delta import Delta, extract
from lota.masks import Mask
from lota.models.hashing import content_hash
from lota.models.weights import open_weights
from lota.share.delta import format, index
from lota.share.delta.codec import encode
from lota.share.delta.format import read_index, write_delta
from lota.share.delta.index import SEGMENT, Parameter, segments
from lota.storage import atomic_path


@pytest.fixture
def pair(tmp_path):
    """(base, tuned, delta) of bf16 Llamas."""
    return delta_pair(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_changes_are_the_differences_of_the_files(tmp_path, dtype):
    base, tuned, delta = delta_pair(tmp_path, dtype=dtype)
    meta = extract(base, tuned, delta, task="sql")
    delta, base, tuned = Delta.open(delta), open_weights(base), open_weights(tuned)
    n_changed = n_entries = 0
    for name in base.names():
        before, after = base.read(name), tuned.read(name)
        assert torch.equal(bits(delta.tuned(name, before)), bits(after))
        differing = (before != after).flatten().nonzero().flatten()  # no entry goes from 0 to -0 here
        assert torch.equal(delta.positions(name), differing)
        assert (name in delta.names) == (len(differing) > 0) == (delta.changed(name) > 0)
        n_changed, n_entries = n_changed + len(differing), n_entries + before.numel()
    assert delta.meta == meta and meta["changed"] == n_changed and meta["entries"] == n_entries
    assert meta["base_hash"] == content_hash(base) and meta["tuned_hash"] == content_hash(tuned)
    assert meta["task"] == "sql" and meta["dtype"] == str(dtype).removeprefix("torch.")
    assert meta["sparsity"] == pytest.approx(1 - n_changed / n_entries)


def test_large_tensors_are_cut_and_small_ones_pooled():
    sizes = [("a", torch.bfloat16, SEGMENT + 5), ("b", torch.bfloat16, 3), ("c", torch.bfloat16, SEGMENT - 8),
             ("d", torch.bfloat16, 1), ("e", torch.float32, 0), ("f", torch.float32, 2)]  # fmt: skip
    found = segments([Parameter(name, dtype, (n,)) for name, dtype, n in sizes])
    assert [[tuple(piece) for piece in segment.pieces] for segment in found] == [
        [("a", 0, SEGMENT, 0)],
        [("a", SEGMENT, SEGMENT + 5, 0), ("b", 0, 3, 5), ("c", 0, SEGMENT - 8, 8)],
        [("d", 0, 1, 0)],
        [("f", 0, 2, 0)],
    ]
    assert [segment.n for segment in found] == [SEGMENT, SEGMENT, 1, 2]


def test_parts_of_a_tensor_over_several_segments(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(3, SEGMENT // 2 + 11, generator=generator).half(), "b": torch.zeros(5).half()}
    tuned = {"w": base["w"].clone(), "b": base["b"] + 1}
    tuned["w"].view(-1)[torch.randperm(base["w"].numel(), generator=generator)[:40_000]] += 1
    for name, state in (("base.pt", base), ("tuned.pt", tuned)):
        state["nothing"] = torch.empty(0).half()
        hf_models.save_policy(tmp_path / name, state)
    extract(tmp_path / "base.pt", tmp_path / "tuned.pt", tmp_path / "d.safetensors")
    delta = Delta.open(tmp_path / "d.safetensors")
    assert all(torch.equal(delta.tuned(name, base[name]), tuned[name]) for name in base)
    expected = (base["w"] != tuned["w"]).flatten().nonzero().flatten().numpy()
    for start, stop in ((0, 10), (SEGMENT - 7, SEGMENT + 900), (5, base["w"].numel()), (100, 100)):
        positions, xors = delta.changes("w", start, stop)
        assert np.array_equal(positions.numpy() + start, expected[(expected >= start) & (expected < stop)])
        assert len(xors) == len(positions)


def test_a_mask_bounds_what_may_have_changed(tmp_path):
    base, tuned, out, other = (
        tmp_path / name for name in ("base", "tuned", "d.safetensors", "e.safetensors")
    )
    model = save_model(base)
    mask = random_mask(model)
    change(model, mask=mask).save_pretrained(tuned)
    meta = extract(base, tuned, out, mask=mask)
    assert meta["kept"] == mask.n_kept and meta["sparsity"] == pytest.approx(1 - mask.density)
    assert 0 < meta["changed"] <= mask.n_kept
    name = mask.names[2]  # everything kept
    smaller = {n: mask.dense(n) & (n != name) for n in mask.names}
    for wrong, message in (
        (smaller, rf"entries changed outside the mask, .* in {name}"),
        (
            {n: kept for n, kept in smaller.items() if n != name},
            rf"entries changed outside the mask, .* in {name}",
        ),
        ({"x": smaller[name]}, "does not belong"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(base, tuned, other, mask=Mask.from_dense(wrong))
    mask.save(tmp_path / "mask.pt")
    extract(base, tuned, other, mask=tmp_path / "mask.pt")
    assert other.read_bytes() == out.read_bytes()


def test_a_narrower_policy_is_explained(tmp_path):
    model = save_model(tmp_path / "base", dtype=torch.float32)
    mask = random_mask(model)
    policy = hf_models.save_policy(tmp_path / "policy.pt", change(model, mask=mask).bfloat16().state_dict())
    with pytest.raises(ValueError, match="narrower dtype"):
        extract(tmp_path / "base", policy, tmp_path / "d.safetensors", mask=mask)


def test_equal_models_and_wholly_different_ones(tmp_path, pair):
    base, other = pair[0], hf_models.new_model("llama", seed=5).bfloat16()
    assert extract(base, base, tmp_path / "none.safetensors")["changed"] == 0
    other.save_pretrained(tmp_path / "other")
    extract(base, tmp_path / "other", tmp_path / "all.safetensors")
    nothing, everything = (Delta.open(tmp_path / f"{name}.safetensors") for name in ("none", "all"))
    source = open_weights(base)
    assert nothing.names == []
    for name, p in other.named_parameters():
        before = source.read(name)
        assert len(nothing.positions(name)) == 0 and torch.equal(nothing.tuned(name, before), before)
        assert torch.equal(everything.tuned(name, before), p.detach())


def test_every_byte_counts(pair):
    path = pair[2]
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = np.random.default_rng(0)
    damaged = [whole[:length] for length in (0, 4, 8, 100, header, header + 1, len(whole) - 1)]
    for place in [*range(header), *generator.integers(header, len(whole), 200), len(whole) - 1]:
        flipped = bytes([whole[place] ^ 1 << int(generator.integers(8))])
        damaged.append(whole[:place] + flipped + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"d\.safetensors"):
            Delta.open(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="truncated or changed"):
        Delta.open(path)
    path.write_bytes(whole)
    assert Delta.open(path).n_changed > 0


def codings_of(found) -> list[list[int]]:
    """Of every segment, as they stand in the file."""
    widths = [found.layout.dtype(i).itemsize for i in range(found.layout.count)]
    held = [found.codings[i] for i in range(found.layout.count)]
    return [[0] * (4 + width) if one is None else one[0] for one, width in zip(held, widths, strict=True)]


def test_an_index_that_claims_more_than_the_file_holds(pair):
    """Whoever writes a file can compute its checksum: nothing in it sizes what is done with it, unchecked."""
    found = read_index(pair[2])
    codings, first = codings_of(found), found.parameters[0]
    huge = Parameter("huge", torch.bfloat16, (1 << 40, 1 << 12))
    for parameters, rows, message in (
        ([huge], codings, "more entries than a file of"),
        ([huge], [], "more entries than a file of"),
        ([Parameter("large", torch.bfloat16, (1 << 39,))], codings, "does not describe its parameters"),
        ([first], [*codings, codings[0]], "more segments than its parameters have"),
        (found.parameters, codings[:-1], "does not describe its parameters"),
        ([dataclasses.replace(first, changed=1)], [[0] * 6], "other numbers of changes"),
        (found.parameters[::-1], codings, "not in sorted order"),
        ([first, first], [[0] * 6], "not in sorted order"),
        (found.parameters, codings, "does not describe its data"),
        ([dataclasses.replace(first, changed=first.numel + 1)], [[0] * 6], "changes in"),
    ):
        with TemporaryFile() as data:
            write_delta(pair[2], parameters, rows, data, found.meta)
        with pytest.raises(ValueError, match=rf"d\.safetensors is no whole delta .* {message}"):
            Delta.open(pair[2])
    with TemporaryFile() as data:
        write_delta(pair[2], [], [], data, {"base": "x"})
    with pytest.raises(ValueError, match="its metadata lack base_fingerprint"):
        Delta.open(pair[2])


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        ("nn", "[2]"), ("Tensor", "[2]"), ("uint64x", "[2]"), ("complex128", "[2]"), ("quint8", "[2]"),
        ("__version__", "[2]"), ("bfloat16", "[-2]"), ("bfloat16", "[2.0]"), ("bfloat16", "2"),
        ("bfloat16", f"[{1 << 55}]"), ("bfloat16", "[true]"), ("bfloat16", f"[{'1,' * 70}1]"),
    ],
)  # fmt: skip
def test_parameters_that_are_none(dtype, shape):
    """`torch.nn` is an attribute of torch as `torch.float32` is, and no dtype."""
    text = f'{{"parameters":[["w","{dtype}",{shape},0]],"segments":[[0,0,0,0,1.0]]}}'
    with pytest.raises(ValueError, match=r"has the dtype|has the shape|changes in"):
        index.read_compressed_index(zstandard.compress(text.encode()), 1000)


def test_the_limits_of_an_index_grow_with_the_file(monkeypatch):
    monkeypatch.setattr(index, "SEGMENT", 64)
    many = [Parameter(f"p{i:05}", torch.int8, (1,), 0) for i in range((1 << 15) + 2)]
    compressed = index.compressed_index(many, [[0] * 5] * (len(many) // 64 + 1))
    for size, fits in ((2047, False), (2048, True)):
        if fits:
            assert index.read_compressed_index(compressed, size)[0] == many
        else:
            with pytest.raises(ValueError, match="more parameters than a file of 2,047 bytes can have"):
                index.read_compressed_index(compressed, size)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b'{"parameters":[', b'{"parameters":[]', b'{"parameters":[],"segments":[',
        b'{"parameters":[["w","int8",[2],0]],"segments":[1]}',
        b'{"parameters":[["w","int8",[2],0]],"segments":[[0,0,0,0]]}',
        b'{"parameters":[["w","int8",[2],0]],"segments":[[0,0,0,0,4000000000]]}',
        b'{"parameters":[["w","int8",[2],0]],"segments":[[3,0,0,0,0]]}',
        b'{"parameters":[["w","int8",[2],0]],"segments":[[0,3,0,0,0]]}',
        b'{"parameters":[["w","int8",[2],0]],"segments":[[0,0,0,0,1.0]]}',
        b'{"parameters":[["w","int8",[2]]],"segments":[[0,0,0,0,0]]}',
        b'{"parameters":[["' + b"w" * 200_000 + b'","int8",[2],0]],"segments":[[0,0,0,0,0]]}',
        b'{"parameters":' + b"[" * 100_000, b'{"parameters":[' + b"[" * 100_000, b"\0" * 10_000_000,
    ],
)  # fmt: skip
def test_indices_that_are_none(text):
    with pytest.raises(ValueError, match=r"its index|segment 0|JSON|Expecting|changes in"):
        index.read_compressed_index(zstandard.compress(text), 1000)


def test_the_file_is_safetensors_with_a_checksum_and_an_index(pair):
    base, tuned, path = pair
    meta = extract(base, tuned, path)
    with safetensors.safe_open(path, "np") as file:
        assert sorted(file.keys()) == ["data", "index"]
        stored = file.metadata()
        index = json.loads(zstandard.ZstdDecompressor().decompress(file.get_tensor("index").tobytes()))
    checksum = stored.pop("checksum")
    assert {key: str(value) for key, value in meta.items()} == stored
    blank = path.read_bytes().replace(checksum.encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == checksum
    source = open_weights(base)
    assert [row[:3] for row in index["parameters"]] == [
        [n, "bfloat16", list(source.shape(n))] for n in sorted(source.names())
    ]


def test_other_files_are_no_deltas(tmp_path, pair):
    newer = tmp_path / "newer"
    newer.write_bytes(pair[2].read_bytes().replace(b'"version":"1"', b'"version":"2"'))
    for path, message in (
        (tmp_path / "nowhere.safetensors", "does not exist"),
        (pair[0] / "model.safetensors", "no delta file"),
        (tmp_path, "is a folder"),
        (newer, "update lota"),
    ):
        with pytest.raises(ValueError, match=message):
            Delta.open(path)


def test_what_lies_at_the_place_to_write_to_is_not_lost(tmp_path, pair):
    base, tuned, delta = pair
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is a folder: name a file"):
        extract(base, tuned, base)
    with pytest.raises(ValueError, match="no delta file: name a new file"):
        extract(base, tuned, base / "model.safetensors")
    with pytest.raises(IsADirectoryError), atomic_path(base) as temporary:
        temporary.write_text("new")
    assert (base / "config.json").is_file() and (base / "model.safetensors").read_bytes() == before
    extract(base, base, delta)  # a delta file is replaced
    assert Delta.open(delta).n_changed == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "d.safetensors", "tuned"]


def test_models_that_do_not_belong_together(tmp_path, pair):
    base, tuned, _ = pair
    grown = hf_models.AutoModelForCausalLM.from_pretrained(tuned)
    grown.resize_token_embeddings(hf_models.ROWS + 1, mean_resizing=False)
    grown.save_pretrained(tmp_path / "grown")
    for name, sizes in (
        ("deeper", {"num_hidden_layers": 3}),
        ("wider", {"hidden_size": 64, "intermediate_size": 96}),
    ):
        config = hf_models.new_config("llama", **sizes)
        hf_models.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    for name, message in (
        ("deeper", "does not belong to"),
        ("wider", r"of another shape((?!vocabulary has grown)[\s\S])*$"),
        ("grown", r"vocabulary has grown.*--vocab base"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(base, tmp_path / name, tmp_path / "new.safetensors")
    assert not list(tmp_path.glob("*new.safetensors*"))


def test_the_base_must_come_in_its_own_dtype_and_shape(pair):
    delta = Delta.open(pair[2])
    name = delta.names[0]
    base = open_weights(pair[0]).read(name)
    for wrong in (base.float(), base[:-1]):
        with pytest.raises(ValueError, match="dtype of its files"):
            delta.tuned(name, wrong)
    with pytest.raises(ValueError, match="no parameter"):
        delta.tuned("strange", base)


def test_a_base_that_cannot_be_written_again_is_refused(tmp_path, monkeypatch):
    """Experts are stored apart and merged on loading; here that cannot be undone."""
    base, tuned, _ = delta_pair(tmp_path, "mixtral")
    monkeypatch.setattr("lota.models.key_mapping.Conversion.undo", lambda self, values: dict(values))
    with pytest.raises(ValueError, match=r"cannot be written as it was read: MixtralForCausalLM converts it"):
        extract(base, tuned, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_names_that_are_not_there_and_equal_files(tmp_path, pair):
    delta = Delta.open(str(pair[2]))
    assert delta.changed("strange") == 0 and delta.positions("strange").tolist() == []
    assert delta.positions("strange").dtype == delta.positions(delta.names[0]).dtype == torch.int64
    (tmp_path / "copy.safetensors").write_bytes(pair[2].read_bytes())
    copied = Delta.open(tmp_path / "copy.safetensors")
    assert delta == copied and hash(delta) == hash(copied) and delta != delta.checksum
    extract(pair[0], pair[0], tmp_path / "none.safetensors")
    assert delta != Delta.open(tmp_path / "none.safetensors")
    assert delta.widest == torch.bfloat16
    assert delta.n_changed == sum(delta.changed(name) for name in delta.names)


def test_a_file_that_is_damaged_after_it_was_opened(pair):
    delta = Delta.open(pair[2])
    begin, end = delta._index.data, delta._index.data + delta._index.codings.bytes
    with open(pair[2], "r+b") as file:
        file.seek(begin)
        file.write(b"\xff" * (end - begin))
    with pytest.raises(ValueError, match=r"d\.safetensors is damaged: "):
        delta.positions(delta.names[0])


def test_only_segments_of_the_part_are_decoded(tmp_path, monkeypatch):
    """Two segments that were read last stay decoded; a part that ends where one begins does not read it."""
    monkeypatch.setattr(index, "SEGMENT", 64)
    state = {"w": torch.zeros(3, 64, dtype=torch.bfloat16)}
    for name, add in (("base", 0), ("tuned", 1)):
        torch.save({"w": state["w"] + add}, tmp_path / f"{name}.pt")
    extract(tmp_path / "base.pt", tmp_path / "tuned.pt", tmp_path / "d.safetensors")
    delta = Delta.open(tmp_path / "d.safetensors")
    plain, read = delta._decoded, []
    delta._decoded = lambda i: read.append(i) or plain(i)
    for start, stop, segments_ in ((64, 128, [1]), (63, 128, [0, 1]), (64, 129, [1, 2]), (0, 192, [0, 1, 2])):
        read.clear()
        assert delta.changes("w", start, stop).positions.tolist() == list(range(stop - start))
        assert read == segments_
    values = torch.ones(66, dtype=torch.bfloat16)
    delta.flip_("w", values, 63)
    assert not values.any()
    values = torch.ones(3, dtype=torch.bfloat16)
    delta.flip_("w", values)
    assert not values.any()
    before = plain.cache_info().misses
    for i in (1, 2, 1, 2):
        plain(i)
    assert plain.cache_info().misses <= before + 2
    plain(0)
    plain(1)
    assert plain.cache_info().misses > before + 1


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_nan_and_infinity_are_no_change(side, value, tmp_path):
    state = {"a": torch.zeros(40, 5), "b": torch.ones(7)}
    for name in ("base", "tuned"):
        one = {n: v.clone() for n, v in state.items()}
        if name == side:
            one["a"][3, 2] = value
        torch.save(one, tmp_path / f"{name}.pt")
    with pytest.raises(ValueError, match=rf"{side}\.pt: a holds NaN or infinity"):
        extract(tmp_path / "base.pt", tmp_path / "tuned.pt", tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists()


@pytest.mark.parametrize("key", ["changed", "entries", "base_hash", "tuned"])
def test_metadata_that_lack_a_key(pair, key):
    """The checksum is that of the changed file, as whoever writes one can compute it."""
    content = pair[2].read_bytes().replace(f'"{key}":'.encode(), f'"{key[:-1]}X":'.encode())
    place, digest = format._checksum(io.BytesIO(content))
    pair[2].write_bytes(content[:place] + digest.encode() + content[place + 64 :])
    with pytest.raises(ValueError, match=rf"d\.safetensors is no whole delta file: its metadata lack {key}"):
        read_index(pair[2])


def test_a_parameter_that_fills_its_segment(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "SEGMENT", 64)
    parameters = [Parameter("a", torch.int8, (8, 8)), Parameter("b", torch.int8, (63,), changed=1)]
    assert [parameter.changed for parameter in parameters] == [0, 1]
    meta = dict.fromkeys(format._REQUIRED - {"changed", "entries"}, "x")
    with TemporaryFile() as data:
        codings = []
        for positions in ([], [62]):
            coding, code = encode(64, np.array(positions, np.int64), np.ones(len(positions), np.uint8))
            codings.append(coding)
            data.write(code)
        written = write_delta(tmp_path / "d.safetensors", parameters, codings, data, meta)
    found = read_index(tmp_path / "d.safetensors")
    assert found.parameters == parameters and codings_of(found) == codings
    assert (written["changed"], written["entries"]) == (1, 127)
    both = [Parameter("a", torch.int8, (8, 8)), Parameter("b", torch.int8, (64,))]
    with TemporaryFile() as data:
        write_delta(tmp_path / "d.safetensors", both, [[0, 0, 0, 0, 0]] * 2, data, meta)
    layout = read_index(tmp_path / "d.safetensors").layout
    assert [layout.entries(i) for i in range(layout.count)] == [64, 64]


def test_a_text_is_no_delta(tmp_path):
    (tmp_path / "a.txt").write_text("no weights at all, only words, and more than eight bytes of them")
    with pytest.raises(ValueError, match=r"a\.txt is no delta file, or its header is damaged"):
        read_index(tmp_path / "a.txt")


def test_the_narrowest_dtype_that_holds_both():
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    pairs = [(bf16, bf16, bf16), (fp16, bf16, fp32), (fp32, bf16, fp32), (fp16, fp16, fp16)]
    pairs += [(e4m3, e4m3, e4m3), (e4m3, e5m2, bf16), (e4m3, bf16, bf16), (e4m3, fp16, fp32)]
    pairs += [(torch.int8, torch.int16, torch.int16), (torch.int8, torch.int8, torch.int8)]
    for a, b, both in pairs:
        assert format.common_dtype(a, b) == format.common_dtype(b, a) == both


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_sums_of_entries_against_whole_numbers(dtype):
    generator = torch.Generator().manual_seed(0)
    width = 8 * dtype.itemsize
    low, high = -(1 << min(width, 63) - 1), (1 << min(width, 63) - 1) - 1
    bits = torch.randint(low, high, (40,), generator=generator, dtype=dtype)
    positions = torch.randint(0, 1 << 40, (40,), generator=generator)
    unsigned = [value % (1 << width) for value in bits.tolist()]
    expected = 7 * sum((2 * p + 1) * b for p, b in zip(positions.tolist(), unsigned, strict=True))
    found = format.entry_checksum(3, positions, bits)
    assert format.checksum_digits(found) == f"{expected % (1 << 64):016x}"
