"""Files as a stranger could make them: whole by their checksums, and made to take memory or time."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import zstandard

from lota.models.tensor_files import header_bytes
from lota.share.delta import format

KEYS = ("base", "tuned", "base_hash", "tuned_hash", "base_fingerprint", "tuned_fingerprint")
META = dict.fromkeys(KEYS, "x")


def delta_file(path: Path, index: bytes, data: bytes = b"", changed: int = 0, entries: int = 0) -> Path:
    """A delta file with this index and its right checksum. index: compressed."""
    sizes = {"data": len(data), "index": len(index)}
    tensors = {name: torch.empty(size, dtype=torch.uint8, device="meta") for name, size in sizes.items()}
    meta = META | {"changed": str(changed), "entries": str(entries), "version": "1"}
    head = header_bytes(tensors, {"format": "lota-delta", "checksum": "0" * 64, **meta})[0]
    return sealed(path, head + data + index)


def sealed(path: Path, content: bytes) -> Path:
    """The same with the checksum that belongs to it."""
    place, digest = format._checksum(io.BytesIO(content))
    path.write_bytes(content[:place] + digest.encode() + content[place + 64 :])
    return path


def repeated(before: bytes, part: bytes, times: int, after: bytes) -> bytes:
    """Compressed: a part many times, without holding it all."""
    out, block = io.BytesIO(), part * 10_000
    with zstandard.ZstdCompressor(level=3).stream_writer(out, closefd=False) as writer:
        writer.write(before)
        for _ in range(times // 10_000):
            writer.write(block)
        writer.write(after)
    return out.getvalue()


def zipped(path: Path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(f"a/{name}", content)
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def pickled(path: Path, program: bytes, **records: bytes) -> Path:
    """A file of torch.save with this program for its structure."""
    extra = {f"data/{key.removeprefix('_')}": content for key, content in records.items()}
    return zipped(path, {"data.pkl": b"\x80\x02" + program, "version": b"3\n", **extra})


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nByteStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"


def tensor_program(size: bytes, stride: bytes, numel: bytes = b"K\x08") -> bytes:
    """Of a tensor on the 8 bytes of storage 0. size, stride, numel: instructions that push them."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + numel + b"tQK\x00" + size + stride
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def named(program: bytes) -> bytes:
    """A policy of one value, `w`."""
    names = [b"X%c\x00\x00\x00" % len(name) + name for name in (b"step_idx", b"metrics", b"state", b"w")]
    return b"}(" + names[0] + b"K\x01" + names[1] + b"}" + names[2] + b"}" + names[3] + program + b"su."


def long(number: int) -> bytes:
    data = pickle.encode_long(number)
    return b"\x8a" + bytes([len(data)]) + data


def nested_key() -> bytes:
    """A dict with a key of tuples of tuples, whose hash takes 2^60 steps."""
    doubled = b"".join(b"h%c" % i + b"h%c" % i + b"\x86q%c" % (i + 1) for i in range(60))
    return b")q\x00" + doubled


DELTAS: dict[str, Callable[[Path], Path]] = {
    "rice": lambda p: delta_file(
        p,
        zstandard.compress(b'{"parameters":[["w","bfloat16",[8],1]],"segments":[[1,%d,0,1,1,1]]}' % 10**15),
        b"abc", 1, 8,
    ),
    "shape": lambda p: delta_file(
        p, zstandard.compress(b'{"parameters":[["w","bfloat16",[%d],0]],"segments":[]}' % (1 << 55))
    ),
    "many segments": lambda p: delta_file(
        p,
        repeated(b'{"parameters":[["w","bfloat16",[%d],0]],"segments":[' % (1 << 60), b"[0,0,0,0,0,0],",
                 24_000_000, b"[0,0,0,0,0,0]]}"),
    ),
    "segments of a real size": lambda p: delta_file(  # the most that a small file may have: it is read
        p,
        repeated(b'{"parameters":[["w","bfloat16",[%d],0]],"segments":[' % (1 << 40), b"[0,0,0,0,0,0],",
                 1_040_000, b"[0,0,0,0,0,0]," * 8575 + b"[0,0,0,0,0,0]]}"),
        entries=1 << 40,
    ),
    "many parameters": lambda p: delta_file(
        p,
        zstandard.compress(
            b'{"parameters":[' + b",".join(b'["p%08d","int8",[],0]' % i for i in range(200_000))
            + b'],"segments":[]}'
        ),
    ),
    "zeros": lambda p: delta_file(p, repeated(b"", b"\0" * 100, 3_000_000, b"")),
    "brackets": lambda p: delta_file(p, repeated(b'{"parameters":[', b"[],[],[]," * 10, 1_000_000, b"")),
    "a long name": lambda p: delta_file(p, repeated(b'{"parameters":[["', b"x" * 100, 1_000_000, b'"')),
    "dtype": lambda p: delta_file(
        p, zstandard.compress(b'{"parameters":[["w","nn",[8],0]],"segments":[[0,0,0,0]]}'), entries=8
    ),
    "part": lambda p: whole_segment(p),
    "header": lambda p: written(p, (30_000_000).to_bytes(8, "little") + b"[" + b"[]," * 9_999_999 + b"1] "),
}  # fmt: skip


