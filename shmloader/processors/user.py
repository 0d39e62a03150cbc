"""The user's ``process``: a row as Python objects becomes whatever fields it returns.

The first row that succeeds decides the fields; every later one must have the same names, dtypes and ranks,
since batches of varying make-up break DDP and torch.compile. Python numbers are converted where that loses
nothing (an int for a float field); arrays and tensors are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from shmloader.errors import DecodeError, OptionError, ProcessError
from shmloader.processors.text import IGNORED_LABEL
from shmloader.sample import MAX_RANK, Field

RESERVED_NAMES = ("task_type", "source")

_DTYPES = frozenset(
    ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")
)
_EXPECTED = "a numpy array, a tensor, an int, float, bool or str, or a list of numbers"

Array = np.ndarray[Any, Any]
Process = Callable[[dict[str, Any]], Mapping[str, Any]]


class UserProcessor:
    """Yields what ``process(row)`` returns; ``row`` is a dict of a row's columns, media as {"bytes", "path"}.

    schema_fields: the fields that another process has found already; None: the first row that succeeds sets
    ``fields``, which is empty until then. columns is empty: it takes every column that the batches have.

    Raises:
        OptionError: ``process`` cannot be called.
    """

    def __init__(self, process: Process, schema_fields: tuple[Field, ...] | None = None) -> None:
        if not callable(process):
            raise OptionError(
                f"process must be a function of a row, but got {type(process).__name__}",
                name="process",
                value=type(process).__name__,
                allowed="a callable",
            )
        self.process = process
        self.columns: tuple[str, ...] = ()
        self.fields: tuple[Field, ...] = schema_fields or ()

    def adopt(self, fields: tuple[Field, ...]) -> None:
        """Use the ``fields`` that some prefetcher found first, instead of those found here."""
        self.fields = fields

    def begin(self, batch: pa.RecordBatch) -> _UserRows:
        """Take the rows of ``batch``; ``process`` runs once per row, in `Rows.shapes`."""
        return _UserRows(self, batch)

    def call(self, row: dict[str, Any]) -> Mapping[str, Any]:
        """What ``process`` returns for ``row``, known to be a dict with usable names.

        Raises:
            ProcessError: it raised or returned something else.
            DecodeError: it let one of `decode_image` or `decode_audio` pass. MemoryError: there was no memory.
        """
        try:
            sample = self.process(row)
        except (DecodeError, MemoryError):  # for want of memory another process tries again
            raise
        except Exception as error:
            raise ProcessError(f"process raised {type(error).__name__}: {error}") from error
        return _checked_names(sample)


class _UserRows:
    def __init__(self, processor: UserProcessor, batch: pa.RecordBatch) -> None:
        self._processor = processor
        self._batch = batch
        self._ready: dict[int, tuple[Mapping[str, Any], tuple[Field, ...], dict[str, Array]]] = {}

    def shapes(self, row: int) -> Mapping[str, tuple[int, ...]]:
        sample = self._processor.call(self._row(row))
        if not self._processor.fields:
            self._processor.fields = fields_of(sample)
        arrays = arrays_of(sample, self._processor.fields)
        self._ready[row] = sample, self._processor.fields, arrays
        return {name: array.shape for name, array in arrays.items()}

    def write(self, row: int, out: Mapping[str, Array]) -> None:
        sample, fields, arrays = self._ready.pop(row)
        if fields != self._processor.fields:  # replaced by `UserProcessor.adopt` in between
            arrays = arrays_of(sample, self._processor.fields)
        for name, array in arrays.items():
            np.copyto(out[name], array, casting="no")

    def _row(self, row: int) -> dict[str, Any]:
        try:
            values: dict[str, Any] = self._batch.slice(row, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise DecodeError(f"the row has text that is not valid UTF-8: {error}") from error
        return values


def fields_of(sample: Mapping[str, Any]) -> tuple[Field, ...]:
    """The fields of a dataset whose ``process`` returned ``sample`` for some row.

    dtype and rank are kept, a dimension may differ from sample to sample; a shorter first one is padded with 0,
    of integer "labels" with -100. int → int64, float → float32, str → UTF-8. Integer "text" of rank 1 has its
    "attention_mask" made for it, unless ``sample`` has one.

    Raises:
        ProcessError: it is not a dict of what can be stored.
    """
    return tuple(_field(name, value, sample) for name, value in _checked_names(sample).items())


def _field(name: str, value: Any, sample: Mapping[str, Any]) -> Field:
    array, is_text, is_weak = _to_array(name, value)
    if is_weak and array.ndim and not array.size:
        raise _error(name, "is an empty list, which does not tell its dtype; return numpy.zeros(0, dtype)")
    dtype = np.dtype(np.float32) if is_weak and array.dtype.kind == "f" else array.dtype
    pad: int | None = 0 if array.ndim else None
    is_tokens = array.ndim > 0 and dtype.kind in "iu" and not is_text
    if name == "labels" and is_tokens and dtype.kind == "i":
        pad = IGNORED_LABEL
    has_mask = name == "text" and is_tokens and array.ndim == 1 and "attention_mask" not in sample
    return Field(
        name,
        dtype.name,
        (None,) * array.ndim,
        pad=pad,
        mask="attention_mask" if has_mask else None,
        is_text=is_text,
    )


def arrays_of(sample: Mapping[str, Any], fields: tuple[Field, ...]) -> dict[str, Array]:
    """The values of ``sample`` as arrays of the stored dtypes, in the order of ``fields``.

    Raises:
        ProcessError: a field is missing, unknown, or of another dtype or rank than ``fields`` say.
    """
    names = {field.name for field in fields}
    for wrong, what in ((names - sample.keys(), "is missing"), (sample.keys() - names, "is not in the schema")):
        if wrong:
            need, have = ", ".join(sorted(names)), ", ".join(sorted(sample))
            told = f"{what}: every row must have the fields {need}, but this one has {have}"
            raise _error(min(wrong), told, expected=need, got=have)
    return {field.name: _as_field(field, sample[field.name]) for field in fields}


def _as_field(field: Field, value: Any) -> Array:
    array, is_text, is_weak = _to_array(field.name, value)
    wanted = field.numpy_dtype
    if is_weak and not is_text and _converts(array, wanted):
        array = _convert(field.name, value, wanted)
    fits = array.ndim == len(field.shape)
    if array.dtype != wanted or is_text != field.is_text or not fits:
        got = "a str" if is_text else _describe(array.dtype, array.shape)
        need = "a str" if field.is_text else _describe(wanted, field.shape)
        told = f"must be {need} in every row, as in the first one, but got {got}"
        raise _error(field.name, told, expected=need, got=got)
    return array


def _to_array(name: str, value: Any) -> tuple[Array, bool, bool]:
    """``value`` as an array of a dtype that can be stored; is it text; is it made of Python's own numbers."""
    if isinstance(value, str):
        try:
            return np.frombuffer(value.encode(), np.uint8), True, False
        except UnicodeEncodeError as error:
            raise _error(name, f"is a str that has no UTF-8 form: {error}") from error
    is_weak = _is_weak(value)
    if is_weak or isinstance(value, np.ndarray | np.generic | list | tuple):
        array = _convert(name, value, None)
    elif callable(getattr(value, "numpy", None)):
        array = _tensor(name, value)
    else:
        got = type(value).__name__
        raise _error(name, f"must be {_EXPECTED}, but got {got}", expected=_EXPECTED, got=got)
    if array.dtype.name not in _DTYPES:
        need, got = f"one of {', '.join(sorted(_DTYPES))}", str(array.dtype)
        raise _error(name, f"has dtype {got}; it must be {need}", expected=need, got=got)
    if array.ndim > MAX_RANK:
        need, got = f"{MAX_RANK} dimensions at most", f"{array.ndim} dimensions"
        raise _error(name, f"has {got}; there may be {need}", expected=need, got=got)
    return array.astype(array.dtype.newbyteorder("="), copy=False), False, is_weak


