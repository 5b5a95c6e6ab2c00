"""torch's own tests of the two losses: the samples of its operator database, run against ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fused_sce import functional as F

pytest.importorskip("expecttest", reason="torch's operator database needs it")

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput

OPS: dict[str, OpInfo] = {
    op.name.removeprefix("nn.functional."): op
    for op in op_db
    if op.name in ("nn.functional.binary_cross_entropy_with_logits", "nn.functional.multilabel_soft_margin_loss")
}
OURS: dict[str, Callable[..., Tensor]] = {name: getattr(F, name) for name in OPS}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# 16-bit results against torch's in float64, rounded: torch's own round every intermediate result. A bfloat16 gradient
# of a sum is rounded when forward makes it and again when backward multiplies it: two units in the last place.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 3e-6, "atol": 3e-6},
    torch.bfloat16: {"rtol": 2.0**-6, "atol": 1e-6},
    torch.float16: {"rtol": 2.0**-10, "atol": 1e-6},
}


def test_both_losses_are_in_the_database() -> None:
    assert set(OPS) == {"binary_cross_entropy_with_logits", "multilabel_soft_margin_loss"}


def samples(name: str, device: str, dtype: torch.dtype, kind: str) -> Iterator[SampleInput]:
    op = OPS[name]
    make = op.reference_inputs if kind == "reference" else op.sample_inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(make(device, dtype, requires_grad=dtype.is_floating_point))
    assert found
    yield from found


def in_float64(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def tensors_that_want_a_gradient(sample: SampleInput) -> list[Tensor]:
    candidates = [sample.input, *sample.args, *sample.kwargs.values()]
    return [each for each in candidates if isinstance(each, Tensor) and each.requires_grad]


@pytest.mark.parametrize("kind", ["sample", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(OPS))
def test_values_and_gradients(name: str, device: str, dtype: torch.dtype, kind: str) -> None:
    for sample in samples(name, device, dtype, kind):
        ours = OURS[name](sample.input, *sample.args, **sample.kwargs)
        wanted = tensors_that_want_a_gradient(sample)
        upstream = torch.rand_like(ours)
        gradients = torch.autograd.grad(ours, wanted, upstream)

        theirs = OPS[name].op(sample.input, *sample.args, **sample.kwargs)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if dtype in (torch.bfloat16, torch.float16):
            sample = sample.transform(in_float64)
            wanted = tensors_that_want_a_gradient(sample)
            theirs = OPS[name].op(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(ours, theirs.to(dtype), equal_nan=True, **TOLERANCE[dtype])
        for mine, other in zip(gradients, torch.autograd.grad(theirs, wanted, upstream.to(theirs.dtype)), strict=True):
            assert mine.dtype == dtype
            torch.testing.assert_close(mine, other.to(dtype), equal_nan=True, **TOLERANCE[dtype])


@pytest.mark.parametrize("name", list(OPS))
def test_first_and_second_derivatives_of_every_sample(name: str, device: str) -> None:
    for sample in samples(name, device, torch.float64, "sample"):
        wanted = tensors_that_want_a_gradient(sample)

        def function(*leaves: Tensor, sample: SampleInput = sample, wanted: list[Tensor] = wanted) -> Tensor:
            given = {id(old): new for old, new in zip(wanted, leaves, strict=True)}

            def place(argument: Any) -> Any:
                return given.get(id(argument), argument)

            kwargs = {key: place(value) for key, value in sample.kwargs.items()}
            return OURS[name](place(sample.input), *map(place, sample.args), **kwargs)

        if all(each.numel() for each in wanted):
            assert torch.autograd.gradcheck(function, tuple(wanted), check_forward_ad=True, check_batched_grad=True)
            assert torch.autograd.gradgradcheck(function, tuple(wanted))


@pytest.mark.parametrize("name", list(OPS))
def test_forward_mode_as_torchs(name: str, device: str) -> None:
    for sample in samples(name, device, torch.float64, "sample"):
        tangent = torch.randn_like(sample.input)
        kwargs = {key: v.detach() if isinstance(v, Tensor) else v for key, v in sample.kwargs.items()}
        args = [each.detach() if isinstance(each, Tensor) else each for each in sample.args]
        derivatives = []
        for function in (OURS[name], OPS[name].op):
            with forward_ad.dual_level():
                value = function(forward_ad.make_dual(sample.input.detach(), tangent), *args, **kwargs)
                derivatives.append(forward_ad.unpack_dual(value).tangent)
        torch.testing.assert_close(*derivatives, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", list(OPS))
def test_error_inputs(name: str, device: str) -> None:
    make = OPS[name].error_inputs_func
    errors = list(OPS[name].error_inputs(device)) if make is not None else []
    # torch has none for these two at present; then at least what its functions refuse in every version:
    x, t = torch.randn(3, 4, device=device), torch.rand(3, 4, device=device)
    refused = [(x, t[:2]), (x, t[0]), (x, torch.rand(4, 3, device=device))]
    if name == "multilabel_soft_margin_loss":
        refused = [(x, torch.rand(2, 4, device=device))]
    for sample in errors:
        with pytest.raises(sample.error_type):
            OURS[name](sample.sample_input.input, *sample.sample_input.args, **sample.sample_input.kwargs)
    for arguments in refused:
        with pytest.raises((ValueError, RuntimeError)) as theirs:
            OPS[name].op(*arguments)
        with pytest.raises((ValueError, RuntimeError)) as ours:
            OURS[name](*arguments)
        if name == "binary_cross_entropy_with_logits":
            assert ours.type is theirs.type
    for function in (OPS[name].op, OURS[name]):
        with pytest.raises(ValueError, match="average is not"):
            function(x, t, reduction="average")
