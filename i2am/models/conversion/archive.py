"""Records of zip archives, as torch writes checkpoints since 1.6: every one read is checked."""

import logging
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

log = logging.getLogger("i2am")

CHUNK = 1 << 22
_HEADER = struct.Struct("<4s5H3L2H")  # in front of the name of a record
_SIZES_FOLLOW = 8  # flag: checksum and sizes stand behind the record, zeros in front of it
_UTF_8 = 0x800
_WIDE = 0xFFFFFFFF  # in place of a size that takes 64 bits


@dataclass(frozen=True)
class Record:
    """One file of an archive.

    Args:
        name: Its name, with folders.
        begin: Where its bytes begin in the archive.
        packed: How many there are.
        size: How many bytes it unpacks to.
        is_packed: Whether it is compressed.
        checksum: CRC-32 of the unpacked bytes, None in an archive without checksums.
    """

    name: str
    begin: int
    packed: int
    size: int
    is_packed: bool
    checksum: int | None


class Archive:
    """A zip archive whose directory agrees with what stands in front of the records.

    Args:
        file: Open for reading; it stays open as long as records are read.
        what: How to call it in a warning.

    Attributes:
        records: By name.

    Raises:
        ValueError: Two records have one name or overlap, sizes contradict each other, or one is
            encrypted or compressed otherwise than by deflation.
        Exception: What zipfile raises over a damaged directory.
    """

    def __init__(self, file: IO[bytes], *, what: str) -> None:
        self._file = file
        with zipfile.ZipFile(file) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.header_offset)
            end = archive.start_dir
        # torch.serialization.set_crc32_options(False)
        unchecked = any(member.file_size for member in members) and not any(
            member.CRC for member in members
        )
        if unchecked:
            log.warning("%s was written without checksums: damage may not show", what)
        self.records: dict[str, Record] = {}
        free = 0
        for member in members:
            name = member.orig_filename
            if name in self.records:
                raise ValueError(f"two records are named {name}")
            if member.header_offset < free:
                raise ValueError(f"record {name} overlaps another one")
            record = _record(file, member, unchecked)
            free = record.begin + record.packed
            if free > end:
                raise ValueError(f"record {name} is cut off")
            self.records[name] = record

    def read(self, name: str, *, most: int) -> bytearray:
        """The bytes of a record of no more than so many.

        Raises:
            KeyError: There is none of that name.
            ValueError: It is larger, or damaged.
        """
        record = self.records[name]
        if record.size > most:
            raise ValueError(f"record {name} has {record.size} bytes, more than {most}")
        return self.unpacked(record)

    def unpacked(self, record: Record) -> bytearray:
        """The bytes of a record; takes its size in memory, which the directory tells.

        Raises:
            ValueError: It is damaged.
        """
        content = bytearray(record.size)
        end = 0
        for piece in self._pieces(record):
            content[end : end + len(piece)] = piece
            end += len(piece)
        return content

    def check(self, record: Record) -> None:
        """Reads a record without keeping it.

        Raises:
            ValueError: It is damaged.
        """
        if record.checksum is not None:
            for _ in self._pieces(record):
                pass

    def _pieces(self, record: Record) -> Iterator[bytes]:
        """The unpacked bytes, a few at a time: at the end it is known that they are right."""
        size = checksum = 0
        for piece in self._inflated(record) if record.is_packed else self._stored(record):
            size += len(piece)
            if size > record.size:
                break
            checksum = zlib.crc32(piece, checksum)
            yield piece
        if size != record.size:
            raise ValueError(
                f"record {record.name} does not have the {record.size} bytes it claims"
            )
        if record.checksum not in (None, checksum):
            raise ValueError(f"record {record.name} is damaged: its checksum is another one")

    def _stored(self, record: Record) -> Iterator[bytes]:
        self._file.seek(record.begin)
        left = record.packed
        while left and (piece := self._file.read(min(left, CHUNK))):
            left -= len(piece)
            yield piece

    def _inflated(self, record: Record) -> Iterator[bytes]:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        for packed in self._stored(record):
            while packed and not inflate.eof:
                yield inflate.decompress(packed, CHUNK)
                packed = inflate.unconsumed_tail
        yield inflate.flush()
        if not inflate.eof or inflate.unused_data:
            raise ValueError(f"record {record.name} is not compressed as it claims")


def _record(file: IO[bytes], member: zipfile.ZipInfo, unchecked: bool) -> Record:
    """What the directory says of a record, if the header in front of it says the same."""
    name = member.orig_filename
    if member.flag_bits & 1:
        raise ValueError(f"record {name} is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(
            f"record {name} is compressed by method {member.compress_type}, which torch cannot read"
        )
    file.seek(member.header_offset)
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise ValueError(f"record {name} is cut off")
    signature, _, flags, method, _, _, checksum, packed, size, letters, more = _HEADER.unpack(
        header
    )
    written = file.read(letters)
    extra = file.read(more)
    if _WIDE in (packed, size):
        packed, size = _wide_sizes(extra, packed, size)
    said = (checksum, packed, size)
    wanted = (member.CRC, member.compress_size, member.file_size)
    agrees = (
        signature == b"PK\x03\x04"
        and written.decode("utf-8" if flags & _UTF_8 else "cp437") == name
        and (flags & 1, method) == (0, member.compress_type)
        and (said == wanted or (bool(flags & _SIZES_FOLLOW) and not any(said)))
    )
    if not agrees:
        raise ValueError(f"record {name} is described in two ways")
    is_packed = member.compress_type != zipfile.ZIP_STORED
    if not is_packed and member.compress_size != member.file_size:
        raise ValueError(
            f"record {name} is stored in {member.compress_size} bytes and claims {member.file_size}"
        )
    begin = member.header_offset + _HEADER.size + letters + more
    return Record(
        name,
        begin,
        member.compress_size,
        member.file_size,
        is_packed,
        None if unchecked else member.CRC,
    )


def _wide_sizes(extra: bytes, packed: int, size: int) -> tuple[int, int]:
    """Packed and unpacked size of a header where one or both take 64 bits."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = [number for (number,) in struct.iter_unpack("<Q", extra[4 : 4 + length])]
            size = wide.pop(0) if size == _WIDE else size
            packed = wide.pop(0) if packed == _WIDE else packed
            return packed, size
        extra = extra[4 + length :]
    raise ValueError("a size is missing")
