"""The members of a tar file, by its headers alone: names, places and sizes. Nothing is unpacked.

Formats: the POSIX.1-1988 (ustar) and POSIX.1-2001 (pax) interchange formats of IEEE Std 1003.1, "pax - portable archive
interchange", and GNU tar's long names and base-256 numbers (GNU tar manual, "Basic Tar Format"). The standard library's
tarfile reads the same in three to four times the time, which counts at a billion headers; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
# Of a long name or of pax records. A hostile header may announce any size.
_MAX_EXTENSION = 1 << 20
_REGULAR = b"0\07"
_GNU_LONG_NAME, _GNU_LONG_LINK, _GNU_SPARSE, _PAX, _PAX_SUN, _PAX_GLOBAL = b"LKSxXg"

# (start, length) -> the bytes there, fewer at the end of the file.
Read = Callable[[int, int], bytes]


class DamagedTar(ValueError):
    """The walk cannot go on: what is wrong and where."""


class Member(NamedTuple):
    """A regular file in a tar file.

    Attributes:
      name: as the archive has it, bytes that are not UTF-8 as surrogates. Data: never a path to open.
      header: offset of its first header block, which extensions of the header precede the last of.
      offset: of its first byte.
      size: bytes.
    """

    name: str
    header: int
    offset: int
    size: int


def walk(read: Read, size: int, start: int = 0, passed: Callable[[str], object] | None = None) -> Iterator[Member]:
    """Yields the regular files in order; folders, links, devices and sparse files are passed over.

    Args:
      read: gives the file's bytes; is asked in ascending order.
      size: of the file, bytes.
      start: offset of a header to begin at.
      passed: is called with the name of each link and sparse file, which are passed over.

    Raises:
      DamagedTar: the file ends before its end, or something else than a header stands where one should. The last member
        yielded before may then reach past the end of the file.
    """
    at = first = start
    name: str | None = None
    pax: dict[str, str] = {}
    while at < size:
        block = read(at, BLOCK)
        if len(block) < BLOCK:
            raise DamagedTar(f"it ends inside a header at byte {at}")
        if not block.strip(b"\0"):  # the end of the archive: two such blocks, of which many writers leave one out
            return
        if not _is_header(block):
            raise DamagedTar(f"there is no tar header at byte {at}")
        length, kind = _number(block[124:136], at), block[156]
        data = at + BLOCK
        if kind in (_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX, _PAX_SUN, _PAX_GLOBAL):
            if length > _MAX_EXTENSION:
                raise DamagedTar(f"a header at byte {at} announces a name of {length} bytes")
            content = read(data, length)
            if len(content) < length:
                raise DamagedTar(f"it ends inside a header at byte {at}")
            if kind == _GNU_LONG_NAME:
                name = _text(content.partition(b"\0")[0])
            elif kind in (_PAX, _PAX_SUN):
                pax |= _records(content, at)
            # Global records are passed over: one path or one size for all files that follow cannot be meant.
            at = data + _padded(length)
            continue
        if kind == _GNU_SPARSE:
            data = _after_sparse_map(read, block, data)
        if "size" in pax:
            if not (pax["size"].isascii() and pax["size"].isdigit() and len(pax["size"]) < 20):
                raise DamagedTar(f"a header at byte {at} has the size {pax['size'][:40]!r}")
            length = int(pax["size"])
        member = Member(pax.get("path", name or _name(block)), first, data, length)
        if kind not in _REGULAR or (kind == 0 and member.name.endswith("/")):
            # Of links, devices and folders no data follow, whatever their size says; of unknown kinds they do.
            length = 0 if kind in b"\000123456" else length
            if passed is not None and kind in b"12S":
                passed(member.name)
        elif not any(key.startswith("GNU.sparse.") for key in pax):
            yield member
        elif passed is not None:
            passed(pax.get("GNU.sparse.name", member.name))
        at = first = data + _padded(length)
        name, pax = None, {}
        if at > size and data + length > size:
            raise DamagedTar(f"it ends inside {member.name[:200]!r}, which begins at byte {member.header}")
    if first != at:
        raise DamagedTar("it ends after the first part of a header")


def name_in(header: bytes) -> tuple[str, int]:
    """The name and the size that a whole header tells: the bytes of a tar file from Member.header to Member.offset.

    Raises:
      DamagedTar: they are no header.
    """

    def read(start: int, length: int) -> bytes:
        return header[start : start + length]

    if len(header) == BLOCK and _is_header(header) and header[156] in _REGULAR:  # nearly all are so
        return _name(header), _number(header[124:136], 0)
    # A member that ends past the end of the file is told after it was yielded.
    member = next(walk(read, len(header)), None)
    if member is None or member.offset != len(header):
        raise DamagedTar("there is no tar header")
    return member.name, member.size


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _is_header(block: bytes) -> bool:
    """Whether the checksum is right, which sums the block's bytes with its own eight taken as blanks."""
    try:
        wanted = int(block[148:156].partition(b"\0")[0] or b"x", 8)
    except ValueError:
        return False
    # Zeros, of which most of a header consists, are left out: they only take time.
    rest = (block[:148] + block[156:]).translate(None, b"\0")
    total = sum(rest) + 8 * 32
    return wanted == total or wanted == total - 256 * sum(byte > 127 for byte in rest)  # old writers sum signed bytes


def _number(field: bytes, at: int) -> int:
    """Octal digits, or base 256 where the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    try:
        if digits and not digits.isdigit():
            raise ValueError
        return int(digits or b"0", 8)
    except ValueError:
        raise DamagedTar(f"a header at byte {at} has the size {field!r}") from None


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return _text(name)


def _records(content: bytes, at: int) -> dict[str, str]:
    """Pax records, each `length keyword=value` and a line's end, in which length counts itself."""
    found = {}
    place = 0
    while place < len(content) and content[place]:
        digits, blank, _ = content[place : place + 20].partition(b" ")
        length = int(digits) if blank and digits.isdigit() else 0
        record = content[place + len(digits) + 1 : place + length]
        keyword, equals, value = record.partition(b"=")
        if length <= len(digits) + 1 or place + length > len(content) or not equals or record[-1:] != b"\n":
            raise DamagedTar(f"a header at byte {at} has a damaged pax record")
        found[_text(keyword)] = _text(value[:-1])
        place += length
    return found


def _after_sparse_map(read: Read, block: bytes, data: int) -> int:
    """Where the data of an old GNU sparse file begin: after the blocks with the rest of its map."""
    more = block[482]
    while more:
        block = read(data, BLOCK)
        if len(block) < BLOCK:
            raise DamagedTar(f"it ends inside a header at byte {data}")
        more = block[504]
        data += BLOCK
    return data
