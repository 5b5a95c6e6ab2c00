"""The numerics contract: error bounds, tails, specials, sums."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor
from ulp import exact_binary, exact_terms, ulp_distance, ulp_of

from fused_sce import _library
from fused_sce import functional as F

# Where the formulas change character: 0, subnormals, the ends of exp's reduction, the logits from which float32,
# bfloat16 and float16 lose `sigmoid(x) - t` (17, 6.2, 8.3), where exp underflows into subnormals (88) and to 0 (104).
EXTREMES = [
    0.0, 1e-45, 1e-38, 1.2e-38, 1e-20, 1e-7, 6e-8, 0.3465, 0.3466, 0.5, 0.6931472, 1.0, 6.2, 8.3,
    16.6, 17.0, 22.0, 36.7, 87.3, 88.0, 88.7, 103.2, 103.97, 104.0, 104.1, 745.1, 746.0, 1e4, 1e30,
    3.4e38,
]  # fmt: skip


def loss_and_gradient(x: Tensor, t: Tensor, pos_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    loss = F.sigmoid_cross_entropy(x, t, pos_weight=pos_weight, reduction="none")
    (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    return loss.detach(), gradient


def every(step: int, dtype: torch.dtype) -> Tensor:
    """Every `step`-th bit pattern of a type, NaN and infinities included."""
    if dtype == torch.float32:
        patterns = np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32).view(np.int32)
    else:
        patterns = np.arange(0, 2**16, step, dtype=np.uint32).astype(np.uint16).view(np.int16)
    return torch.from_numpy(patterns).view(dtype)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_float32_within_two_ulp(device: str, target: float) -> None:
    extremes = torch.tensor(EXTREMES)
    dense = torch.linspace(-110, 110, 2_000_003)
    x = torch.cat([every(2003, torch.float32), extremes, -extremes, dense])
    loss, gradient = (r.cpu() for r in loss_and_gradient(x.to(device), torch.full_like(x, target, device=device)))
    exact_loss, exact_gradient = exact_binary(x.double(), target)
    assert ulp_distance(loss, exact_loss).max() <= 2
    assert ulp_distance(gradient, exact_gradient).max() <= 2
    # nothing lost: 0 only where the exact value rounds to 0
    assert torch.equal(loss == 0, exact_loss.float() == 0)
    assert torch.equal(gradient == 0, exact_gradient.float() == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_every_16_bit_logit_is_rounded_once(device: str, dtype: torch.dtype, target: float) -> None:
    x = every(1, dtype)
    loss, gradient = (r.cpu() for r in loss_and_gradient(x.to(device), torch.full_like(x, target, device=device)))
    exact_loss, exact_gradient = exact_binary(x.double(), target)
    # half a unit, and what a float32 result 2 of its ULPs off may add where the exact value is nearly a tie
    assert ulp_distance(loss, exact_loss).max() <= 0.501
    assert ulp_distance(gradient, exact_gradient).max() <= (0.501 if device == "cpu" else 0.51)  # csrc/formulas/gpu16.h
    assert torch.equal(gradient == 0, exact_gradient.to(dtype) == 0)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_float64_within_two_ulp_of_mpmath(device: str, target: float) -> None:
    extremes = torch.tensor([*EXTREMES, 1e-300, 5e-324, 709.0, 740.0, 744.9], dtype=torch.float64)
    x = torch.cat([extremes, -extremes, torch.randn(1500).double() * 3, torch.randn(500).double() * 300])
    loss, gradient = loss_and_gradient(x.to(device), torch.full_like(x, target, device=device))
    for i, logit in enumerate(x.tolist()):
        exact = exact_terms(logit, target)
        for got, value in ((loss[i].item(), exact.loss), (gradient[i].item(), exact.gradient)):
            step = math.ulp(float(value))
            assert abs(mpmath.mpf(got) - value) <= 2 * step, (logit, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_pos_weight", [False, True])
def test_soft_targets_within_four_ulp_of_the_terms(device: str, dtype: torch.dtype, with_pos_weight: bool) -> None:
    spread = torch.cat([torch.randn(1500) * 4, torch.randn(300) * 50]).to(dtype)
    x = torch.cat([spread, torch.tensor(EXTREMES[:-2], dtype=dtype)])
    t = torch.rand(x.shape, dtype=dtype)
    t[::7] = 1e-6
    t[3::7] = 1 - 2.0**-20
    p = torch.rand(x.shape, dtype=dtype) * 10 if with_pos_weight else None
    loss, gradient = loss_and_gradient(x.to(device), t.to(device), None if p is None else p.to(device))
    for i in range(x.numel()):
        exact = exact_terms(x[i].item(), t[i].item(), 1.0 if p is None else p[i].item())
        for got, value, size in (
            (loss[i], exact.loss, exact.loss_terms),
            (gradient[i], exact.gradient, exact.gradient_terms),
        ):
            step = ulp_of(np.float64(size), str(dtype).removeprefix("torch."))
            assert abs(mpmath.mpf(got.item()) - value) <= 4 * step, (x[i], t[i], got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("route", ["create_graph", "torch.func"])
def test_second_derivatives_keep_both_tails(device: str, dtype: torch.dtype, target: float, route: str) -> None:
    # torch's own are 0 from 17 on, where the sigmoid is 1.
    extremes = torch.tensor([value for value in EXTREMES if value < 87], dtype=dtype)
    x = torch.cat([extremes, -extremes, torch.linspace(-86, 86, 401, dtype=dtype)]).to(device)
    t = torch.full_like(x, target)

    def total(x: Tensor) -> Tensor:
        return F.sigmoid_cross_entropy(x, t, reduction="sum")

    if route == "create_graph":
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), leaf)
    else:
        second = torch.func.grad(lambda x: torch.func.grad(total)(x).sum())(x)
    exact = [mpmath.exp(-abs(v)) / (1 + mpmath.exp(-abs(v))) ** 2 for v in map(mpmath.mpf, x.tolist())]
    for got, expected, logit in zip(second.tolist(), exact, x.tolist(), strict=True):
        assert abs(got - expected) <= 4 * torch.finfo(dtype).eps * expected, (logit, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_create_graph_keeps_both_tails(device: str, dtype: torch.dtype) -> None:
    extremes = torch.tensor(EXTREMES, dtype=dtype)
    x = torch.cat([extremes, -extremes, torch.linspace(-104, 104, 20_001, dtype=dtype)])
    x = x.to(device).requires_grad_()
    for target in (0.0, 1.0):
        loss = F.sigmoid_cross_entropy(x, torch.full_like(x, target), reduction="sum")
        (fused,) = torch.autograd.grad(loss, x, retain_graph=True)
        (differentiable,) = torch.autograd.grad(loss, x, create_graph=True)
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of the subnormals
        torch.testing.assert_close(differentiable, fused, rtol=4 * torch.finfo(dtype).eps, atol=step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_infinite_logits(device: str, dtype: torch.dtype) -> None:
    x = torch.tensor([math.inf, -math.inf, math.inf, -math.inf], dtype=dtype, device=device)
    t = torch.tensor([1, 0, 0, 1], dtype=dtype, device=device)
    loss, gradient = loss_and_gradient(x, t)
    assert loss.tolist() == [0, 0, math.inf, math.inf]
    assert gradient.tolist() == [0, 0, 1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["input", "target"])
def test_nan_spoils_its_element_and_the_sum(device: str, dtype: torch.dtype, where: str) -> None:
    x = torch.randn(1000, dtype=dtype, device=device)
    t = torch.rand(1000, dtype=dtype, device=device)
    (x if where == "input" else t)[417] = math.nan
    loss, gradient = loss_and_gradient(x, t)
    assert loss.isnan().nonzero().tolist() == [[417]]
    assert gradient.isnan().nonzero().tolist() == [[417]]
    assert F.binary_cross_entropy_with_logits(x, t).isnan()
    assert F.multilabel_soft_margin_loss(x.view(10, 100), t.view(10, 100), reduction="none").isnan().tolist() == [
        row == 4 for row in range(10)
    ]


@pytest.mark.parametrize("count", [1, 15, 511, 513, 4095, 4097, 100_003])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sums_within_two_ulp(device: str, count: int, reduction: str) -> None:
    x = (torch.randn(count) * 8).to(device)
    t = torch.randint(0, 2, (count,), device=device).float()
    elements = F.sigmoid_cross_entropy(x.double(), t.double(), reduction="none").cpu()
    exact = math.fsum(elements.tolist()) / (count if reduction == "mean" else 1)
    got = F.sigmoid_cross_entropy(x, t, reduction=reduction).cpu()
    assert ulp_distance(got, torch.tensor(exact, dtype=torch.float64)) <= 2


@pytest.mark.parametrize("logits", ["mixed", "equal"])
def test_mean_of_a_hundred_million_within_two_ulp(logits: str) -> None:
    # equal losses are the worst case: every addition errs in the same direction
    count = 100_000_000
    x = torch.randn(count).mul_(8) if logits == "mixed" else torch.full((count,), 0.1)
    t = torch.arange(count, dtype=torch.uint8) % 2
    exact = 0.0
    for part_x, part_t in zip(x.split(count // 20), t.split(count // 20), strict=True):
        exact += F.sigmoid_cross_entropy(part_x.double(), part_t, reduction="none").sum().item()
    got = F.binary_cross_entropy_with_logits(x, t)
    assert ulp_distance(got, torch.tensor(exact / count, dtype=torch.float64)) <= 2


@pytest.mark.parametrize("divisor_shape", [(3, 7), (257, 1001)])
def test_mean_gradient_within_three_ulp(device: str, divisor_shape: tuple[int, int]) -> None:
    # 2 for the gradient, 1 for the division
    x = (torch.randn(divisor_shape) * 10).to(device).requires_grad_()
    t = torch.randint(0, 2, divisor_shape, device=device).float()
    F.binary_cross_entropy_with_logits(x, t).backward()
    assert x.grad is not None
    for target in (0.0, 1.0):
        chosen = (t == target).cpu()
        _, exact = exact_binary(x.detach().cpu()[chosen].double(), target)
        assert ulp_distance(x.grad.cpu()[chosen], exact / x.numel()).max() <= 3


PRINT_BITS = """
import hashlib, torch
from fused_sce import functional as F, _library
torch.manual_seed(0)
x = (torch.randn(300, 501) * 9).requires_grad_()
t = torch.rand(300, 501)
w = torch.rand(501)
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    loss = F.sigmoid_cross_entropy(x, t, weight=w)
    gradient, = torch.autograd.grad(loss, x)
    rows = F.multilabel_soft_margin_loss(x, t, reduction="none")
    hashed = hashlib.sha256(gradient.numpy().tobytes() + rows.detach().numpy().tobytes()).hexdigest()
    print(_library.build_facts()["isa"], loss.item().hex(), hashed)
"""


def run_with_isa(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FUSED_SCE_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("isa", _library.build_facts()["isas"].split())
def test_any_number_of_threads_gives_the_same_bits(isa: str) -> None:
    run = run_with_isa(isa, PRINT_BITS)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.split("\n")[:3]
    assert lines[0].startswith(f"{isa} ")
    assert lines[0] == lines[1] == lines[2]


def test_unknown_instruction_set_is_refused() -> None:
    run = run_with_isa("mmx", "import torch; from fused_sce import _library; _library.build_facts()")
    assert run.returncode != 0
    assert f"FUSED_SCE_ISA=mmx: this build and processor offer {_library.build_facts()['isas']}" in run.stderr


def test_repeated_runs_give_the_same_bits(device: str) -> None:
    x = torch.randn(999, 1001, device=device).requires_grad_()
    t = torch.rand(999, 1001, device=device)
    first = F.binary_cross_entropy_with_logits(x, t)
    (first_gradient,) = torch.autograd.grad(first, x)
    for _ in range(5):
        loss = F.binary_cross_entropy_with_logits(x, t)
        (gradient,) = torch.autograd.grad(loss, x)
        assert torch.equal(loss, first)
        assert torch.equal(gradient, first_gradient)
