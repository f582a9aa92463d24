"""The JSON headers of the result's safetensors files: a patch carries them, and takes names and shapes from them."""

from __future__ import annotations

import json
import re
from math import prod
from typing import Any

from deltalens.checkpoint.base import DTYPE_BYTES

__all__ = ["fill_offsets", "read_header", "strip_offsets"]

_OFFSETS = re.compile(r'"data_offsets":\[\d+,\d+\]')
_NONE = '"data_offsets":[]'


def strip_offsets(header: bytes) -> str:
    """The header without its offsets, which are most of its size, where `fill_offsets` restores them; else as it is."""
    text = header.decode()
    bare = _OFFSETS.sub(_NONE, text)
    return bare if fill_offsets(bare) == header else text


def fill_offsets(text: str) -> bytes:
    """The header, its stripped offsets counted up in the order of the tensors.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is no header.
    """
    pieces = text.split(_NONE)
    if len(pieces) == 1:
        return text.encode()
    out, at = [pieces[0]], 0
    sizes = [prod(info["shape"]) * DTYPE_BYTES[info["dtype"]] for _, info in _described(text)]
    for size, piece in zip(sizes, pieces[1:], strict=True):
        out.append(f'"data_offsets":[{at},{at + size}]{piece}')
        at += size
    return "".join(out).encode()


def read_header(header: bytes) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Name, dtype, shape, and place in the file (bytes) of each tensor, in the header's order.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: it is no header, or the tensors do not fill
            the file.
    """
    out = []
    for name, info in _described(header):
        shape = info["shape"]
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError("an impossible shape")
        begin, end = info["data_offsets"]
        if type(begin) is not int or type(end) is not int or end - begin != prod(shape) * DTYPE_BYTES[info["dtype"]]:
            raise ValueError("offsets that do not fit")
        out.append((name, info["dtype"], tuple(shape), 8 + len(header) + begin))
    at = 8 + len(header)
    for _, dtype, shape, place in sorted(out, key=lambda tensor: (tensor[3], prod(tensor[2]))):
        if place != at:
            raise ValueError("a hole or an overlap")
        at += prod(shape) * DTYPE_BYTES[dtype]
    return out


def _described(header: bytes | str) -> list[tuple[str, dict[str, Any]]]:
    return [(name, info) for name, info in json.loads(header).items() if name != "__metadata__"]
