"""float64 that stays float64, so that equalities of arithmetic hold to many digits on every machine.

transformers' modeling files cast to float32 inside (norms, rotary angles, eager attention's softmax, routers), whatever the
model's dtype. Two ways to compute the same thing then agree to about seven digits at best, and how well depends on the
CPU's kernels and threads. Inside [`keeping_double`] these casts leave float64 alone. Only casts written in transformers'
modeling files are lifted: dream_hf's own, and `generate()`'s cast of the logits, are what they are for users.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

LIFTED = ("transformers.models.", "transformers.integrations.", "dream_hf.targets.grouped_attention")
TIGHT = {"rtol": 1e-9, "atol": 1e-9}  # for torch.testing.assert_close of float64


def tolerance(expected: Tensor, dtype: torch.dtype | None = None, roundings: int = 4) -> dict[str, float]:
    """How near another way of computing must come to `expected`: [`TIGHT`] in float64, else a few roundings of its size.

    `dtype` is the least precise one on the way, by default that of `expected`.
    """
    dtype = expected.dtype if dtype is None else dtype
    if dtype == torch.float64:
        return TIGHT
    finite = expected[expected.abs() < 1e6]  # processors write the lowest number there is, too
    largest = float(finite.abs().max()) if finite.numel() else 1.0
    return {"rtol": 0.0, "atol": roundings * torch.finfo(dtype).eps * max(largest, 1.0)}


def doubles(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Normal random numbers in float64, those of float32."""
    return torch.randn(*shape, generator=generator).double()


@contextmanager
def keeping_double() -> Iterator[None]:
    """Casts from float64 to float32 in transformers' modeling files do nothing; models in other dtypes compute as ever."""
    with (
        mock.patch.object(torch.Tensor, "float", _lifted(torch.Tensor.float, _float)),
        mock.patch.object(torch.Tensor, "to", _lifted(torch.Tensor.to, _cast)),
        mock.patch.object(torch.Tensor, "type", _lifted(torch.Tensor.type, _cast)),
        mock.patch.object(nn.functional, "softmax", _lifted(nn.functional.softmax, _cast)),
        mock.patch.object(torch.Tensor, "__matmul__", _lifted(torch.Tensor.__matmul__, _mixed)),
        mock.patch.object(nn.functional, "grid_sample", _lifted(nn.functional.grid_sample, _mixed)),
    ):
        yield


def doubled(model: nn.Module) -> Any:
    """The model in float64, its tables of rotary frequencies included, which transformers makes in float32."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for value in tensors.values():
                if value is not None and value.is_floating_point():
                    value.data = value.data.double()
    return model


def _lifted(function: Callable[..., Tensor], in_double: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, but `in_double(function, ...)` where a modeling file calls it with float64."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        is_double = any(isinstance(each, Tensor) and each.dtype == torch.float64 for each in args[:2])
        if is_double and sys._getframe(1).f_globals.get("__name__", "").startswith(LIFTED):
            return in_double(function, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def _float(function: Callable[..., Tensor], input: Tensor) -> Tensor:
    return input


def _cast(function: Callable[..., Tensor], input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """float64 where float32 was asked for."""
    args = tuple(torch.float64 if each is torch.float32 else each for each in args)
    kwargs = {name: torch.float64 if each is torch.float32 else each for name, each in kwargs.items()}
    return function(input, *args, **kwargs)


def _mixed(function: Callable[..., Tensor], input: Tensor, other: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Integers made float32, and coordinates, meet float64."""
    return function(input.double(), other.double(), *args, **kwargs)
