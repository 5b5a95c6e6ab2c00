"""patch_torch(): other people's code through the fused losses, unmodified, and back again."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import io
import operator
import pickle
import pydoc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as torch_functional
from torch.nn.functional import binary_cross_entropy_with_logits as imported_before
from torch.overrides import TorchFunctionMode, get_testing_overrides, resolve_name
from torch.profiler import ProfilerActivity, profile

import fused_sce
from fused_sce import _patch

NAMES = ("binary_cross_entropy_with_logits", "multilabel_soft_margin_loss")
FUNCTIONS: dict[str, Any] = {name: getattr(torch_functional, name) for name in NAMES}
FOCAL, ASYMMETRIC = "sigmoid_focal_loss", "AsymmetricLossMultiLabel.forward"
# The functions of other packages, of those that are installed.
OTHERS: dict[str, Any] = {}
for _name, _module in ((FOCAL, "torchvision.ops.focal_loss"), (ASYMMETRIC, "timm.loss.asymmetric_loss")):
    with suppress(Exception):
        OTHERS[_name] = operator.attrgetter(_name)(importlib.import_module(_module))
ALL = FUNCTIONS | OTHERS
CODES = {name: function.__code__ for name, function in ALL.items()}


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    left = [name for name, function in ALL.items() if function.__code__ is not CODES[name] or vars(function)]
    with suppress(RuntimeError):
        fused_sce.unpatch_torch()
    for name, function in ALL.items():
        function.__code__ = CODES[name]
    assert not left


def focal_loss() -> Any:
    pytest.importorskip("torchvision")
    return OTHERS[FOCAL]


def asymmetric_loss(**options: Any) -> Any:
    return pytest.importorskip("timm.loss").AsymmetricLossMultiLabel(**options)


def sample() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 5, requires_grad=True), torch.rand(6, 5)


def is_fused(loss: Tensor) -> bool:
    """Whether the fused op gives a loss, or its sum that timm divides."""
    assert loss.grad_fn is not None
    nodes = [loss.grad_fn, *(node for node, _ in loss.grad_fn.next_functions if node is not None)]
    return any("SigmoidCrossEntropy" in node.name() for node in nodes)


def is_patched() -> bool:
    losses = list(FUNCTIONS.values())
    if FOCAL in OTHERS:
        losses.append(OTHERS[FOCAL])
    if ASYMMETRIC in OTHERS:
        losses.append(asymmetric_loss())
    fused = {is_fused(loss(*sample())) for loss in losses}
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


@pytest.mark.parametrize("name", [FOCAL, ASYMMETRIC])
def test_another_packages_other_signature_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in OTHERS:
        pytest.skip("not installed")

    def future(input: Tensor, target: Tensor, more: float = 0.0) -> Tensor:
        return theirs()

    monkeypatch.setattr(OTHERS[name], "__code__", future.__code__)
    with fused_sce.patch_torch():
        assert OTHERS[name].__code__ is future.__code__
        assert not vars(OTHERS[name])
        assert is_fused(imported_before(*sample()))


def test_a_timm_with_other_options_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = asymmetric_loss()

    def older(self: Any, gamma_neg: float = 4, gamma_pos: float = 1, clip: float = 0.05, eps: float = 1e-8) -> None:
        raise AssertionError

    monkeypatch.setattr(type(before), "__init__", older)
    with fused_sce.patch_torch():
        assert not is_fused(before(*sample()))
        assert is_fused(imported_before(*sample()))


class Broken:
    """A finder of packages that fail as torchvision does beside another torch."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in ("torchvision", "timm"):
            raise RuntimeError("operator torchvision::nms does not exist")


@pytest.mark.parametrize("how", ["broken", "not installed", "without the function"])
def test_packages_that_cannot_be_imported(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("torchvision.ops.focal_loss", "timm.loss.asymmetric_loss")
    _patch._find.cache_clear()
    monkeypatch.setattr(
        "fused_sce._patch._FUSED", {function: _patch._FUSED[function] for function in FUNCTIONS.values()}
    )
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "timm")]:
        monkeypatch.delitem(sys.modules, name)
    if how == "broken":
        monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for name in names:
        if how == "not installed":
            monkeypatch.setitem(sys.modules, name.partition(".")[0], None)
        if how == "without the function":
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
            for parent in (name.partition(".")[0], name.rpartition(".")[0]):
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    try:
        with fused_sce.patch_torch():
            assert is_fused(imported_before(*sample()))
            assert all(function.__code__ is CODES[name] for name, function in OTHERS.items())
    finally:
        _patch._find.cache_clear()