def _is_weak(value: Any) -> bool:
    """Is it a Python number, or lists of such, so that its dtype is nobody's choice."""
    while isinstance(value, list | tuple) and len(value):
        value = value[0]
    return isinstance(value, bool | int | float | list | tuple) and not isinstance(value, np.generic)


def _converts(array: Array, wanted: np.dtype[Any]) -> bool:
    """May Python numbers that made ``array`` become ``wanted``: of the same kind, int to float, or none at all."""
    kind, into = array.dtype.kind, wanted.kind
    return not array.size or kind == into or (kind == "i" and into in "uf")


def _convert(name: str, value: Any, dtype: np.dtype[Any] | None) -> Array:
    try:
        return np.asarray(value, dtype)
    except (ValueError, TypeError, OverflowError) as error:
        told = f"must be {_EXPECTED}, and cannot be made an array: {error}"
        raise _error(name, told, expected=_EXPECTED, got=type(value).__name__) from error


def _tensor(name: str, value: Any) -> Array:
    if callable(getattr(value, "detach", None)):
        value = value.detach()
    try:
        array = value.numpy()
    except MemoryError:
        raise
    except Exception as error:
        raise _error(name, f"is a {type(value).__name__} that has no numpy form: {error}") from error
    return np.asarray(array)


def _checked_names(sample: Any) -> Mapping[str, Any]:
    if not isinstance(sample, Mapping):
        need, got = "a dict of name → value", type(sample).__name__
        raise ProcessError(f"process must return {need}, but got {got}", expected=need, got=got)
    if not sample:
        need, got = "a sample needs one field at least", "an empty dict"
        raise ProcessError(f"process returned {got}; {need}", expected=need, got=got)
    for name in sample:
        if not isinstance(name, str) or not name:
            need, got = "non-empty str", f"{name!r:.80}"
            raise ProcessError(f"process must name its fields by {need}, but got {got}", expected=need, got=got)
        if name in RESERVED_NAMES:
            raise _error(name, "is a name that every sample has already; choose another one")
    return sample


def _describe(dtype: np.dtype[Any], shape: tuple[int | None, ...]) -> str:
    return f"{dtype} {['any' if n is None else n for n in shape]}".replace("'", "")


def _error(name: str, what: str, **data: str) -> ProcessError:
    return ProcessError(f"process: field {name!r} {what}", field=name, **data)
