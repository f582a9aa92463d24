"""Headers of safetensors files: stripped of what can be counted up, and restored to the byte."""

import json

import numpy as np
import pytest
from safetensors.numpy import save

from deltalens.patch.headers import fill_offsets, read_header, strip_offsets


def header_of(file: bytes) -> bytes:
    return file[8 : 8 + int.from_bytes(file[:8], "little")]


def test_a_header_that_safetensors_wrote():
    tensors = {f"a.{i}": np.zeros((i, 3), np.float32) for i in range(5)} | {'odd " name \\ é': np.zeros(3, np.int8)}
    header = header_of(save(tensors, metadata={"data_offsets": '"data_offsets":[0,1] "data_offsets":[]', "k": "é"}))
    bare = strip_offsets(header)
    assert not any(f"[{12 * i}," in bare for i in range(1, 4))
    assert fill_offsets(bare) == header
    described = {name: (dtype, shape) for name, dtype, shape, _ in read_header(header)}
    assert described == {
        name: ("F32" if values.dtype == np.float32 else "I8", values.shape) for name, values in tensors.items()
    }
    places = [place for *_, place in read_header(header)]
    assert places[0] == 8 + len(header)
    assert places == sorted(places)


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_headers_in_another_order_or_spelling_are_kept(separators):
    """The second tensor lies first; blanks, and a name in escapes."""
    tensors = {
        "a\u00e9": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
        "b": {"data_offsets": [0, 8], "dtype": "F64", "shape": []},
    }
    header = json.dumps(tensors, separators=separators).encode() + b"   "
    assert fill_offsets(strip_offsets(header)) == header
    assert [place - len(header) - 8 for *_, place in read_header(header)] == [8, 0]


def test_no_tensors():
    for header in (b"{}", b'{"__metadata__":{"format":"pt"}}  '):
        assert fill_offsets(strip_offsets(header)) == header
        assert read_header(header) == []


@pytest.mark.parametrize(
    "text",
    [
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[]},"b":{"dtype":"F32","shape":[2]}}',
        '{"a":{"dtype":"F9","shape":[2],"data_offsets":[]}}',
        '{"a":{"shape":[2],"data_offsets":[]}}',
        '{"a":{"dtype":"F32","shape":["2"],"data_offsets":[]}}',
        '{"a":{"dtype":"F32","shape":[-2],"data_offsets":[]}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9]}}',
        '{"a":"data_offsets":[]}',
        '[{"data_offsets":[]}]',
    ],
)
def test_what_is_no_header(text):
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        read_header(fill_offsets(text))