@pytest.mark.parametrize("name", [FOCAL, ASYMMETRIC])
def test_the_code_of_other_packages_comes_and_goes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in OTHERS:
        pytest.skip("not installed")
    function = OTHERS[name]
    looks = (inspect.signature(function), inspect.getsource(function), function.__qualname__, function.__module__)
    with fused_sce.patch_torch():
        assert function.__code__ is not CODES[name]
        assert looks == (
            *(inspect.signature(function), inspect.getsource(function), function.__qualname__, function.__module__),
        )
        assert pickle.loads(pickle.dumps(function)) is function
    assert function.__code__ is CODES[name]
    assert not vars(function)
    fused_sce.patch_torch()
    with monkeypatch.context() as exchanged:
        exchanged.setattr(function, "__code__", theirs.__code__)
        with pytest.raises(RuntimeError, match=rf"{name} was exchanged again .*{__name__}.*: undo that first"):
            fused_sce.unpatch_torch()
    assert is_patched()
    fused_sce.unpatch_torch()
    assert not is_patched()


def test_a_thread_that_outlives_the_patch() -> None:
    function = focal_loss()
    x, t = sample()
    expected = function(x, t, gamma=-1.0)
    with fused_sce.patch_torch():
        code = function.__code__
    late = FunctionType(code, function.__globals__)
    torch.testing.assert_close(late(x, t, 0.25, -1.0, "none"), expected)


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


def with_gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The loss, and the gradients of its mean square, which weighs elements differently."""
    return [loss, *torch.autograd.grad(loss.square().mean(), tensors)]


def logits_and_target(dtype: torch.dtype, target_dtype: torch.dtype, soft: bool) -> tuple[Tensor, Tensor]:
    """Logits for which the packages' formulas are right, so not far out."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(16, 5, generator=generator).mul(1.5).to(dtype).requires_grad_()
    t = torch.rand(16, 5, generator=generator)
    return x, (t if soft else t.lt(0.4)).to(target_dtype)


def assert_same(patched: list[Tensor], unpatched: list[Tensor], right: list[Tensor]) -> None:
    """The dtypes are those of the unpatched results; the values are right, as the package gets them in float64."""
    for own, other, value in zip(patched, unpatched, right, strict=True):
        assert own.dtype == other.dtype
        assert own.shape == other.shape
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(own.dtype, 2e-2)
        # Relative to the largest: the gradient by a soft target is a difference, and may be next to 0.
        difference = (own.double() - value.double()).abs().max().item()
        assert difference <= tolerance * value.abs().max().item()


DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2), (-1, 2.0), (0.6, 1.5), (1, 0)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("dtype", "target_dtype"), DTYPES)
def test_torchvisions_focal_loss_becomes_fused(
    reduction: str, alpha: float, gamma: float, soft: bool, dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    function = focal_loss()
    x, t = logits_and_target(dtype, target_dtype, soft)
    options = {"alpha": alpha, "gamma": gamma, "reduction": reduction}
    unpatched = function(x, t, **options)
    assert not is_fused(unpatched)
    exact = x.detach().double().requires_grad_()
    right = with_gradients(function(exact, t.double(), **options), exact)
    with fused_sce.patch_torch():
        patched = function(x, t, **options)
        assert is_fused(patched)
        by_place = function(x, t, alpha, gamma, reduction)
    torch.testing.assert_close(by_place, patched, rtol=0, atol=0)
    assert_same(with_gradients(patched, x), with_gradients(unpatched, x), right)
    assert not is_fused(function(x, t, **options))


def test_torchvisions_name_imported_before_and_inside() -> None:
    function = focal_loss()
    from torchvision.ops import sigmoid_focal_loss as before

    with fused_sce.patch_torch():
        from torchvision.ops import sigmoid_focal_loss as inside

        assert before is inside is function
        assert is_fused(before(*sample()))
    assert not is_fused(before(*sample()))


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": -1.0},
        {"gamma": torch.tensor(2.0)},
        {"alpha": torch.tensor(0.3)},
        {"alpha": -1.0, "gamma": -0.5, "reduction": "sum"},
    ],
    ids=str,
)
def test_what_the_fused_focal_loss_does_not_take_stays_torchvisions(options: dict[str, Any]) -> None:
    function = focal_loss()
    x, t = logits_and_target(torch.float64, torch.float64, True)
    unpatched = with_gradients(function(x, t, **options), x)
    with fused_sce.patch_torch():
        patched = with_gradients(function(x, t, **options), x)
    torch.testing.assert_close(patched, unpatched, rtol=1e-12, atol=1e-14)


