"""Headers of safetensors files, read and written, against the safetensors library; damaged ones are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lota.models.policy import index_torch_file
from lota.models.tensor_files import (
    checkpoint_files,
    header_bytes,
    is_delta,
    new_safetensors,
    read_header,
    read_metadata,
)
from lota.models.weights import open_weights

DTYPES = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "complex64", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
    "bool",
]  # fmt: skip


def of_every_dtype() -> dict[str, torch.Tensor]:
    """A tensor of 2 x 3 entries per dtype that safetensors knows."""
    return {name: torch.tensor([[0, 1, 1], [1, 0, 1]]).to(getattr(torch, name)) for name in DTYPES}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def test_what_safetensors_writes_is_read(tmp_path):
    state = of_every_dtype()
    save_file(state, tmp_path / "x.safetensors", metadata={"a": "b"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == read_metadata(tmp_path / "x.safetensors") == {"a": "b"}
    source = open_weights(tmp_path / "x.safetensors")
    assert set(header.entries) == set(source.names()) == set(state)
    assert all(same_bits(source.read(name), value) for name, value in state.items())
    assert min(entry.offset for entry in header.entries.values()) == header.data_start


def test_what_we_write_is_read_by_safetensors(tmp_path):
    state = {**of_every_dtype(), "empty": torch.empty(0, 4), "scalar": torch.tensor(1.5)}
    with new_safetensors(tmp_path / "x.safetensors", state, {"a": "b"}) as put:
        for name in reversed(state):
            put(name, state[name])
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(state)
    assert all(same_bits(found[name], value) for name, value in state.items())
    assert read_metadata(tmp_path / "x.safetensors") == {"a": "b"}


def test_the_scales_of_mx_formats(tmp_path):
    """safetensors knows F8_E8M0, its torch part does not yet."""
    value = torch.arange(8, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with new_safetensors(tmp_path / "x.safetensors", {"x": value}) as put:
        put("x", value)
    assert same_bits(open_weights(tmp_path / "x.safetensors").read("x"), value)


def test_a_dtype_that_no_file_holds(tmp_path):
    state = {"x": torch.zeros(2, dtype=torch.complex128)}
    with pytest.raises(ValueError, match=r"^x is torch\.complex128, which a safetensors file cannot hold"):
        header_bytes(state)
    with pytest.raises(ValueError, match=r"y\.safetensors cannot be written: x is torch\.complex128"):
        new_safetensors(tmp_path / "y.safetensors", state).__enter__()
    assert not (tmp_path / "y.safetensors").exists()


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: object, length: int | None = None, data: bytes = b"\0" * 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": {**GOOD, "dtype": "F4"}}, "x: its dtype F4 is not known"),
        ({"x": {**GOOD, "dtype": ["F32"]}}, "x: "),
        ({"x": {**GOOD, "shape": [3]}}, "x: the tensor lies outside"),
        ({"x": {**GOOD, "shape": [1 << 62, 1 << 62]}}, "x: the tensor lies outside"),
        ({"x": {**GOOD, "shape": [-1, -2]}}, "x: its shape and data_offsets"),
        ({"x": {**GOOD, "shape": [2.0]}}, "x: its shape and data_offsets"),
        ({"x": {**GOOD, "data_offsets": [-8, 0]}}, "x: its shape and data_offsets"),
        ({"x": {**GOOD, "data_offsets": [8, 16]}}, "x: the tensor lies outside"),
        ({"x": {**GOOD, "data_offsets": [0]}}, "x: "),
        ({"x": {"dtype": "F32"}}, "x: "),
        ({"x": [1]}, "x: "),
        ({"x": GOOD, "__metadata__": {"a": 1}}, "metadata"),
        ([GOOD], "its header is no dict"),
        (b"[" * 200_000, "truncated or no safetensors file"),
        (b"\xff\xfe", "truncated or no safetensors file"),
    ],
)
def test_damaged_headers_are_named(header, message, tmp_path):
    path = write(tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match=rf"x\.safetensors is .*{message}"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "is truncated or .*: its header"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "is truncated or .*: its header"),
        (b"", "is empty: copy or download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, .* run `git lfs pull`"),
        (b"\n<!DOCTYPE html><title>404</title>", "is a web page, .*: download it again"),
        (b"<html>", "is a web page"),
    ],
)
def test_files_without_a_header_are_named(content, message, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for read in (read_header, read_metadata, index_torch_file):
        if read != index_torch_file or not message.startswith("is trunc"):
            with pytest.raises(ValueError, match=rf"x\.safetensors {message}"):
                read(path)
    assert not is_delta(path)


def test_a_delta_is_known_by_its_metadata_even_if_cut_off(tmp_path):
    path = write(tmp_path / "x.safetensors", {"x": GOOD, "__metadata__": {"format": "lota-delta"}}, data=b"")
    assert is_delta(path)
    with pytest.raises(ValueError, match="lies outside"):
        read_header(path)
    assert not is_delta(write(tmp_path / "y.safetensors", {"x": GOOD}))


def test_tensors_fill_their_file(tmp_path):
    """As safetensors itself has it: no byte between them, behind them, or of two of them."""
    second = {**GOOD, "data_offsets": [8, 16]}
    write(tmp_path / "x.safetensors", {"x": GOOD, "y": second}, data=bytes(16))
    assert set(read_header(tmp_path / "x.safetensors").entries) == {"x", "y"}
    for name, header, size in (
        ("hole", {"x": GOOD, "y": {**GOOD, "data_offsets": [16, 24]}}, 24),
        ("before", {"y": second}, 16),
        ("behind", {"x": GOOD}, 16),
        ("overlap", {"x": GOOD, "y": GOOD}, 8),
    ):
        path = write(tmp_path / f"{name}.safetensors", header, data=bytes(size))
        with pytest.raises(ValueError, match="its tensors do not fill the file, they overlap"):
            read_header(path)
        with pytest.raises(SafetensorError):
            load_file(path)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/x", "a/b", "..", "", ".", 3, None, "a\\b"])
@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_an_index_names_files_of_its_folder_only(shard, stem, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ValueError, match=r"index\.json .* names .*, which is no file of its folder"):
        checkpoint_files(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 200_000, "is no index of weight shards"),
        ("version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        ("{}", "is no index of weight shards"),
        ('{"weight_map": []}', "is no index of weight shards"),
    ],
)
def test_a_damaged_index_is_named(content, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json {message}"):
        checkpoint_files(tmp_path)
