"""Reading without a slot in the set's table of clients: by copy, and a check that each copy is whole.

A worker that finds the table full is a *guest*. It cannot pin, so what it finds in transit may give way while it
copies it: the core says afterwards which copies are whole (native/guest.c), and the others are asked for again.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import shmloader._native as native

#: How a reference is packed: shml_ref_t in native/shml.h (offset, bytes, descriptor, generation, status, chunk).
REF = struct.Struct("<QQIIII")


class GuestBatch:
    """The records of one batch as a guest finds them, look by look.

    left: indices in the batch of what was not found yet.
    resident: index → packed reference of a record that stays where it is.
    copies: index → the bytes of one that gives way to others.
    """

    def __init__(self, segment: native.Segment, ring: native.Mapping, ids: Sequence[int]) -> None:
        self._segment, self._ring, self._ids = segment, ring, ids
        self.left = list(range(len(ids)))
        self.resident: dict[int, bytes] = {}
        self.copies: dict[int, bytes] = {}

    def look(self) -> tuple[list[int], bytes, int]:
        """Look for what is left: its ids, their packed references as found now, and how many are missing."""
        asked = [self._ids[i] for i in self.left]
        packed, num_missing = self._segment.guest_get(array("Q", asked))
        copied: dict[int, bytes] = {}
        refs: list[bytes] = []  # of what was copied
        for k, (offset, num_bytes, _, _, status, gives_way) in enumerate(REF.iter_unpack(packed)):
            if status != native.READY:
                continue
            ref = packed[k * REF.size : (k + 1) * REF.size]
            if gives_way:
                copied[self.left[k]] = bytes(memoryview(self._ring.view(offset, num_bytes)))
                refs.append(ref)
            else:
                self.resident[self.left[k]] = ref
        if copied:
            is_whole = self._segment.guest_check(b"".join(refs))
            self.copies.update(item for item, whole in zip(copied.items(), is_whole, strict=True) if whole)
        self.left = [i for i in self.left if i not in self.resident and i not in self.copies]
        return asked, packed, num_missing


def copy_error(segment: native.Segment, ring: native.Mapping, record: int) -> bytes | None:
    """The bytes of an error record; None: it is not there (any more)."""
    packed, _ = segment.guest_get(array("Q", [record]))
    offset, num_bytes, _, _, status, _ = REF.unpack(packed)
    if status != native.ERROR:
        return None
    copy = bytes(memoryview(ring.view(offset, num_bytes)))
    return copy if segment.guest_check(packed)[0] else None
