"""The experts of an answer, as vLLM encodes them."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest

from laguna_serve.serving.client.routed_experts import decode_experts


def encode(array: np.ndarray) -> str:
    with io.BytesIO() as file:
        np.save(file, array)
        return base64.b64encode(file.getvalue()).decode()


def test_rows_of_small_integers() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(3, 4, 2)
    decoded = decode_experts(encode(array))
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, array)


@pytest.mark.parametrize(
    "text",
    ["", "?", base64.b64encode(b"npy").decode(), encode(np.zeros((2, 3), np.uint8)), encode(np.zeros((2, 3, 1)))],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="routed_experts: expected"):
        decode_experts(text)


def test_pickled_objects_are_not_read() -> None:
    with pytest.raises(ValueError, match="expected base64 of a"):
        decode_experts(encode(np.array([[[{}]]], dtype=object)))
