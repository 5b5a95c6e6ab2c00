"""The formulas of csrc/formulas against exact values, without kernels and without torch."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import mpmath
import numpy as np
import pytest
from test_specials import exact_focal
from ulp import FORMATS, exact_binary, exact_terms, ulp_distance, ulp_of

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or "g++"
# The kernels' own flags.
FLAGS = ["-O2", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wall", "-Wextra"]

# The bounds that the comments of csrc/formulas state, in ULP: with fused multiply-add, and without.
LOSS = {"formulas_fma": 1.24, "formulas_without_fma": 1.27}
GRADIENT = 1.03
EXP_UPPER = 1.05
EXP_SUM = 0.58
EXP_SUM_TINY = 0.9  # where exp(-|x|) is normal but what its rounding lost is not
LOG1P_SUM = 0.75

# The type to compute exact values in. It must be wider, which long double is not everywhere.
WIDER: dict[str, Any] = {"float32": np.float64}
if np.finfo(np.longdouble).nmant >= 63:
    WIDER["float64"] = np.longdouble

# Where the formulas change character: zeros, subnormals, the ends of exp's reduction (0.3466), where `sigmoid(x) - t`
# loses float32 (17) and double (37), where exp becomes subnormal (87.4 and 708.4) and 0 (104 and 745.2).
EXTREMES = [
    0.0, 5e-324, 1e-310, 1e-45, 1e-38, 1.2e-38, 1e-20, 6e-8, 1e-7, 0.3465, 0.3466, 0.5, 0.6931472, 1.0, 16.6, 17.0,
    22.0, 36.7, 37.5, 87.3, 88.0, 88.7, 103.2, 103.97, 104.0, 104.1, 708.3, 709.0, 740.0, 744.9, 745.1, 745.2, 746.0,
    1e4, 1e30, 3.4e38,
]  # fmt: skip


def fma_flags() -> list[str]:
    """What makes fused multiply-add one instruction; without it the compiler calls the C library's."""
    cpuinfo = Path("/proc/cpuinfo")
    has = platform.machine() in ("x86_64", "AMD64") and cpuinfo.exists() and " fma " in cpuinfo.read_text()
    return ["-mfma"] if has else []


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    """tests/cpp/formulas.cpp compiled with fused multiply-add and without."""
    import pybind11

    folder = tmp_path_factory.mktemp("formulas")
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    variants = {
        "formulas_fma": ["-DFUSED_SCE_HAS_FMA=1", *fma_flags()],
        "formulas_without_fma": ["-DFUSED_SCE_HAS_FMA=0"],
    }
    command = [COMPILER, *FLAGS, "-shared", "-fPIC", "-fvisibility=hidden", *includes, ROOT / "tests/cpp/formulas.cpp"]
    compilers = [
        subprocess.Popen([*command, *flags, "-o", folder / f"{name}.so"], stderr=subprocess.PIPE, text=True)
        for name, flags in variants.items()
    ]
    modules = {}
    for name, compiler in zip(variants, compilers, strict=True):
        _, errors = compiler.communicate()
        assert compiler.returncode == 0, errors
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.so")
        assert spec is not None
        assert spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return modules


@pytest.fixture(params=["formulas_fma", "formulas_without_fma"])
def formulas(request: pytest.FixtureRequest, builds: dict[str, ModuleType]) -> ModuleType:
    return builds[request.param]


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with np.errstate(all="ignore"):  # overflow, underflow and NaN are what is tested
        yield


def float32_patterns(step: int) -> np.ndarray:
    """Every `step`-th bit pattern, infinities and NaN included."""
    return np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32).view(np.float32)