def test_torchvisions_errors_stay() -> None:
    function = focal_loss()
    x, t = sample()
    bad: list[tuple[type[Exception], dict[str, Any]]] = [
        (ValueError, {"alpha": 2.0}),
        (ValueError, {"alpha": -0.5}),
        (ValueError, {"alpha": float("nan")}),
        (ValueError, {"reduction": "sum_classes"}),
        (TypeError, {"alpha": None}),
        (ValueError, {"targets": t[:1]}),
        (ValueError, {"targets": t[0]}),
        (TypeError, {"inputs": [0.0]}),
    ]

    def message(kind: type[Exception], arguments: dict[str, Any]) -> str:
        with pytest.raises(kind) as raised:
            function(**({"inputs": x, "targets": t} | arguments))
        return str(raised.value)

    unpatched = [message(*case) for case in bad]
    with fused_sce.patch_torch():
        patched = [message(*case) for case in bad]
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'targets'"):
            function(x)
    # Fused binary_cross_entropy_with_logits, which torchvision's code calls, may add a hint.
    assert all(own.startswith(other) for own, other in zip(patched, unpatched, strict=True))


def test_torchvisions_focal_loss_traced_by_fx() -> None:
    function = focal_loss()
    x, t = sample()
    with fused_sce.patch_torch():
        traced = torch.fx.symbolic_trace(lambda x, t: function(x, t))
    torch.testing.assert_close(traced(x, t), function(x, t))


@pytest.mark.parametrize("options", [{}, {"gamma": -1.0}], ids=["fused", "torchvision's"])
@pytest.mark.parametrize("first", ["torchvision's", "fused"])
def test_compiled_torchvision_follows(first: str, options: dict[str, Any]) -> None:
    function = focal_loss()
    torch._dynamo.reset()
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph.code)
        return graph.forward

    def train(x: Tensor, t: Tensor) -> Tensor:
        loss: Tensor = function(x, t, reduction="mean", **options)
        return loss

    x, t = sample()
    expected = with_gradients(train(x, t), x)
    compiled = torch.compile(train, backend=backend, fullgraph=True)
    if first == "torchvision's":
        torch.testing.assert_close(with_gradients(compiled(x, t), x), expected)
    for _ in range(2):
        with fused_sce.patch_torch():
            torch.testing.assert_close(with_gradients(compiled(x, t), x), expected)
        torch.testing.assert_close(with_gradients(compiled(x, t), x), expected)
    fused = ["fused_sce" in code for code in graphs]
    assert fused == ([True, False] if first == "fused" else [False, True])
    assert all(
        ("pow" in code or "**" in code) == (not own or bool(options)) for own, code in zip(fused, graphs, strict=True)
    )


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip": None},
        {"clip": 0},
        {"smoothing": 0.1},
        {"gamma_neg": 2.5, "gamma_pos": 0},
        {"gamma_neg": 0, "gamma_pos": 0, "clip": 0.2},
        {"weight": torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0]), "pos_weight": torch.tensor([2.0, 1.0, 0.3, 4.0, 1.5])},
        {"pos_weight": 3, "smoothing": 0.2},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
@pytest.mark.parametrize(
    ("dtype", "target_dtype", "soft"),
    [
        (torch.float32, torch.float32, False),
        (torch.float32, torch.float64, True),
        (torch.float64, torch.int64, False),
        (torch.bfloat16, torch.bool, False),
        (torch.float16, torch.float16, True),
    ],
)
def test_timms_asymmetric_loss_becomes_fused(
    reduction: str, options: dict[str, Any], dtype: torch.dtype, target_dtype: torch.dtype, soft: bool
) -> None:
    module = asymmetric_loss(reduction=reduction, **options)
    x, t = logits_and_target(dtype, target_dtype, soft)
    unpatched = module(x, t)
    assert not is_fused(unpatched)
    with fused_sce.patch_torch():
        patched = module(x, t)
        assert is_fused(patched)
        assert is_fused(pickled(module)(x, t))
    assert patched.dtype == unpatched.dtype == torch.float32
    assert patched.shape == unpatched.shape
    for own, other in zip(with_gradients(patched, x), with_gradients(unpatched, x), strict=True):
        assert own.dtype == other.dtype
        # timm computes in float32 whatever it gets, and 1 - sigmoid(x) loses digits there.
        tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 1e-2
        torch.testing.assert_close(own, other, rtol=tolerance, atol=1e-6)
    assert not is_fused(module(x, t))


