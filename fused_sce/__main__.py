"""`python -m fused_sce`: what is installed, what it was built for, and whether it computes what it should."""

from __future__ import annotations

import math
import platform
import sys

import torch

import fused_sce
from fused_sce import _library


def versions() -> dict[str, str]:
    """Facts of this installation, by name."""
    facts = _library.build_facts()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "fused_sce": fused_sce.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": facts["compiler"],
        "CPU kernels": f"{facts['isa']} (of {facts['isas']}), {torch.get_num_threads()} threads",
        "CUDA kernels": facts["cuda"] or f"none: {_library.why_no_cuda_kernels()}",
        "GPUs": ", ".join(gpus) or "none visible",
    }


def self_check(device: str) -> list[str]:
    """Compute losses whose value is known, tails included, on one device; the failures, as text."""
    failures = []
    logits = torch.tensor([0.0, 2.5, -2.5, 40.0, -40.0, 100.0, -100.0, math.inf, -math.inf])
    for target in (0.0, 1.0):
        x = logits.to(device).requires_grad_()
        t = torch.full_like(x, target)
        loss = fused_sce.functional.sigmoid_cross_entropy(x, t, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        signed = (-logits if target else logits).double()  # the logit of the wrong answer
        exact_loss = signed.clamp(min=0) + torch.log1p(torch.exp(-signed.abs()))
        exact_gradient = torch.sigmoid(signed) * (-1 if target else 1)
        for name, got, exact in (
            ("loss", loss.detach(), exact_loss),
            ("gradient", gradient, exact_gradient),
        ):
            # 4 units in the last place: the float64 figures here are rounded to float32 once more
            ok = torch.isclose(got.cpu(), exact.float(), rtol=4 * 2.0**-24, atol=2.0**-148)
            for x_bad, got_bad, exact_bad in zip(logits[~ok], got.cpu()[~ok], exact[~ok], strict=True):
                failures.append(
                    f"{device}: {name} of logit {x_bad:g}, target {target:g} is {got_bad:.9g}, not {exact_bad:.9g}"
                )
    return failures


def main() -> int:
    """Print the facts and the check; 0 if all is well."""
    try:
        facts = versions()
    except ValueError as error:  # FUSED_SCE_ISA names an instruction set that cannot run
        print(error, file=sys.stderr)
        return 1
    for name, value in facts.items():
        print(f"{name:14}{value}")
    devices = ["cpu"]
    if _library.has_cuda_kernels and torch.cuda.is_available():
        devices.append("cuda")
    failures = [failure for device in devices for failure in self_check(device)]
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{'self-check':14}{'FAILED' if failures else 'passed'} on {' and '.join(devices)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
