"""Checksums of what lies in shared memory or on disk, for ``SHMLOADER_VERIFY``: who writes seals, who reads checks.

CRC-32 (zlib's: IEEE 802.3, reflected polynomial 0xEDB88320) of all bytes but the checksum's own 8, whose low half it
is; the upper half says that there is one. It is to find stray writes and bad memory, not forgeries: any burst of up to
32 bits is found for sure, anything else but for one in 4 billion. The standard library has it, and nothing that it
has is faster by enough to matter: with checksums no speed is to be measured.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import IO, Any

_SEAL = struct.Struct("<II")  # CRC-32, _IS_SEALED
#: Of the upper half: there is a checksum.
_IS_SEALED = 1
#: Bytes that a checksum takes.
SEAL_BYTES = _SEAL.size
#: Where a sample's record has its own: `seal` of shml_record_t in native/shml.h.
RECORD_AT = 8


@dataclass(frozen=True)
class Damage:
    """A checksum that is not right. expected: as written, None: it is gone. found: of the bytes as they are."""

    expected: int | None
    found: int

    @property
    def told(self) -> str:
        """What was expected, in words."""
        return "one that is gone" if self.expected is None else f"{self.expected:#010x}"


def seal(data: memoryview, at: int) -> None:
    """Write the checksum of ``data`` (writable bytes) to its bytes ``at`` to ``at + SEAL_BYTES``."""
    _SEAL.pack_into(data, at, _crc(data, at), _IS_SEALED)


def damage(data: memoryview, at: int) -> Damage | None:
    """What is wrong with ``data``, whose checksum `seal` wrote ``at``; None: nothing."""
    if len(data) < at + SEAL_BYTES:
        return Damage(None, zlib.crc32(data))
    told, is_sealed = _SEAL.unpack_from(data, at)
    found = _crc(data, at)
    if is_sealed == _IS_SEALED and told == found:
        return None
    return Damage(told if is_sealed == _IS_SEALED else None, found)


class Sealing(io.RawIOBase):
    """Passes on to ``file`` what is written, front to back, and seals it in the end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._crc, self._at = file, 0, 0

    def writable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes that were written."""
        return self._at

    def write(self, data: Any, /) -> int:
        """All of it."""
        with memoryview(data) as view, view.cast("B") as part:
            self._crc = zlib.crc32(part, self._crc)
            self._at += len(part)
            self._file.write(part)
            return len(part)

    def seal(self, num_bytes: int) -> None:
        """Fill up to ``num_bytes`` with zeros, the last `SEAL_BYTES` with the checksum: as `seal` there."""
        self.write(bytes(num_bytes - SEAL_BYTES - self._at))
        self._file.write(_SEAL.pack(self._crc, _IS_SEALED))


def _crc(data: memoryview, at: int) -> int:
    return zlib.crc32(data[at + SEAL_BYTES :], zlib.crc32(data[:at]))