@functools.cache
def logits(dtype: str) -> np.ndarray:
    """Bit patterns of all sizes, the range where exp matters more densely, and the extremes with both signs."""
    rng = np.random.default_rng(0)
    if dtype == "float32":
        spread = float32_patterns(2003)
        dense = np.linspace(-110, 110, 500_001, dtype=np.float32)
    else:
        spread = np.ldexp(rng.uniform(-1, 1, 100_000), rng.integers(-1074, 1024, 100_000))
        # near 0.435, where the loss has the largest errors, in float32 too
        largest = rng.choice([-1, 1], 100_000) * rng.uniform(0.42, 0.48, 100_000)
        dense = np.concatenate([rng.normal(0, 4, 200_000), rng.uniform(-747, 747, 100_000), largest])
    extremes = np.array(EXTREMES).astype(dtype)
    return np.concatenate([spread, dense, extremes, -extremes, np.array([math.inf, -math.inf, math.nan], dtype)])


@functools.cache
def exact_results(dtype: str, target: float) -> tuple[np.ndarray, np.ndarray]:
    return exact_binary(logits(dtype).astype(WIDER[dtype]), target)


def test_the_builds_differ(builds: dict[str, ModuleType]) -> None:
    # Otherwise one of them is not what it says.
    x = np.linspace(-5, 5, 1001, dtype=np.float32)
    upper = [module.exp_parts(x)[0] for module in builds.values()]
    assert (upper[0] != upper[1]).any()


@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_targets_0_and_1_within_two_ulp(formulas: ModuleType, dtype: str, target: float) -> None:
    x = logits(dtype)
    t = np.full_like(x, target)
    bounds = (LOSS[formulas.__name__], GRADIENT)
    exact_values = exact_results(dtype, target)
    for got, exact, bound in zip(formulas.loss_and_gradient(x, t), exact_values, bounds, strict=True):
        distance = ulp_distance(got, exact)
        assert distance.max() <= bound, (x[distance.argmax()], distance.max())
        subnormal = abs(exact) < np.finfo(dtype).smallest_normal
        assert distance[subnormal].max() <= 1
        # nothing lost: 0 only where the exact value rounds to 0
        assert np.array_equal(got == 0, exact.astype(dtype) == 0)
    # pos_weight = 1 changes roundings
    weighted = formulas.loss_and_gradient(x, t, np.ones_like(x))
    for got, exact in zip(weighted, exact_values, strict=True):
        assert ulp_distance(got, exact).max() <= 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_extremes_against_mpmath(formulas: ModuleType, dtype: str, target: float) -> None:
    # also shows that the wider types of the other tests are exact enough, and tests double where there is no wider type
    rng = np.random.default_rng(1)
    extremes = np.array(EXTREMES).astype(dtype)
    x = np.concatenate([extremes, -extremes, rng.normal(0, 3, 200), rng.normal(0, 300, 100)]).astype(dtype)
    loss, gradient = formulas.loss_and_gradient(x, np.full_like(x, target))
    half_step = mpmath.mpf(float(np.finfo(dtype).smallest_subnormal)) / 2
    for i, logit in enumerate(x.tolist()):
        exact = exact_terms(logit, target)
        for got, value, bound in (
            (loss[i], exact.loss, LOSS[formulas.__name__]),
            (gradient[i], exact.gradient, GRADIENT),
        ):
            step = float(ulp_of(np.float64(value), dtype))
            assert abs(mpmath.mpf(float(got)) - value) <= bound * step, (logit, got)
            assert (got == 0) == (abs(value) <= half_step), (logit, got)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("with_pos_weight", [False, True])
