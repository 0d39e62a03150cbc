"""Keyed permutations of 0 … size - 1 that are computed, not stored.

A permutation of a billion rows takes a few words: a *Feistel network* over pairs of digits. ``x`` is split into
``left, right = divmod(x, b)`` with ``left < a``; in turns each half is moved on, in its own circle, by a number that
depends on the other half and a key: ``left = (left + f(right, key)) % a``. Each such step can be taken back, so all of
them together are a bijection of 0 … a*b - 1. As ``a`` and ``b`` are about √size, fewer than ``a`` numbers lie beyond
``size``; an ``x`` that lands there is sent through again until it does not (*cycle walking*), which leaves a bijection
of 0 … size - 1 and is needed for one in √size of them.

Everything is integer arithmetic modulo 2**64: the same numbers on every machine and with every version of numpy. They
are part of what a user relies on (a run can be repeated, a checkpoint resumed): the golden values in
``tests/test_permutation.py`` must never change.

Source: J. Black, P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (generalised Feistel networks and
cycle walking). f: the finaliser of SplitMix64 (G. Steele, D. Lea, C. Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014), brought to 0 … a - 1 by a multiplication (D. Lemire, "Fast Random Integer Generation in an
Interval", 2019). Keys: BLAKE2b (RFC 7693). This mixes well; it is no encryption.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shmloader.errors import OptionError

Keys: TypeAlias = tuple[int, ...]
Rows: TypeAlias = npt.NDArray[np.int64]
_Words: TypeAlias = npt.NDArray[np.uint64]

#: Steps of the network: each half is moved four times. Measured, over 20,000 keys at sizes of 65 to 257: with 4 the
#: differences of neighbours are far from even (chi² 500 standard deviations off), with 6 still by up to 9, with 8 no
#: statistic that we tried tells the permutations from numpy's.
NUM_ROUNDS = 8
#: Up to this size the permutation is a table: a network over a handful of numbers cannot reach all of their
#: permutations equally often.
TABLE_SIZE = 64
#: The largest: the two halves must fit 32 bits, and rows are int64.
MAX_SIZE = (1 << 63) - 1
#: Numbers that are sent through the network at once: its temporaries stay in the L2 cache (measured: 43 M rows/s, with
#: blocks of 1,024 it is 12 M).
_BLOCK = 16384
#: With this many numbers or fewer Python's integers are faster than numpy's calls (measured: 4 µs for each against
#: 60 µs for an array).
_FEW = 16

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB
_U1, _U2 = np.uint64(_M1), np.uint64(_M2)
_U27, _U30, _U32 = np.uint64(27), np.uint64(30), np.uint64(32)


def make_keys(purpose: str, *numbers: int) -> Keys:
    """`NUM_ROUNDS` keys of 64 bits, a hash of ``purpose`` and of any integers, negative and large ones included."""
    digest = blake2b(purpose.encode() + b"\0", digest_size=8 * NUM_ROUNDS, person=b"shmloader order")
    for number in numbers:
        # Two's complement behind its length, so that no two lists of numbers give the same bytes.
        num_bytes = number.bit_length() // 8 + 1
        digest.update(num_bytes.to_bytes(8, "little") + number.to_bytes(num_bytes, "little", signed=True))
    found = digest.digest()
    return tuple(int.from_bytes(found[at : at + 8], "little") for at in range(0, len(found), 8))


class Permutation:
    """A bijection of 0 … size - 1, chosen by ``keys`` (`make_keys`).

    It has a few words, or up to `TABLE_SIZE` (64) numbers a table, whatever its size. Up to there it is exact: each
    of the permutations is as likely as any other (Fisher-Yates). Beyond, nothing that we measured tells it from a
    random one, but of course most of the size! permutations cannot be reached by 512 bits of keys.

    Not changed after construction: any number of threads may use it.
    """

    def __init__(self, size: int, keys: Keys) -> None:
        assert 0 <= size <= MAX_SIZE
        assert len(keys) == NUM_ROUNDS
        self.size = size
        self._table: list[int] | None = None
        if size <= TABLE_SIZE:
            self._table = _shuffled(size, keys[0])
            self._places = [0] * size
            for place, value in enumerate(self._table):
                self._places[value] = place
            return
        a = math.isqrt(size - 1) + 1
        b = -(-size // a)
        self._b = b
        self._pairs = tuple(zip(keys[0::2], keys[1::2], strict=True))
        self._modulus = (a, b)

    def __getitem__(self, index: int) -> int:
        """Where the permutation takes ``index``; both in 0 … size - 1."""
        if not 0 <= index < self.size:
            raise IndexError(f"{index} is not in 0 … {self.size - 1}")
        if self._table is not None:
            return self._table[index]
        index = self._forward(index)
        while index >= self.size:
            index = self._forward(index)
        return index

    def index(self, value: int) -> int:
        """The inverse: the number that the permutation takes to ``value``."""
        if not 0 <= value < self.size:
            raise IndexError(f"{value} is not in 0 … {self.size - 1}")
        if self._table is not None:
            return self._places[value]
        value = self._backward(value)
        while value >= self.size:
            value = self._backward(value)
        return value

    def take(self, indices: Rows) -> Rows:
        """`__getitem__` of each: int64 [n] in, int64 [n] out. They must be in 0 … size - 1: nothing checks it."""
        return self._many(indices, self._table, is_inverse=False)

    def find(self, values: Rows) -> Rows:
        """`index` of each: int64 [n] in, int64 [n] out. They must be in 0 … size - 1: nothing checks it."""
        return self._many(values, None if self._table is None else self._places, is_inverse=True)

    def _many(self, numbers: Rows, table: list[int] | None, is_inverse: bool) -> Rows:
        if table is not None:
            return np.array(table, np.int64)[numbers]
        one = self.index if is_inverse else self.__getitem__
        if len(numbers) <= _FEW:
            return np.array([one(number) for number in numbers.tolist()], np.int64)
        found = np.empty(len(numbers), np.int64)
        for start in range(0, len(numbers), _BLOCK):
            block = self._network(numbers[start : start + _BLOCK].astype(np.uint64), is_inverse)
            beyond = np.flatnonzero(block >= np.uint64(self.size))
            while len(beyond) > _FEW:
                block[beyond] = self._network(block[beyond], is_inverse)
                beyond = beyond[block[beyond] >= np.uint64(self.size)]
            for at in beyond.tolist():
                number = int(block[at])
                while number >= self.size:
                    number = self._backward(number) if is_inverse else self._forward(number)
                block[at] = number
            found[start : start + _BLOCK] = block.view(np.int64)
        return found

    # The same network three times: for an int, for an int backwards, and for an array either way.

    def _forward(self, number: int) -> int:
        a, b = self._modulus
        left, right = divmod(number, b)
        for key, other in self._pairs:
            left += _spread(right ^ key, a)
            if left >= a:
                left -= a
            right += _spread(left ^ other, b)
            if right >= b:
                right -= b
        return left * b + right

    def _backward(self, number: int) -> int:
        a, b = self._modulus
        left, right = divmod(number, b)
        for key, other in reversed(self._pairs):
            right -= _spread(left ^ other, b)
            if right < 0:
                right += b
            left -= _spread(right ^ key, a)
            if left < 0:
                left += a
        return left * b + right

    def _network(self, numbers: _Words, is_inverse: bool) -> _Words:
        a, b = map(np.uint64, self._modulus)
        left = numbers // b
        right = numbers - left * b
        scratch = np.empty_like(numbers)
        for key, other in reversed(self._pairs) if is_inverse else self._pairs:
            if is_inverse:
                _move(right, left, other, b, scratch, np.subtract, np.add)
                _move(left, right, key, a, scratch, np.subtract, np.add)
            else:
                _move(left, right, key, a, scratch, np.add, np.subtract)
                _move(right, left, other, b, scratch, np.add, np.subtract)
        left *= b
        left += right
        return left


def _spread(word: int, size: int) -> int:
    """A number in 0 … size - 1 (size at most 2**32) that depends on every bit of ``word``."""
    word = (word ^ word >> 30) * _M1 & _MASK
    word = (word ^ word >> 27) * _M2 & _MASK
    return (word >> 32) * size >> 32


def _move(
    half: _Words, other: _Words, key: int, size: np.uint64, scratch: _Words, go: np.ufunc, back: np.ufunc
) -> None:
    """``half = (half ± _spread(other ^ key, size)) % size``, in place."""
    word: Any = other ^ np.uint64(key)
    for shift, factor in ((_U30, _U1), (_U27, _U2)):
        np.right_shift(word, shift, out=scratch)
        word ^= scratch
        word *= factor
    word >>= _U32
    word *= size
    word >>= _U32
    go(half, word, out=half)
    # Out of the circle on either side, a whole turn back is the smaller number: below 0 is just under 2**64.
    back(half, size, out=scratch)
    np.minimum(half, scratch, out=half)


def _shuffled(size: int, key: int) -> list[int]:
    """0 … size - 1 by Fisher and Yates, with the numbers of SplitMix64 seeded by ``key``."""
    table = list(range(size))
    for last in range(size - 1, 0, -1):
        key = (key + _GOLDEN) & _MASK
        word = (key ^ key >> 30) * _M1 & _MASK
        word = (word ^ word >> 27) * _M2 & _MASK
        place = (word ^ word >> 31) * (last + 1) >> 64
        table[last], table[place] = table[place], table[last]
    return table


def runs(numbers: Rows) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of each run of equal numbers."""
    if len(numbers):
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        yield from itertools.pairwise(cuts)


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """``value`` as an int, if it is one (bools are not) and not below ``least``."""
    allowed = "a whole number" if least is None else f"a whole number from {least} up"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise bad_option(name, value, allowed) from None
    if least is not None and number < least:
        raise bad_option(name, value, allowed)
    return number


def bad_option(name: str, value: object, allowed: str) -> OptionError:
    """The error of an argument that is not what it must be."""
    return OptionError(
        f"{name}={value!r} is not valid: it must be {allowed}", name=name, value=str(value), allowed=allowed
    )
