"""Tensors that go through a pipe as their bytes: what did not come into a slot."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from shmloader.views import tensor_over


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a tensor that is no more than its bytes."""
    return (
        type(value) is torch.Tensor
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not (value.requires_grad or value.is_quantized or value.is_nested)
    )


def is_jagged(value: Any) -> bool:
    """Whether ``value`` is a nested tensor that is no more than its values and the offsets of its rows in them."""
    return (
        isinstance(value, torch.Tensor)
        and value.is_nested
        and value.layout == torch.jagged
        and not value.requires_grad
        and value.lengths() is None  # type: ignore[attr-defined]
        and value._ragged_idx == 1  # type: ignore[attr-defined]
        and is_plain(value.values())
        and is_plain(value.offsets())  # type: ignore[attr-defined]
    )


class _Bytes(NamedTuple):
    """A tensor on its way through a pipe. Not torch's way: that makes a file in /dev/shm and a descriptor for each."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes


class _JaggedBytes(NamedTuple):
    values: _Bytes
    offsets: _Bytes


def pack(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split into what is made of plain tensors, as their bytes, and the rest."""
    tensors = {name: value for name, value in values.items() if _has_tensors(value)}
    return {name: _packed(value) for name, value in tensors.items()}, {
        name: value for name, value in values.items() if name not in tensors
    }


def _has_tensors(value: Any) -> bool:
    """Whether there is one to look for: in a dict, or a list or tuple of something else than strings."""
    return isinstance(value, torch.Tensor | dict) or (
        type(value) in (list, tuple) and bool(value) and not isinstance(value[0], str)
    )


def _packed(value: Any) -> Any:
    if is_plain(value):
        whole = value.resolve_conj().resolve_neg().contiguous().view(-1)
        return _Bytes(value.dtype, tuple(value.shape), whole.view(torch.uint8).numpy().tobytes())
    if is_jagged(value):
        return _JaggedBytes(_packed(value.values()), _packed(value.offsets()))
    if type(value) is dict:
        return {key: _packed(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_packed(item) for item in value)
    return value


def unpacked(value: Any) -> Any:
    """What `pack` made bytes of: private tensors, each with its bytes for itself."""
    kind = type(value)
    if kind is _Bytes:
        # bytearray: the tensor may be written to.
        return tensor_over(bytearray(value.data), value.dtype, value.shape)
    if kind is _JaggedBytes:
        return torch.nested.nested_tensor_from_jagged(unpacked(value.values), unpacked(value.offsets))
    if kind is dict:
        return {key: unpacked(item) for key, item in value.items()}
    if kind in (list, tuple):
        return kind(unpacked(item) for item in value)
    return value
