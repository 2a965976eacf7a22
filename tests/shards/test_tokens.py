"""The file of a scene's features: one that safetensors reads, the same each time, and nothing else is taken for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from shards.tokens import Tokens, TokenShape, decode_tokens, encode_tokens

SHAPES = {"bf16": TokenShape(5, 3, "bf16"), "int8": TokenShape(5, 3, "int8")}


def tokens(storage: str) -> Tokens:
    generator = torch.Generator().manual_seed(1)
    if storage == "int8":
        values_PF = torch.randint(-127, 128, (5, 3), generator=generator, dtype=torch.int8)
        return Tokens("scene_1", 2**63 + 5, values_PF.numpy(), np.linspace(0.5, 2, 5, dtype=np.float32))
    values_PF = torch.randn(5, 3, generator=generator).bfloat16().view(torch.int16)
    return Tokens("scene_1", 2**63 + 5, values_PF.numpy(), np.empty(0, np.float32))


@pytest.mark.parametrize("storage", list(SHAPES))
def test_there_and_back(storage: str) -> None:
    data = encode_tokens(tokens(storage))
    assert data == encode_tokens(tokens(storage))
    for found in (decode_tokens(data, SHAPES[storage]), decode_tokens(memoryview(data), SHAPES[storage])):
        assert found[:2] == tokens(storage)[:2]
        assert np.array_equal(found.tokens_PF, tokens(storage).tokens_PF)
        assert np.array_equal(found.scales_P, tokens(storage).scales_P)


@pytest.mark.parametrize("storage", list(SHAPES))
def test_the_library_reads_it(storage: str, tmp_path) -> None:
    data = encode_tokens(tokens(storage))
    tensors = load(data)
    kind = torch.int8 if storage == "int8" else torch.bfloat16
    values_PF = torch.from_numpy(tokens(storage).tokens_PF)
    assert torch.equal(tensors["features"], values_PF if storage == "int8" else values_PF.view(torch.bfloat16))
    assert tensors["features"].dtype == kind
    assert set(tensors) == ({"features", "scales"} if storage == "int8" else {"features"})
    (tmp_path / "file.safetensors").write_bytes(data)
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert file.metadata() == {"key": "scene_1", "image_xxh3": "8000000000000005"}


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (TokenShape(5, 3, "int8"), "has features in BF16, the manifest says I8"),
        (TokenShape(5, 4, "bf16"), r"has features of \(5, 3\), the manifest says \(5, 4\)"),
    ],
)
def test_another_shape(shape: TokenShape, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decode_tokens(encode_tokens(tokens("bf16")), shape)


def test_other_bytes() -> None:
    data = encode_tokens(tokens("bf16"))
    for other in (b"", b"\x89PNG" + bytes(500), data[:40], data[:-1], (2).to_bytes(8, "little") + b"{}"):
        with pytest.raises(ValueError):  # noqa: PT011
            decode_tokens(other, SHAPES["bf16"])
