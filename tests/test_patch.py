"""patch_torch(): other people's code through the fused losses, unmodified, and back again."""

from __future__ import annotations

import importlib
import inspect
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as torch_functional
from torch.overrides import TorchFunctionMode

import fused_sce

NAMES = ("binary_cross_entropy_with_logits", "multilabel_soft_margin_loss")
ORIGINALS = {name: getattr(torch_functional, name) for name in NAMES}


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    left = {name for name in NAMES if getattr(torch_functional, name) is not ORIGINALS[name]}
    for name, original in ORIGINALS.items():
        setattr(torch_functional, name, original)
    assert not left


def sample() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 5, requires_grad=True), torch.rand(6, 5)


def is_fused(loss: Tensor) -> bool:
    assert loss.grad_fn is not None
    return "BinaryCrossEntropy" not in loss.grad_fn.name() and "Mean" not in loss.grad_fn.name()


MODULES: list[Any] = [
    nn.BCEWithLogitsLoss(),
    nn.BCEWithLogitsLoss(weight=torch.rand(5), reduction="sum", pos_weight=torch.rand(6, 1)),
    nn.MultiLabelSoftMarginLoss(),
    nn.MultiLabelSoftMarginLoss(weight=torch.rand(5)),
]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_torchs_modules_become_fused(module: nn.Module) -> None:
    x, t = sample()
    before = module(x, t)
    assert not is_fused(before)
    with fused_sce.patch_torch():
        patched = module(x, t)
        assert is_fused(patched)
    torch.testing.assert_close(patched, before)
    torch.testing.assert_close(torch.autograd.grad(patched, x), torch.autograd.grad(before, x))
    assert not is_fused(module(x, t))


def test_as_a_call() -> None:
    x, t = sample()
    fused_sce.patch_torch()
    try:
        assert is_fused(torch_functional.binary_cross_entropy_with_logits(x, t))
        assert is_fused(nn.BCEWithLogitsLoss()(x, t))
    finally:
        fused_sce.unpatch_torch()
    assert all(getattr(torch_functional, name) is original for name, original in ORIGINALS.items())


def test_an_exception_undoes_it() -> None:
    with pytest.raises(KeyError), fused_sce.patch_torch():
        raise KeyError("x")
    assert torch_functional.binary_cross_entropy_with_logits is ORIGINALS["binary_cross_entropy_with_logits"]


def test_the_other_thread_sees_it_too() -> None:
    x, t = sample()
    seen = []
    with fused_sce.patch_torch():
        thread = threading.Thread(target=lambda: seen.append(is_fused(nn.BCEWithLogitsLoss()(x, t))))
        thread.start()
        thread.join()
    assert seen == [True]


def test_patching_twice_is_refused() -> None:
    with fused_sce.patch_torch():
        with pytest.raises(RuntimeError, match=r"patched already: call unpatch_torch\(\) first"):
            fused_sce.patch_torch()
        x, t = sample()
        assert is_fused(nn.BCEWithLogitsLoss()(x, t))  # the first is still in place
    with pytest.raises(RuntimeError, match="torch is not patched"):
        fused_sce.unpatch_torch()


def test_unpatching_within_the_block_is_told_at_its_end() -> None:
    with pytest.raises(RuntimeError, match="torch is not patched"), fused_sce.patch_torch():
        fused_sce.unpatch_torch()


def test_somebody_elses_patch_on_top_is_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(*args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())

    fused_sce.patch_torch()
    with monkeypatch.context() as context:
        context.setattr(torch_functional, "multilabel_soft_margin_loss", theirs)
        with pytest.raises(RuntimeError, match=r"multilabel_soft_margin_loss was replaced again .*theirs"):
            fused_sce.unpatch_torch()
        assert torch_functional.multilabel_soft_margin_loss is theirs
        x, t = sample()
        assert is_fused(torch_functional.binary_cross_entropy_with_logits(x, t))  # nothing half undone
    fused_sce.unpatch_torch()


@pytest.mark.parametrize("name", NAMES)
def test_looks_like_torchs_function(name: str) -> None:
    with fused_sce.patch_torch():
        patched = getattr(torch_functional, name)
        assert inspect.signature(patched) == inspect.signature(ORIGINALS[name])
        assert patched.__doc__ == ORIGINALS[name].__doc__
        assert patched.__name__ == name
        assert pickle.loads(pickle.dumps(patched)) is patched


