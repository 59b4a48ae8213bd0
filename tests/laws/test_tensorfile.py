"""Whatever tensors go into a file come out of it, bit for bit; whatever bytes are offered, only BadInput comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torchship.artifact import tensorfile
from torchship.errors import BadInput
from torchship.tensors import DTYPES, Array, numpy_dtype


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """An array of any wire datatype and a small shape, rank 0 and length 0 included."""
    name = draw(st.sampled_from(DTYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    if name == "BYTES":
        count = int(np.prod(shape))
        found = np.empty(count, object)
        found[:] = draw(st.lists(st.binary(max_size=5), min_size=count, max_size=count))
        return found.reshape(shape)
    dtype: Any = numpy_dtype(name)
    raw = draw(st.binary(min_size=int(np.prod(shape)) * dtype.itemsize, max_size=int(np.prod(shape)) * dtype.itemsize))
    return np.frombuffer(raw, np.uint8).copy().view(dtype).reshape(shape) if raw else np.zeros(shape, dtype)


@given(st.dictionaries(st.text("abc._", min_size=1, max_size=4), arrays(), max_size=3))
def test_round_trip(tensors: dict[str, Array]) -> None:
    found = tensorfile.decode(tensorfile.encode(tensors))
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        same = found[name].tolist() == array.tolist() if array.dtype == object else None
        assert same if same is not None else found[name].tobytes() == array.tobytes()


@given(st.binary(max_size=80))
def test_any_bytes_are_refused_politely(data: bytes) -> None:
    with pytest.raises(BadInput):
        tensorfile.decode(data)
