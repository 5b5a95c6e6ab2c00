"""Fit the minimax polynomials of csrc/formulas and print them as C++ initialisers.

    python tools/fit_polynomials.py

The fit is the Remez exchange algorithm (E. Remez, 1934) in 60-digit arithmetic. It minimises the error relative to the
whole function:

* exp(r) = 1 + r + r^2 q(r)         on |r| <= ln(2)/2, error relative to exp(r);
* log1p(e) = e - e^2 / 2 + e^3 q(e) on [0, 1],         error relative to log1p(e);
* log1p(e) = e - d (1/2 + s q(d))   on [0, 1],         error relative to log1p(e), with d = e - w, s = e + w and
  w = e / (1 + e);
* log1p(e) = e + e^2 q(e)           on [0, 1],         error relative to log1p(e), for 16-bit logits on a GPU.

The first three exist for float and for double. Their degree is the smallest whose error stays below an eighth of the
type's rounding error, so the polynomial hardly affects the last bit. The degree of the last is the smallest whose
error stays below the rounding error itself. The one by the gap has one more in double.
"""

from __future__ import annotations

from collections.abc import Callable

from mpmath import mp, mpf

mp.dps = 60

Function = Callable[[mpf], mpf]


def remez(function: Function, weight: Function, low: mpf, high: mpf, powers: list[int]) -> tuple[list[mpf], mpf]:
    """Coefficients of x**powers minimising max |function - p| * weight on [low, high], and that maximum."""
    count = len(powers) + 1
    nodes = [(low + high) / 2 - (high - low) / 2 * mp.cos(mp.pi * (2 * k + 1) / (2 * count)) for k in range(count)]
    points = grid(low, high)
    coefficients: list[mpf] = []
    worst = mpf(0)
    for _ in range(12):
        system = mp.matrix(count, count)
        values = mp.matrix(count, 1)
        for row, x in enumerate(nodes):
            for column, power in enumerate(powers):
                system[row, column] = x**power
            system[row, count - 1] = (-1) ** row / weight(x)
            values[row] = function(x)
        solution = mp.lu_solve(system, values)
        coefficients = [solution[k] for k in range(count - 1)]
        levelled = abs(solution[count - 1])

        errors = [(function(x) - evaluate(coefficients, powers, x)) * weight(x) for x in points]
        worst = max(abs(error) for error in errors)
        # One extremum of the error in each run of equal sign becomes a node of the next round.
        extrema: list[tuple[mpf, mpf]] = []
        for x, error in zip(points, errors, strict=True):
            if extrema and (error >= 0) == (extrema[-1][1] >= 0):
                if abs(error) > abs(extrema[-1][1]):
                    extrema[-1] = (x, error)
            else:
                extrema.append((x, error))
        while len(extrema) > count:
            extrema.pop(0 if abs(extrema[0][1]) < abs(extrema[-1][1]) else -1)
        if len(extrema) < count or worst < levelled * mpf("1.0001"):
            break
        nodes = [x for x, _ in extrema]
    return coefficients, worst


def grid(low: mpf, high: mpf) -> list[mpf]:
    """The 2001 evenly spaced points at which errors are measured."""
    return [low + (high - low) * mpf(k) / 2000 for k in range(2001)]


def evaluate(coefficients: list[mpf], powers: list[int], x: mpf) -> mpf:
    """The polynomial with these coefficients of these powers at x."""
    return mp.fsum(c * x**power for c, power in zip(coefficients, powers, strict=True))


def remez_rounded(
    function: Function, weight: Function, low: mpf, high: mpf, degree: int, first: mpf, bits: int, in_turn: int
) -> tuple[list[mpf], mpf]:
    """As remez, for powers 0 to `degree`, with coefficients rounded to `bits` bits; `first` is the constant one.

    The first `in_turn` coefficients are rounded one after the other, and the rest is fitted anew each time. Rounding
    all of them after one fit would add more than the polynomial's own error. The higher ones are so small that their
    rounding does not matter.
    """
    fixed = [first]
    while True:
        known = list(fixed)
        rest, _ = remez(
            lambda x, known=known: function(x) - evaluate(known, list(range(len(known))), x),  # type: ignore[misc]
            weight,
            low,
            high,
            list(range(len(known), degree + 1)),
        )
        with mp.workprec(bits):
            if len(fixed) == in_turn or len(rest) == 1:
                fixed += [+c for c in rest]
                break
            fixed.append(+rest[0])
    powers = list(range(degree + 1))
    return fixed, max(abs((function(x) - evaluate(fixed, powers, x)) * weight(x)) for x in grid(low, high))