def test_every_argument_by_place_and_by_name() -> None:
    x, t = sample()
    weight, pos_weight = torch.rand(5), torch.rand(5)
    by_place = (weight, None, None, "sum", pos_weight)
    by_name = {"weight": weight, "reduction": "sum", "pos_weight": pos_weight}
    expected = torch_functional.binary_cross_entropy_with_logits(x, t, *by_place)
    with fused_sce.patch_torch():
        torch.testing.assert_close(torch_functional.binary_cross_entropy_with_logits(x, t, *by_place), expected)
        torch.testing.assert_close(
            torch_functional.binary_cross_entropy_with_logits(input=x, target=t, **by_name), expected
        )
        with pytest.raises(ValueError, match="must be the same as input size"):
            torch_functional.binary_cross_entropy_with_logits(x, t[:3])


def test_subclasses_and_modes_are_asked() -> None:
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(function)
            return function(*args, **(kwargs or {}))

    x, t = sample()
    asked: list[Any] = []
    with fused_sce.patch_torch():
        loss = torch_functional.binary_cross_entropy_with_logits(
            x.as_subclass(Subclass),  # type: ignore[no-untyped-call]
            t,
        )
        assert type(loss) is Subclass
        weight = torch.rand(5).as_subclass(Subclass)  # type: ignore[no-untyped-call]
        assert type(torch_functional.multilabel_soft_margin_loss(x, t, weight)) is Subclass
        with Mode():
            torch_functional.multilabel_soft_margin_loss(x, t)
        assert asked[0].__name__ == "multilabel_soft_margin_loss"


class Subclass(Tensor):
    """Any subclass that does not say otherwise: results are of it."""


def test_subclasses_are_asked_by_compiled_code() -> None:
    torch._dynamo.reset()
    x, t = sample()
    compiled = torch.compile(torch_functional.binary_cross_entropy_with_logits, backend="eager", fullgraph=True)
    with fused_sce.patch_torch():
        patched = torch.compile(torch_functional.binary_cross_entropy_with_logits, backend="eager", fullgraph=True)
        for function in (compiled, patched):
            loss = function(x.as_subclass(Subclass), t)  # type: ignore[no-untyped-call]
            assert type(loss) is Subclass


def test_compiled_code_follows() -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    x, t = sample()
    compiled = torch.compile(nn.BCEWithLogitsLoss(), backend=backend, fullgraph=True)
    expected = compiled(x, t)
    with fused_sce.patch_torch():
        torch.testing.assert_close(compiled(x, t), expected)
    compiled(x, t)
    assert ["fused_sce" in code for code in graphs] == [False, True]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_goes_on_compiling_torchs() -> None:
    x, t = sample()
    with fused_sce.patch_torch():
        for module in (nn.BCEWithLogitsLoss(), nn.MultiLabelSoftMarginLoss()):
            torch.testing.assert_close(torch.jit.script(module)(x, t), module(x, t))


# Each library's own loss, and an operation that it is made of.
LIBRARIES = {
    "patched_huggingface": ("transformers", "aten::binary_cross_entropy_with_logits"),
    "patched_timm": ("timm", "aten::binary_cross_entropy_with_logits"),
    "patched_lightning": ("lightning", "aten::log_sigmoid"),
    "patched_keras": ("keras", "aten::binary_cross_entropy_with_logits"),
}


# What the libraries themselves warn of is theirs.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("example", list(LIBRARIES))
def test_other_peoples_training(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library, torchs_op = LIBRARIES[example]
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    for needed in (library, "torchvision", "sklearn"):
        pytest.importorskip(needed)
    steps = 6
    plain, fused = importlib.import_module(example).main(["--steps", str(steps)])
    assert len(plain.losses) == len(fused.losses) == steps
    assert plain.losses == pytest.approx(fused.losses, abs=1e-6)
    assert fused.losses[-1] < fused.losses[0]
    # the profiler: torch's loss in the one, ours in its place in the other
    assert plain.calls[torchs_op] >= steps
    assert not any("fused_sce" in name for name in plain.calls)
    assert sum(count for name, count in fused.calls.items() if "sigmoid_cross_entropy" in name) >= steps
    assert not any(name.startswith("aten::") for name in fused.calls)
