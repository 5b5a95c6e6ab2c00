"""patch_torch(): other people's code through the fused losses, unmodified, and back again."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import io
import pickle
import pydoc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as torch_functional
from torch.nn.functional import binary_cross_entropy_with_logits as imported_before
from torch.overrides import TorchFunctionMode, get_testing_overrides, resolve_name
from torch.profiler import ProfilerActivity, profile

import fused_sce

NAMES = ("binary_cross_entropy_with_logits", "multilabel_soft_margin_loss")
FUNCTIONS: dict[str, Any] = {name: getattr(torch_functional, name) for name in NAMES}
CODES = {name: function.__code__ for name, function in FUNCTIONS.items()}


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    left = [name for name, function in FUNCTIONS.items() if function.__code__ is not CODES[name] or vars(function)]
    with suppress(RuntimeError):
        fused_sce.unpatch_torch()
    for name, function in FUNCTIONS.items():
        function.__code__ = CODES[name]
    assert not left


def sample() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 5, requires_grad=True), torch.rand(6, 5)


def is_fused(loss: Tensor) -> bool:
    assert loss.grad_fn is not None
    return "BinaryCrossEntropy" not in loss.grad_fn.name() and "Mean" not in loss.grad_fn.name()


def is_patched() -> bool:
    fused = {is_fused(function(*sample())) for function in FUNCTIONS.values()}
    assert len(fused) == 1
    return fused.pop()


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


class Keeper(nn.Module):
    """A module that keeps torch's function, as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = torch_functional.binary_cross_entropy_with_logits

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.loss(input, target)


def through_file(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, through_file])
def test_whoever_keeps_a_function_follows(copied: Callable[[Any], Any]) -> None:
    x, t = sample()
    before = Keeper()
    with fused_sce.patch_torch():
        from torch.nn.functional import binary_cross_entropy_with_logits as imported_inside

        inside = Keeper()
        losses = [imported_before, imported_inside, before, inside, copied(before), copied(inside)]
        assert all(is_fused(loss(x, t)) for loss in losses)
    losses += [copied(before), copied(inside)]
    assert not any(is_fused(loss(x, t)) for loss in losses)


@pytest.mark.parametrize("name", NAMES)
def test_looks_like_torchs_function(name: str) -> None:
    function = FUNCTIONS[name]

    def looks() -> tuple[Any, ...]:
        return (
            inspect.signature(function),
            inspect.getsource(function),
            pydoc.render_doc(function),
            *(function.__doc__, function.__module__, function.__name__, function.__qualname__),
            resolve_name(function),
        )

    before = looks()
    with fused_sce.patch_torch():
        assert getattr(torch_functional, name) is function
        assert looks() == before
        assert function in get_testing_overrides()
        traced = torch.fx.symbolic_trace(lambda x, t: function(x, t))
        assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [function]
    assert not vars(function)


def test_as_a_call() -> None:
    context = fused_sce.patch_torch()
    assert is_patched()
    assert fused_sce.patch_torch() is context  # as when a cell of a notebook is run again
    assert is_patched()
    fused_sce.unpatch_torch()
    assert not is_patched()
    with pytest.raises(RuntimeError, match="torch is not patched"):
        fused_sce.unpatch_torch()


def test_entering_again() -> None:
    context = fused_sce.patch_torch()
    for _ in range(2):
        with context:
            assert is_patched()
        assert not is_patched()


def test_a_block_leaves_the_state_that_it_found() -> None:
    fused_sce.patch_torch()
    for _ in range(2):
        with fused_sce.patch_torch():
            assert is_patched()
        assert is_patched()
    fused_sce.unpatch_torch()
    assert not is_patched()
    with fused_sce.patch_torch():
        pass
    assert not is_patched()


def test_only_the_end_of_the_outermost_block_undoes_it() -> None:
    with fused_sce.patch_torch() as _, fused_sce.patch_torch():
        with fused_sce.patch_torch():
            pass
        assert is_patched()
    assert not is_patched()


def test_unpatching_within_a_block() -> None:
    with fused_sce.patch_torch():
        fused_sce.unpatch_torch()
        assert not is_patched()
        with fused_sce.patch_torch():
            assert is_patched()
    assert not is_patched()