def exp_tail(r: mpf) -> mpf:
    """(exp(r) - 1 - r) / r^2, by its series where the subtraction would cancel."""
    if abs(r) < mpf("1e-8"):
        return sum(r**k / mp.factorial(k + 2) for k in range(8))
    return (mp.expm1(r) - r) / r**2


def log1p_tail(e: mpf) -> mpf:
    """(log1p(e) - e) / e^2, by its series where the subtraction would cancel."""
    if abs(e) < mpf("1e-8"):
        return sum((-1) ** (k + 1) * e**k / (k + 2) for k in range(8))
    return (mp.log1p(e) - e) / e**2


def log1p_of_gap(gap: mpf) -> mpf:
    """Compute q of log1p(e) = e - d (1/2 + s q(d)) for d > 0: with L = log1p(e), d = 2 cosh(L) - 2, s = 2 sinh(L)."""
    log1p = mp.acosh(1 + gap / 2)
    return (mp.sinh(log1p) - log1p) / (2 * gap * mp.sinh(log1p))


def weight_of_gap(gap: mpf) -> mpf:
    """What an error of log1p_of_gap is multiplied by, relative to log1p(e)."""
    log1p = mp.acosh(1 + gap / 2)
    return gap * 2 * mp.sinh(log1p) / log1p


def log1p_ratio(e: mpf) -> mpf:
    """log1p(e) / e, by its series where e might be 0."""
    if abs(e) < mpf("1e-8"):
        return sum((-1) ** k * e**k / (k + 1) for k in range(8))
    return mp.log1p(e) / e


def show(name: str, kind: str, coefficients: list[mpf], error: mpf) -> None:
    """Print one coefficient table, highest power first as Horner's scheme reads it."""
    digits = 10 if kind == "float" else 18
    suffix = "f" if kind == "float" else ""
    print(f"// {name}, {kind}: largest relative error 2^{mp.nstr(mp.log(error, 2), 4)}")
    for coefficient in reversed(coefficients):
        print(f"    {mp.nstr(coefficient, digits)}{suffix},")


def main() -> None:
    """Fit and print all seven."""
    half_ln2 = mp.log(2) / 2 * mpf("1.0001")  # rounding may put r a little past the edge
    for kind, bits, exp_degree, log_degree, gap_degree, in_turn, gap_in_turn in (
        ("float", 24, 4, 9, 4, 10, 5),
        ("double", 53, 9, 20, 10, 6, 3),
    ):
        coefficients, error = remez(
            exp_tail,
            lambda r: r**2 / mp.exp(r) + mpf("1e-9"),
            -half_ln2,
            half_ln2,
            list(range(exp_degree + 1)),
        )
        show("exp", kind, coefficients, error)
        coefficients, error = remez_rounded(
            log1p_tail,
            lambda e: e**2 / mp.log1p(e),
            mpf("1e-6"),
            mpf(1),
            log_degree,
            mpf(-0.5),
            bits,
            in_turn,
        )
        show("log1p", kind, coefficients[1:], error)  # exp_log1p.h treats the constant, -1/2, by itself
        smallest, half = mpf("1e-9"), mpf(1) / 2
        first = remez(log1p_of_gap, weight_of_gap, smallest, half, list(range(gap_degree + 1)))[0][0]
        with mp.workprec(bits):
            first = +first
        coefficients, error = remez_rounded(
            log1p_of_gap, weight_of_gap, smallest, half, gap_degree, first, bits, gap_in_turn
        )
        show("log1p by the gap", kind, coefficients, error)
    coefficients, error = remez_rounded(
        log1p_ratio, lambda e: 1 / log1p_ratio(e), mpf("1e-9"), mpf(1), 8, mpf(1), 24, in_turn=9
    )
    show("log1p(e) / e", "float", coefficients, error)


if __name__ == "__main__":
    main()