@pytest.mark.parametrize("clip", [0.05, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_timms_asymmetric_loss_is_the_one_of_its_formula(clip: float | None, smoothing: float) -> None:
    """Against timm's own lines in float64, from which its casts to float32 are left out."""
    module = asymmetric_loss(clip=clip, smoothing=smoothing, weight=torch.rand(5), pos_weight=torch.rand(5))
    x, t = logits_and_target(torch.float32, torch.float32, True)
    exact = x.detach().double().requires_grad_()

    class Double(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[0] if function is Tensor.float else function(*args, **(kwargs or {}))

    with Double():
        right = with_gradients(module.double()(exact, t.double()), exact)
    module.float()
    with fused_sce.patch_torch():
        patched = module(x, t)
    assert is_fused(patched)
    for own, value in zip(with_gradients(patched, x), right, strict=True):
        torch.testing.assert_close(own.double(), value, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"disable_torch_grad_focal_loss": True},
        {"eps": 0.1},
        {"clip": -1.0},
        {"gamma_neg": -1, "gamma_pos": -1},
        {"weight": torch.rand(3, 16, 5)},
        {"weight": torch.rand(5).double()},
        {"pos_weight": torch.rand(5).double()},
    ],
    ids=lambda options: ",".join(options),
)
def test_what_the_fused_asymmetric_loss_does_not_take_stays_timms(options: dict[str, Any]) -> None:
    module = asymmetric_loss(**options)
    x, t = logits_and_target(torch.float32, torch.float32, True)
    unpatched = with_gradients(module(x, t), x)
    with fused_sce.patch_torch():
        assert not is_fused(module(x, t))
        patched = with_gradients(module(x, t), x)
    torch.testing.assert_close(patched, unpatched, rtol=0, atol=0)


def test_timms_targets_of_another_shape() -> None:
    module = asymmetric_loss()
    x, t = sample()
    unpatched = with_gradients(module(x, t[0]), x)
    with fused_sce.patch_torch():
        torch.testing.assert_close(with_gradients(module(x, t[0]), x), unpatched, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="must match the size"):
            module(x, t[:, :3])


@pytest.mark.parametrize("first", ["timm's", "fused"])
def test_compiled_timm_follows(first: str) -> None:
    torch._dynamo.reset()
    module = asymmetric_loss()
    x, t = sample()
    expected = with_gradients(module(x, t), x)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    if first == "timm's":
        torch.testing.assert_close(with_gradients(compiled(x, t), x), expected)
    for _ in range(2):
        with fused_sce.patch_torch():
            torch.testing.assert_close(with_gradients(compiled(x, t), x), expected)
        torch.testing.assert_close(with_gradients(compiled(x, t), x), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"smoothing": 0.0},
        {"smoothing": 0.2, "target_threshold": 0.3},
        {"smooth_dense": True},
        {"sum_classes": True, "pos_weight": 2.0},
        {"weight": torch.rand(5), "reduction": "sum"},
    ],
    ids=lambda options: ",".join(options) or "defaults",
)
@pytest.mark.parametrize("targets", ["classes", "dense"])
def test_timms_binary_cross_entropy_runs_fused(options: dict[str, Any], targets: str) -> None:
    module = pytest.importorskip("timm.loss").BinaryCrossEntropy(**options)
    x, t = logits_and_target(torch.float64, torch.float64, True)
    t = t.argmax(-1) if targets == "classes" else t

    def ops() -> tuple[set[str], list[Tensor]]:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            loss = module(x, t)
        return {event.key for event in seen.key_averages()}, with_gradients(loss, x)

    names, unpatched = ops()
    assert "aten::binary_cross_entropy_with_logits" in names
    with fused_sce.patch_torch():
        names, patched = ops()
    assert "aten::binary_cross_entropy_with_logits" not in names
    assert any(name.startswith("fused_sce::") for name in names)
    torch.testing.assert_close(patched, unpatched, rtol=1e-12, atol=1e-14)


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
    steps = 4
    train = importlib.import_module(example).train
    plain, fused = importlib.import_module("patched_training").run(train, None, ["--steps", str(steps)])
    assert len(plain.losses) == len(fused.losses) == steps
    assert plain.losses == pytest.approx(fused.losses, abs=1e-6)
    assert fused.losses[-1] < fused.losses[0]
    # the profiler: torch's loss in the one, ours in its place in the other
    assert plain.calls[torchs_op] >= steps
    assert not any("fused_sce" in name for name in plain.calls)
    assert sum(count for name, count in fused.calls.items() if "sigmoid_cross_entropy" in name) >= steps
    assert not any(name.startswith("aten::") for name in fused.calls)