def whole_segment(path: Path) -> Path:
    """A segment of 2^20 entries whose every part says that it is 1 GiB."""
    part = repeated(b"", b"\0" * 1000, 1_000_000, b"")
    sized = zstandard.ZstdCompressor(level=3).compress(bytes(1 << 28))
    coding = [1, 20, -len(sized), -len(part), -len(part), -len(part)]
    index = {"parameters": [["w", "bfloat16", [1 << 20], 1]], "segments": [coding]}
    text = json.dumps(index, separators=(",", ":")).encode()
    return delta_file(path, zstandard.compress(text), sized + part * 3, 1, 1 << 20)


def directory_of_two_sizes(path: Path) -> Path:
    """300,000 records in a directory whose last record has the mark of a last record within itself."""
    head = b"PK\x01\x02" + struct.pack("<6H3L5H2L", 20, 20, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0)
    records = b"".join(head + b"%06d" % i for i in range(300_000))
    end = struct.pack("<2H2LH", 37_856, 37_856, len(records), 0, 0)
    return written(path, records + b"PK\x05\x06" * 2 + end)


TORCH_FILES: dict[str, Callable[[Path], Path]] = {
    "bytearray": lambda p: pickled(p, named(b"cbuiltins\nbytearray\n" + long(1 << 35) + b"\x85R")),
    "new tensor": lambda p: pickled(p, named(b"ctorch\nFloatTensor\n" + long(1 << 33) + b"\x85R")),
    "hash": lambda p: pickled(p, named(b"}" + nested_key() + b"K\x01s")),
    "key": lambda p: pickled(p, b"}" + nested_key() + b"K\x01s."),
    "copies": lambda p: pickled(
        p,
        b"}q\x00(" + b"".join(b"M" + i.to_bytes(2, "little") + b"N" for i in range(20_000)) + b"u"
        + b"ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R" * 40_000 + b".",
    ),
    "twice": lambda p: pickled(
        p, b"]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i, i - 1, i - 1) for i in range(1, 60)) + b"."
    ),
    "deep": lambda p: pickled(p, b"]" * 300_000 + b"a" * 299_999 + b"."),
    "stride": lambda p: pickled(
        p, named(tensor_program(long(1 << 40) + b"\x85", b"K\x00\x85")), _0=bytes(8)
    ),
    "size": lambda p: pickled(p, named(tensor_program(long(1 << 33) + b"\x85", b"K\x01\x85")), _0=bytes(8)),
    "storage": lambda p: pickled(
        p,
        named(tensor_program(long(1 << 33) + b"\x85", b"K\x01\x85", long(1 << 33))), _0=bytes(8),
    ),
    "dimensions": lambda p: pickled(
        p, named(tensor_program(*[b"(" + b"K\x01" * 10_000 + b"t"] * 2)), _0=bytes(8)
    ),
    "long program": lambda p: pickled(p, b"}" * 10_000_000 + b"."),
    "compressed": lambda p: zipped(
        p, {"data.pkl": b"\x80\x02" + b"}" * 100_000_000 + b".", "version": b"3\n"}, zipfile.ZIP_DEFLATED
    ),
    "records": lambda p: zipped(p, {f"{i}": b"" for i in range(70_000)}),
    "directory of two sizes": lambda p: directory_of_two_sizes(p),
    "dimensions of nothing": lambda p: pickled(  # the products of all but the last take a second per 3,000
        p,
        b"(" + tensor_program(b"(" + long(1 << 62) * 63 + b"K\x00tq\x07", b"h\x07")
        + b"ctorch._utils\n_rebuild_tensor_v2\nq\x08" + STORAGE + b"K\x08tQq\x09"
        + b"h\x08(h\x09K\x00h\x07h\x07\x89NtR" * 34_000 + b"t.",
        _0=bytes(8),
    ),
    # as much structure as a small file may have
    "tuples in tuples": lambda p: pickled(p, b"(" + (b"N" + b"\x85" * 19) * 26_200 + b"t."),
    "dicts": lambda p: pickled(p, b"(" + b"}" * 524_000 + b"t."),
    "one tuple often": lambda p: pickled(
        p, b"}X\x01\x00\x00\x00a(" + b"K\x01" * 64 + b"tq\x00](" + b"h\x00" * 255_000 + b"es."
    ),
}  # fmt: skip