def test_zeros_infinities_and_nan(formulas: ModuleType, dtype: str, with_pos_weight: bool) -> None:
    inf, nan = math.inf, math.nan
    log2 = float(np.log(np.array(2, dtype)))
    cases = [
        # x, t, loss, gradient
        (0.0, 0.0, log2, 0.5), (0.0, 1.0, log2, -0.5), (0.0, 0.5, log2, 0.0),
        (-0.0, 0.0, log2, 0.5), (-0.0, 1.0, log2, -0.5), (-0.0, 0.5, log2, 0.0),
        (inf, 1.0, 0.0, 0.0), (-inf, 0.0, 0.0, 0.0), (inf, 0.0, inf, 1.0), (-inf, 1.0, inf, -1.0),
        (inf, 0.25, inf, 0.75), (-inf, 0.25, inf, -0.25),
        (3e38, 0.0, 3e38, 1.0), (3e38, 1.0, 0.0, 0.0), (-3e38, 1.0, 3e38, -1.0), (-3e38, 0.0, 0.0, 0.0),
        (nan, 0.0, nan, nan), (nan, 1.0, nan, nan), (1.0, nan, nan, nan), (inf, nan, nan, nan), (-inf, nan, nan, nan),
    ]  # fmt: skip
    x, t, loss, gradient = (np.array(column, dtype=dtype) for column in zip(*cases, strict=True))
    pos_weight = (np.ones_like(x),) if with_pos_weight else ()
    got_loss, got_gradient = formulas.loss_and_gradient(x, t, *pos_weight)
    np.testing.assert_array_max_ulp(got_loss[:6], loss[:6], 1)
    np.testing.assert_array_equal(got_loss[6:], loss[6:])
    np.testing.assert_array_equal(got_gradient, gradient)