def test_the_other_thread_sees_it_too() -> None:
    seen = []
    with fused_sce.patch_torch():
        thread = threading.Thread(target=lambda: seen.append(is_patched()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_a_block_of_another_thread_keeps_it() -> None:
    entered, leave = threading.Event(), threading.Event()

    def block() -> None:
        with fused_sce.patch_torch():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=block)
    with fused_sce.patch_torch():
        thread.start()
        assert entered.wait(60)
    assert is_patched()
    leave.set()
    thread.join()
    assert not is_patched()


def theirs(*args: Any, **kwargs: Any) -> Tensor:
    """Somebody else's loss."""
    return torch.ones((), requires_grad=True).exp()


def set_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_functional, "multilabel_soft_margin_loss", theirs)


def exchange_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_functional.multilabel_soft_margin_loss, "__code__", theirs.__code__)


def unpatch(monkeypatch: pytest.MonkeyPatch) -> None:
    fused_sce.unpatch_torch()


def fail_after(act: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    act(monkeypatch)
    raise KeyError("the user's")


@pytest.mark.parametrize("act", [lambda monkeypatch: None, set_theirs, exchange_theirs, unpatch])
def test_the_users_exception_stays(act: Callable[[Any], None]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        with pytest.raises(KeyError) as raised, fused_sce.patch_torch():
            fail_after(act, monkeypatch)
        assert raised.value.__context__ is None
    if act is exchange_theirs:  # it could not be undone
        fused_sce.unpatch_torch()
    assert not is_patched()


@pytest.mark.parametrize("before", [True, False])
def test_somebody_elses_function_stays_in_its_place(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if before:
        set_theirs(monkeypatch)
    with fused_sce.patch_torch():
        if not before:
            set_theirs(monkeypatch)
        assert torch_functional.multilabel_soft_margin_loss is theirs
        assert is_patched()  # torch's functions are, which theirs may call
    assert torch_functional.multilabel_soft_margin_loss is theirs
    assert not is_patched()


def test_somebody_elses_code_is_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    message = rf"multilabel_soft_margin_loss was exchanged again .*{__name__}.*: undo that first"
    context = fused_sce.patch_torch()
    with monkeypatch.context() as exchanged:
        exchange_theirs(exchanged)
        with pytest.raises(RuntimeError, match=message):
            fused_sce.unpatch_torch()
        with pytest.raises(RuntimeError, match=message), context:
            pass
        assert torch_functional.multilabel_soft_margin_loss.__code__ is theirs.__code__
        assert is_fused(torch_functional.binary_cross_entropy_with_logits(*sample()))  # nothing half undone
    assert is_patched()
    fused_sce.unpatch_torch()


def test_another_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def future(input: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return theirs()

    monkeypatch.setattr(torch_functional.multilabel_soft_margin_loss, "__code__", future.__code__)
    with pytest.raises(RuntimeError, match="multilabel_soft_margin_loss is not the function that fused_sce knows"):
        fused_sce.patch_torch()
    assert not is_fused(torch_functional.binary_cross_entropy_with_logits(*sample()))


def test_what_was_replaced_before_the_import_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def replacement(input: Tensor, target: Tensor) -> Tensor:
        return theirs()

    code = replacement.__code__
    monkeypatch.setattr("fused_sce._patch._FUSED", {replacement: code})
    with pytest.raises(RuntimeError, match="or somebody replaced it before fused_sce was imported"):
        fused_sce.patch_torch()
    assert replacement.__code__ is code


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_by_place_and_by_name(name: str) -> None:
    function = FUNCTIONS[name]
    weight, pos_weight = torch.rand(5), torch.rand(5)
    x, t = sample()
    options = {"weight": weight, "size_average": None, "reduce": None, "reduction": "sum"}
    if "pos_weight" in inspect.signature(function).parameters:
        options["pos_weight"] = pos_weight
    expected = function(x, t, **options)
    with fused_sce.patch_torch():
        torch.testing.assert_close(function(x, t, *options.values()), expected)
        torch.testing.assert_close(function(**options, target=t, input=x), expected)
        with pytest.raises(ValueError, match="must be the same as input size"):
            function(x, t[:3])
        with pytest.raises(TypeError, match=rf"^{name}\(\) missing 1 required positional argument: 'target'$"):
            function(x)


class Subclass(Tensor):
    """Any subclass that does not say otherwise: results are of it."""


class Mode(TorchFunctionMode):
    """Keeps the calls that it is asked about."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((function, types, args, kwargs))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", ["input", "weight", "pos_weight"])
def test_overrides_are_asked_as_torch_asks_them(name: str, factor: str) -> None:
    x, t = sample()
    arguments: dict[str, Any] = {"input": x, "target": t, "weight": torch.rand(5), "pos_weight": torch.rand(5)}
    arguments = {name: arguments[name] for name in arguments.keys() & inspect.signature(FUNCTIONS[name]).parameters}
    if factor not in arguments:
        pytest.skip(f"{name} has no {factor}")
    arguments[factor] = arguments[factor].as_subclass(Subclass)

    def asked(context: AbstractContextManager[None]) -> tuple[Any, Any]:
        with context, Mode() as mode:
            loss = FUNCTIONS[name](**arguments)
        return type(loss), mode.calls[0]

    assert asked(fused_sce.patch_torch()) == asked(nullcontext())


def test_subclasses_are_asked_by_compiled_code() -> None:
    torch._dynamo.reset()
    x, t = sample()
    compiled = torch.compile(torch_functional.binary_cross_entropy_with_logits, backend="eager", fullgraph=True)
    with fused_sce.patch_torch():
        patched = torch.compile(torch_functional.binary_cross_entropy_with_logits, backend="eager", fullgraph=True)
        for function in (compiled, patched):
            loss = function(x.as_subclass(Subclass), t)  # type: ignore[no-untyped-call]
            assert type(loss) is Subclass


def by_name(input: Tensor, target: Tensor) -> Tensor:
    return imported_before(input, target)


KEPT: dict[str, Any] = {
    "the function itself": imported_before,
    "by name": by_name,
    "in a module": nn.BCEWithLogitsLoss(),
    "in another module": nn.MultiLabelSoftMarginLoss(),
    "an attribute": Keeper(),
    "in a partial": functools.partial(imported_before, reduction="sum"),
}


@pytest.mark.parametrize("first", ["torch's", "fused"])
@pytest.mark.parametrize("kept", list(KEPT))
def test_compiled_code_follows(kept: str, first: str) -> None:
    if kept == "an attribute" and torch.__version__ < "2.13":
        pytest.skip("torch 2.11 does not look at the code of functions that are attributes of modules")
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    x, t = sample()
    compiled = torch.compile(KEPT[kept], backend=backend, fullgraph=True)
    expected = KEPT[kept](x, t)
    if first == "torch's":
        torch.testing.assert_close(compiled(x, t), expected)
    for _ in range(2):
        with fused_sce.patch_torch():
            torch.testing.assert_close(compiled(x, t), expected)
        torch.testing.assert_close(compiled(x, t), expected)
    # The graph itself says which: graphs are also kept on disk, for processes that are patched and that are not.
    assert ["fused_sce" in code for code in graphs] == ([False, True] if first == "torch's" else [True, False])


def test_the_cache_of_compiled_graphs_tells_them_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    x, t = sample()

    def is_compiled_fused() -> bool:
        torch._dynamo.reset()
        compiled = torch.compile(imported_before, fullgraph=True)
        compiled(x, t).backward()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            compiled(x, t).backward()
        return any(event.key.startswith("fused_sce::") for event in seen.key_averages())

    assert not is_compiled_fused()
    with fused_sce.patch_torch():
        assert is_compiled_fused()
    assert not is_compiled_fused()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_goes_on_compiling_torchs() -> None:
    x, t = sample()
    with fused_sce.patch_torch():
        for module in (nn.BCEWithLogitsLoss(), nn.MultiLabelSoftMarginLoss()):
            scripted = torch.jit.script(module)(x, t)
            assert not is_fused(scripted)
            torch.testing.assert_close(scripted, module(x, t))


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
