"""The first 1,000 cases of the fuzzer; `make fuzz` runs 100,000. And that it finds what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fuzz
import pytest
import torch
from torch import Tensor


@pytest.mark.parametrize("first", range(0, 1000, 100))
def test_random_cases(first: int) -> None:
    _, _, failures = fuzz.run_many(range(first, first + 100))
    assert not failures, "\n".join(failures)


def wrong_loss(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: loss(*args, **kwargs) * (1 + 2e-6)


def wrong_tail(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda input, *args, **kwargs: loss(input.clamp(max=16), *args, **kwargs)


def wrong_weight(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(input: Tensor, target: Tensor, weight: Tensor | None = None, **kwargs: Any) -> Tensor:
        return loss(input, target, weight=weight if weight is None else weight + 0.0 * input.detach(), **kwargs)

    return call


@pytest.mark.parametrize("wrong", [wrong_loss, wrong_tail, wrong_weight])
def test_it_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Any], Any]) -> None:
    for name in fuzz.REDUCTIONS:
        monkeypatch.setattr(fuzz.F, name, wrong(getattr(fuzz.F, name)))
    counts, _, failures = fuzz.run_many(range(200))
    assert len(failures) > 10
    assert sum(counts[name] for name in fuzz.REDUCTIONS) + len(failures) >= 200


def test_cases_are_the_same_every_time() -> None:
    for number in range(20):
        first, again = fuzz.make_case(number), fuzz.make_case(number)
        told = [repr((case.function, case.options, case.wanted)) for case in (first, again)]  # NaN equals nothing
        assert told[0] == told[1]
        for name, tensor in first.tensors.items():
            other = again.tensors[name]
            assert (tensor is None) == (other is None)
            if tensor is not None and other is not None:
                torch.testing.assert_close(tensor, other, rtol=0, atol=0, equal_nan=True)
                assert tensor.stride() == other.stride()