# gamma_pos, gamma_neg, clip: small integers with and without lowering, others, and large ones
FOCUSES = [
    (2, 2, 0.0), (0, 0, 0.0), (1, 4, 0.05), (0, 4, 0.05), (7, 5, 0.0), (3, 1, 0.3), (2, 0, 0.1), (0.5, 2.5, 0.0),
    (1, 0.5, 0.05), (0.3, 1.7, 0.7), (9, 8.5, 0.05), (40, 40, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.parametrize("focus", FOCUSES)
def test_focal_labels_within_their_bound(formulas: ModuleType, dtype: str, focus: tuple[float, float, float]) -> None:
    x = logits(dtype)[::9]
    x = x[~np.isnan(x)].copy()
    info = np.finfo(dtype)
    # the kernels get the options in their own dtype
    rounded = tuple(float(np.asarray(value, dtype)) for value in focus)
    for target in (0.0, 1.0):
        t = np.full_like(x, target)
        got = formulas.focal(x, t, *focus)
        wide = x.astype(WIDER[dtype])
        right = exact_focal(wide, t.astype(WIDER[dtype]), rounded)
        exact, bound = right[:2], right.bound
        for ours, value in zip(got, exact, strict=True):
            distance = ulp_distance(ours, value)
            tiny = np.abs(value) < info.smallest_normal
            if focus[2]:
                step = float(info.smallest_subnormal)
                slack = (1 + max(focus[:2])) / focus[2] * np.minimum(step / ulp_of(value, dtype), 1)
                good = distance <= bound + slack
            else:
                good = distance <= np.where(tiny, 1 + max(focus[:2]), bound)
            good |= ours == value
            assert good.all(), (target, x[~good][:5], ours[~good][:5], value[~good][:5], distance[~good][:5])
            assert distance[~tiny & np.isfinite(distance)].max(initial=1) > 0.4  # the comparison itself works


@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.parametrize("focus", FOCUSES)
@pytest.mark.parametrize("with_pos_weight", [False, True])
def test_focal_soft_targets_within_their_bound(
    formulas: ModuleType, dtype: str, focus: tuple[float, float, float], with_pos_weight: bool
) -> None:
    x = logits(dtype)
    x = x[abs(x) < 1e4][::15].copy()
    rng = np.random.default_rng(3)
    t = rng.uniform(0, 1, x.size).astype(dtype)
    t[::7], t[1::7] = 1e-6, 1 - 2.0**-20
    factor = np.exp(rng.uniform(-5, 5, x.size)).astype(dtype) if with_pos_weight else np.ones_like(x)
    got = formulas.focal(x, t, *focus, pos_weight=factor if with_pos_weight else None)
    wide = [array.astype(WIDER[dtype]) for array in (x, t, factor)]
    rounded = tuple(float(np.asarray(value, dtype)) for value in focus)
    right = exact_focal(wide[0], wide[1], rounded, wide[2])
    bound = right.bound
    for ours, value, size in zip(got, right[:2], (right.loss_terms, right.gradient_terms), strict=True):
        # steps of a subnormal sigmoid or power are multiplied by what follows
        steps = (1 + max(focus[:2])) / (focus[2] or 1) * (1 + factor) + size
        error = np.abs(ours - value) - steps * float(np.finfo(dtype).smallest_subnormal)
        error /= ulp_of(right.power * size, dtype)
        assert (error <= bound).all(), (x[error > bound][:5], t[error > bound][:5], error[error > bound][:5])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_focal_losses_against_mpmath(formulas: ModuleType, dtype: str) -> None:
    # shows that the wider types of the other tests are exact enough
    extremes = np.array(EXTREMES).astype(dtype)
    x = np.concatenate([extremes, -extremes])
    for focus in ((2, 2, 0.0), (1, 4, 0.05), (0.5, 2.5, 0.25)):
        gammas, clip = focus[:2], mpmath.mpf(float(np.asarray(focus[2], dtype)))
        for target in (0, 1):
            loss, gradient = formulas.focal(x, np.full_like(x, target), *focus)
            for i, logit in enumerate(x.tolist()):
                with mpmath.workprec(3000):
                    p, s = 1 / (1 + mpmath.exp(-mpmath.mpf(logit))), 1 / (1 + mpmath.exp(mpmath.mpf(logit)))
                    m, g = (s, gammas[0]) if target else (max(p - clip, 0), gammas[1])
                    c = -mpmath.log(p if target else s + clip if m else mpmath.mpf(1))
                    power = m**g if m else mpmath.mpf(not g)
                    slope = -s if target else (p * s / (s + clip) if m else 0)
                    rate = (-p if target else p * s / m) if m else 0
                    exact = power * c, power * (slope + g * rate * c)
                bound = 4 + 2 * (g if target or not clip else (1 + g) * float(p / m) if m else 0)
                bound += (1 + g) / focus[2] if focus[2] and abs(logit) > 80 else 0
                for ours, value in zip((loss[i], gradient[i]), exact, strict=True):
                    error = abs(float(mpmath.mpf(float(ours)) - value)) / float(ulp_of(np.float64(float(value)), dtype))
                    assert error <= bound, (focus, target, logit, ours, error, bound)


@pytest.mark.parametrize("dtype", WIDER)
def test_powers(formulas: ModuleType, dtype: str) -> None:
    rng = np.random.default_rng(4)
    info = np.finfo(dtype)
    base = np.concatenate([rng.uniform(0, 1, 20_000), 2.0 ** rng.uniform(info.minexp - 20, 0, 20_000)]).astype(dtype)
    base[:4] = 0, 1, info.smallest_subnormal, 1 - info.epsneg
    exponent = rng.choice([0.0, 0.01, 0.5, 1.0, 1.5, 2.0, 3.7, 12.0, 300.0], base.size).astype(dtype)
    got = formulas.power(base, exponent)
    exact = base.astype(WIDER[dtype]) ** exponent.astype(WIDER[dtype])
    error = (np.abs(got - exact) - float(info.smallest_subnormal)) / ulp_of(exact, dtype)
    assert (error <= 2 + exponent / 2).all(), (base[error.argmax()], exponent[error.argmax()], error.max())
    assert error.max() > 0.4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("focus", FOCUSES)
def test_focal_infinities_and_nan(formulas: ModuleType, dtype: str, focus: tuple[float, float, float]) -> None:
    inf, nan = math.inf, math.nan
    x = np.array([inf, -inf, inf, -inf, nan, nan, 1.0, inf], dtype)
    t = np.array([1, 0, 0, 1, 0, 1, nan, nan], dtype)
    loss, gradient = formulas.focal(x, t, *focus)
    clip = focus[2]
    of_clip = -math.log(float(np.asarray(clip, dtype))) * (1 - clip) ** focus[1] if clip else inf
    np.testing.assert_array_equal(loss[:2], 0)
    np.testing.assert_array_equal(gradient[:2], 0)
    np.testing.assert_allclose(loss[2:4], [of_clip, inf], rtol=1e-5)
    np.testing.assert_array_equal(gradient[2:4], [0 if clip else 1, -1])
    assert np.isnan(loss[4:]).all()
    assert np.isnan(gradient[4:]).all()
    # a factor of 0 leaves out whatever it is
    loss, gradient = formulas.focal(x[:6], t[:6], *focus, alpha=0.0)
    np.testing.assert_array_equal(loss[t[:6] == 1], 0)
    np.testing.assert_array_equal(gradient[t[:6] == 1], 0)


@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.parametrize("with_pos_weight", [False, True])
def test_targets_in_between_within_four_ulp_of_the_terms(
    formulas: ModuleType, dtype: str, with_pos_weight: bool
) -> None:
    x = logits(dtype)
    x = x[abs(x) < 1e4][::2].copy()
    rng = np.random.default_rng(2)
    t = rng.uniform(0, 1, x.size).astype(dtype)
    t[::7] = 1e-6
    t[1::7] = 1 - 2.0**-20
    t[2::7] = (1 / (1 + np.exp(-x)))[2::7]  # where the terms of the gradient cancel
    t = np.maximum(t, np.array(1e-30, dtype))  # pos_weight * t is no subnormal number
    t[3::14] = 0
    t[10::14] = 1
    pos_weight = np.exp(rng.uniform(-7, 7, x.size)).astype(dtype) if with_pos_weight else None
    loss, gradient = formulas.loss_and_gradient(x, t, pos_weight)

    wider = WIDER[dtype]
    factor = np.ones_like(x) if pos_weight is None else pos_weight
    exact = exact_terms(x.astype(wider), t.astype(wider), factor.astype(wider))
    # pos_weight multiplies the step of a subnormal exp(-|x|) too
    slack = 2 * factor * float(np.finfo(dtype).smallest_subnormal) if with_pos_weight else 0.0
    for got, value, size in (
        (loss, exact.loss, exact.loss_terms),
        (gradient, exact.gradient, exact.gradient_terms),
    ):
        error = (abs(got - value) - slack) / ulp_of(size, dtype)
        assert error.max() <= 4, (x[error.argmax()], t[error.argmax()])
        assert error.max() > 0.5  # the comparison itself works


@pytest.mark.parametrize("dtype", WIDER)
def test_exp_and_log1p_in_two_parts(formulas: ModuleType, dtype: str) -> None:
    wider = WIDER[dtype]
    bits = -np.log2(np.finfo(dtype).smallest_normal)
    largest = bits * math.log(2)  # exp(-largest) is the smallest normal number
    lost_is_normal = largest - (FORMATS[dtype].mantissa + 1) * math.log(2)
    x = logits(dtype)
    x = np.concatenate([x[abs(x) <= 0.9999 * largest], np.linspace(0, 20, 300_001).astype(dtype)])
    upper, lower = formulas.exp_parts(x)
    exact = np.exp(-abs(x).astype(wider))
    assert ulp_distance(upper, exact).max() <= EXP_UPPER
    distance = ulp_distance(upper.astype(wider) + lower, exact, dtype)
    assert distance.max() <= EXP_SUM_TINY
    assert distance[abs(x) < lost_is_normal].max() <= EXP_SUM

    e = np.concatenate([np.linspace(1e-6, 1, 300_001).astype(dtype), upper[upper > 0]])
    for lost in (-0.5, 0.0, 0.5):
        lower = (lost * np.finfo(dtype).eps * e).astype(dtype)
        parts = formulas.log1p_parts(e, lower)
        exact = np.log1p(e.astype(wider) + lower)
        distance = ulp_distance(parts[0].astype(wider) + parts[1], exact, dtype)
        assert distance.max() <= LOG1P_SUM, (e[distance.argmax()], lost)


def test_exp_is_rounded_once_where_it_is_subnormal(formulas: ModuleType) -> None:
    x = np.concatenate([np.linspace(87.4, 104.5, 300_001), [104.0, 1e10, 3.4e38, math.inf]]).astype(np.float32)
    upper, _ = formulas.exp_parts(x)
    exact = np.exp(-x.astype(np.float64))
    assert ulp_distance(upper, exact).max() <= 0.5 + EXP_UPPER / 2
    assert np.array_equal(upper == 0, exact.astype(np.float32) == 0)
    assert np.isnan(formulas.exp_parts(np.array([math.nan], np.float32))[0]).all()


# The 16-bit types


def decoded(dtype: str, bits: np.ndarray) -> np.ndarray:
    """The numbers that 16-bit patterns mean, as float32; numpy knows float16, and bfloat16 is the upper half of one."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


@functools.cache
def every_16_bit(dtype: str) -> np.ndarray:
    return decoded(dtype, np.arange(2**16, dtype=np.uint16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_conversions_of_16_bit_types(formulas: ModuleType, dtype: str) -> None:
    encode, decode = getattr(formulas, f"to_{dtype}"), getattr(formulas, f"from_{dtype}")
    every = np.arange(2**16, dtype=np.uint16)
    exact = decoded(dtype, every)
    assert np.array_equal(decode(every), exact, equal_nan=True)
    number = ~np.isnan(exact)
    assert np.array_equal(encode(exact)[number], every[number])
    # The nearest, ties to even. Ties are the numbers between two neighbours; a step aside decides.
    finite = np.sort(exact[np.isfinite(exact)]).astype(np.float64)
    ties = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    aside = [np.nextafter(ties, np.float32(direction)) for direction in (-math.inf, math.inf)]
    past_the_largest = np.array([65519.996, 65520, 3.4e38, math.inf], np.float32)
    x = np.concatenate([float32_patterns(2003), ties, *aside, past_the_largest, -past_the_largest])
    wide = x.astype(np.float64)
    step = ulp_of(wide, dtype)
    nearest = np.where(np.isfinite(wide), np.rint(wide / step) * step, wide)
    nearest = np.where(abs(nearest) > FORMATS[dtype].largest, np.copysign(math.inf, nearest), nearest)
    got = decoded(dtype, encode(x))
    assert np.array_equal(got, np.where(np.isnan(wide), math.nan, nearest), equal_nan=True)
    assert np.array_equal(np.signbit(got)[~np.isnan(x)], np.signbit(x)[~np.isnan(x)])


def unit_errors(size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Relative errors of exp2 and reciprocal: every combination of the largest of either sign and 0; then at random.

    For a mantissa of 1 they are the 2 ULP and 1 ULP of floats.h, for one of almost 2 twice as many.
    """
    for exp2_sign, reciprocal_sign in itertools.product((-1, 0, 1), repeat=2):
        yield np.full(size, exp2_sign * 2.0**-22), np.full(size, reciprocal_sign * 2.0**-23)
    rng = np.random.default_rng(3)
    yield rng.uniform(-1, 1, size) * 2.0**-22, rng.uniform(-1, 1, size) * 2.0**-23
    yield rng.choice([-1, 1], size) * 2.0**-22, rng.choice([-1, 1], size) * 2.0**-23


def relative_bound(x: np.ndarray) -> np.ndarray:
    """The relative error that gpu16.h states."""
    return 2.0**-20 + np.minimum(abs(x.astype(np.float64)), 104) * 2.0**-23


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("with_pos_weight", [False, True])
def test_gpu_formula_of_every_16_bit_logit(
    builds: dict[str, ModuleType], dtype: str, target: float, with_pos_weight: bool
) -> None:
    formulas = builds["formulas_fma"]  # a GPU has fused multiply-add
    x = every_16_bit(dtype)
    t = np.full_like(x, target)
    exact_loss, exact_gradient = exact_binary(x.astype(np.float64), target)
    # without pos_weight it must come out as NaN, for the caller to notice
    unnoticed = np.isinf(x) & (exact_loss == 0) & (not with_pos_weight)
    relative = (exact_loss >= 2.0**-126) & np.isfinite(exact_loss)
    for errors in unit_errors(x.size):
        loss, gradient = formulas.loss_and_gradient_16bit(x, t, np.ones_like(x) if with_pos_weight else None, *errors)
        assert np.isnan(loss[unnoticed]).all()
        error = abs(loss - exact_loss)
        assert (error[relative] <= (exact_loss * relative_bound(x))[relative]).all()
        if not np.any(errors):
            # The error of the polynomial and of its roundings; the argument of exp2 adds little for small logits.
            small = abs(x) < 1
            assert (error[small] <= exact_loss[small] * 3 * 2.0**-24).all()
        # Below the normal numbers within one subnormal step, so that nothing is lost.
        rest = ~relative & ~unnoticed & ~np.isnan(x) & ~np.isinf(exact_loss)
        assert (error[rest] <= 2.0**-149 + exact_loss[rest] * 2.0**-16).all()
        assert np.array_equal(np.isnan(loss), np.isnan(x) | unnoticed)
        assert np.array_equal(loss == math.inf, exact_loss == math.inf)

        rounded = decoded(dtype, getattr(formulas, f"to_{dtype}")(gradient))
        assert ulp_distance(rounded, exact_gradient, dtype).max() <= 0.51
        assert np.array_equal(np.sign(gradient), np.sign(exact_gradient.astype(np.float32)), equal_nan=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("with_pos_weight", [False, True])
def test_gpu_formula_for_targets_in_between(builds: dict[str, ModuleType], dtype: str, with_pos_weight: bool) -> None:
    x = every_16_bit(dtype)
    x = x[abs(x) < 1e4]
    rng = np.random.default_rng(4)
    t = rng.uniform(0, 1, x.size).astype(np.float32)
    t[::7] = 1e-6
    t[2::7] = (1 / (1 + np.exp(-x)))[2::7]
    pos_weight = np.exp(rng.uniform(-4, 4, x.size)).astype(np.float32) if with_pos_weight else None
    factor = np.ones_like(x) if pos_weight is None else pos_weight
    exact = exact_terms(x.astype(np.float64), t.astype(np.float64), factor.astype(np.float64))
    for errors in unit_errors(x.size):
        loss, gradient = builds["formulas_fma"].loss_and_gradient_16bit(x, t, pos_weight, *errors)
        # and steps of a subnormal exp(-|x|), as often as they are multiplied
        steps = (1 + factor) * 2.0**-149
        assert (abs(loss - exact.loss) <= exact.loss_terms * relative_bound(x) + steps).all()
        assert (abs(gradient - exact.gradient) <= exact.gradient_terms * relative_bound(x) + steps).all()


def test_quotient_by_steps_is_the_nearest_float(builds: dict[str, ModuleType]) -> None:
    one = int(np.float32(1).view(np.uint32))
    # A coarse sweep, the floats around 2^-24 (from where on 1 + e is more than 1), and the ones just below 1.
    around = [int(np.float32(2.0**power).view(np.uint32)) for power in (-25, -23)]
    bits = np.concatenate([np.arange(0, one + 1, 101), np.arange(*around, 3), np.arange(one - 100_000, one + 1)])
    e = bits.astype(np.uint32).view(np.float32)
    nearest = e / (1 + e)
    rng = np.random.default_rng(5)
    for errors in (np.full(e.size, -1.0), np.zeros(e.size), np.ones(e.size), rng.uniform(-1, 1, e.size)):
        got = builds["formulas_fma"].quotient_by_steps(e, errors * 2.0**-23)
        assert np.array_equal(got, nearest)
