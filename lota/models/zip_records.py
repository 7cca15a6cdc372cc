"""Where the records of a zip archive of `torch.save` lie, and whether they are as they were written.

A file of torch.save is a zip archive with its records stored as they are; every record has a CRC-32. A
stranger's archive may list more than it holds: what is read of its directory is bounded by its size.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

_SLACK = 1 << 19  # bytes of its directory that every archive may have
_PER_FILE = 64  # one byte more for so many of the file
_BLOCK = 1 << 20  # bytes read at a time

_whole: set[tuple[Path, int, int, int]] = set()  # files whose records this process has found as they were


class NotSupported(ValueError):
    """A file that may be whole, but is more than is read, or laid out otherwise."""


class Record(NamedTuple):
    offset: int  # byte of the file at which its content begins
    size: int
    crc: int


class _Bounded:
    """A file of which zipfile, which reads a directory as long as any of its records says, reads little."""

    def __init__(self, file: BinaryIO, size: int):
        self.seek, self.tell, self.file, self.most = file.seek, file.tell, file, _SLACK + size // _PER_FILE

    def read(self, size: int = -1) -> bytes:
        """Raises NotSupported for a directory that is too large."""
        if size > self.most:
            raise NotSupported(
                f"its directory takes {size:,} bytes, and at most {self.most:,} are read: copy it"
                " again, or put fewer small tensors into one file"
            )
        return self.file.read(size)


def read_records(file: BinaryIO, size: int) -> dict[str, Record]:
    """Name -> record of an archive. size: bytes of the file.

    Raises ValueError for what is no archive, damaged or compressed (NotSupported: for a directory too large).
    """
    try:
        if not zipfile.is_zipfile(_Bounded(file, size)):
            raise ValueError("it is no zip archive, or its end is missing")
        return dict(_listed(file, size))
    except (zipfile.BadZipFile, OSError, NotImplementedError, IndexError) as error:
        raise ValueError(f"its directory is damaged: {error}") from error


def check_records(path: Path, file: BinaryIO, records: Mapping[str, Record]) -> None:
    """Compare every record with its CRC-32, once per process. Raises ValueError for one that has changed."""
    status = path.stat()
    whole = (path.resolve(), status.st_size, status.st_mtime_ns, status.st_ino)
    if whole not in _whole:
        for name, record in records.items():
            _check_crc(file, name, record)
        _whole.add(whole)


def content_of(file: BinaryIO, record: Record) -> bytes:
    file.seek(record.offset)
    return file.read(record.size)


def _listed(file: BinaryIO, size: int) -> Iterator[tuple[str, Record]]:
    """The records of an archive that lie in it uncompressed, one after another."""
    total = 0
    with zipfile.ZipFile(_Bounded(file, size)) as archive:
        listed = archive.infolist()
    if len({info.filename for info in listed}) < len(listed):
        raise ValueError("it has two records of one name")
    for info in listed:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError("it is compressed, which torch.save never does")
        file.seek(info.header_offset)
        head = file.read(30)
        if head[:4] != b"PK\x03\x04":
            raise ValueError(f"its record {info.filename[:100]} is not where it should be")
        # behind the head: the name and an extra field, of these lengths
        offset = info.header_offset + 30 + int.from_bytes(head[26:28], "little")
        offset += int.from_bytes(head[28:30], "little")
        total += info.file_size
        if offset + info.file_size > size or total > size:
            raise ValueError(f"its record {info.filename[:100]} lies outside of it")
        yield info.filename, Record(offset, info.file_size, info.CRC)


def _check_crc(file: BinaryIO, name: str, record: Record) -> None:
    """Raise ValueError for a record with another CRC-32 than its directory has; there, 0 stands for none."""
    file.seek(record.offset)
    found, left = 0, record.size
    while left > 0 and (block := file.read(min(left, _BLOCK))):
        found, left = zlib.crc32(block, found), left - len(block)
    if left or (record.crc and found != record.crc):
        raise ValueError(f"its record {name[:100]} has changed since it was written: its CRC-32 does not fit")
