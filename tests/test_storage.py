"""Files are whole or absent, checksums find what has changed, and files that grow are cut at whole lines."""

from __future__ import annotations

import errno
import os
import weakref
import zipfile

import pytest
import torch

from lota.storage import (
    atomic_path,
    blank,
    cut,
    file_hash,
    naming,
    read_checksums,
    refuse_foreign,
    save_tensors,
    verify_checksum,
    whole_lines,
    write_checksums,
    write_json,
)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_folder_is_replaced_or_stays(tmp_path, monkeypatch, fails_at):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    real, calls = os.replace, []

    def replace(*paths):
        calls.append(paths)
        if len(calls) == fails_at:
            raise OSError(errno.EIO, "Input/output error")
        real(*paths)

    monkeypatch.setattr("lota.storage.os.replace", replace)
    with pytest.raises(OSError), atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["folder", "folder/old"]


def test_errors_of_writing_name_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left.*results\.json"), naming(tmp_path / "results.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match="absent"), naming("results.json"):
        (tmp_path / "absent").read_text()


@pytest.mark.parametrize("lies_there", ["file", "folder", "link"])
def test_only_its_own_kind_is_replaced(tmp_path, lies_there):
    path = tmp_path / "a.pt"
    {"file": path.touch, "folder": path.mkdir, "link": lambda: path.symlink_to("nowhere")}[lies_there]()
    with pytest.raises(ValueError, match=r"out=.*a\.pt exists and is no mask file"):
        refuse_foreign("out", path, "mask file", lambda path: False)


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to("target")
    write_json(tmp_path / "link", 1)
    assert (tmp_path / "target").read_text() == "mine" and not (tmp_path / "link").is_symlink()


# Checksums, and files that grow


def test_checksums_find_a_flipped_bit(tmp_path):
    sums = {"a.pt": save_tensors({"x": list(range(1000))}, tmp_path / "a.pt")}
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "b").write_bytes(b"content")
    write_checksums(tmp_path, sums)
    assert set(read_checksums(tmp_path)) == {"a.pt", "inside/b"}
    verify_checksum(tmp_path / "a.pt")
    verify_checksum(tmp_path / "checksums.json")  # which is in no list
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.pt is damaged"):
        verify_checksum(tmp_path / "a.pt")


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "[" * 100_000])
def test_a_damaged_list_of_checksums_is_named(tmp_path, text):
    (tmp_path / "checksums.json").write_text(text)
    with pytest.raises(ValueError, match=r"checksums\.json is damaged"):
        read_checksums(tmp_path)


def test_lines_end_at_newlines_alone(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes('{"a": "\u2028\u0085\x0b\r"}\n\n{"b": "ü'.encode()[:-1])
    ends, lines = zip(*whole_lines(path), strict=True)
    assert lines == ('{"a": "\u2028\u0085\x0b\r"}'.encode(), b"")
    inode = path.stat().st_ino
    cut(path, ends[-1])
    assert path.read_bytes() == b"\n".join(lines) + b"\n" and path.stat().st_ino == inode


def test_a_file_written_tensor_by_tensor_is_what_torch_save_writes(tmp_path):
    """Tied tensors share their place, and no two values are asked for at once."""
    a, b = torch.randn(5, 7), torch.randn(600).to(torch.bfloat16)
    content = {"step": 3, "state": {"a": a, "b": b, "tied": a, "n": torch.arange(3), "none": torch.empty(0)}}
    save_tensors(content, tmp_path / "whole.pt")
    first = blank(a.shape, a.dtype)
    blanks = {"a": first, "b": blank(b.shape, b.dtype), "tied": first}
    blanks |= {"n": blank((3,), torch.int64), "none": blank((0,), torch.float32)}
    alive = []

    def values():
        for name in ("a", "b", "n", "none"):
            assert not [ref for ref in alive if ref() is not None]
            value = content["state"][name].clone()
            alive.append(weakref.ref(value))
            yield value
            del value

    digest = save_tensors({"step": 3, "state": blanks}, tmp_path / "filled.pt", values())
    assert digest == file_hash(tmp_path / "filled.pt")
    with zipfile.ZipFile(tmp_path / "filled.pt") as filled, zipfile.ZipFile(tmp_path / "whole.pt") as whole:
        assert filled.testzip() is None
        sizes = [
            [(i.filename.partition("/")[2], i.file_size) for i in z.infolist()][1:] for z in (filled, whole)
        ]
    assert sizes[0] == sizes[1]
    read = torch.load(tmp_path / "filled.pt", weights_only=True)
    assert read["step"] == 3 and list(read["state"]) == list(content["state"])
    for name, value in content["state"].items():
        assert torch.equal(read["state"][name], value) and read["state"][name].dtype == value.dtype
    assert read["state"]["tied"].data_ptr() == read["state"]["a"].data_ptr()
