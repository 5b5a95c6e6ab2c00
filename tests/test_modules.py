"""The modules are torch's in everything but the arithmetic: what they are made from, keep, print, save and become."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as torch_functional

import fused_sce
from fused_sce import functional as F

PAIRS = {
    "BCEWithLogitsLoss": (fused_sce.BCEWithLogitsLoss, nn.BCEWithLogitsLoss),
    "MultiLabelSoftMarginLoss": (fused_sce.MultiLabelSoftMarginLoss, nn.MultiLabelSoftMarginLoss),
}
CLASSES = 5


def constructor_arguments(name: str) -> list[dict[str, Any]]:
    """Every combination of what a constructor takes; weights of every shape that broadcasts."""
    weights = [None, torch.rand(CLASSES), torch.rand(4, 1), torch.rand(4, CLASSES), torch.tensor(0.5)]
    pos_weights = [None, torch.rand(CLASSES) + 1] if name == "BCEWithLogitsLoss" else [None]
    combinations = itertools.product(weights, pos_weights, ["mean", "sum", "none"])
    return [
        {
            key: value
            for key, value in zip(("weight", "pos_weight", "reduction"), each, strict=True)
            if value is not None
        }
        for each in combinations
    ]


def sample(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(4, CLASSES, dtype=dtype, requires_grad=True), torch.rand(4, CLASSES, dtype=dtype)


def assert_computes_the_same(ours: nn.Module, theirs: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    x, t = sample(dtype)
    mine, other = ours(x, t), theirs(x, t)
    assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
    torch.testing.assert_close(mine, other)
    torch.testing.assert_close(torch.autograd.grad(mine.sum(), x), torch.autograd.grad(other.sum(), x))


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for key, value in mine.items():
        assert (value.dtype, value.device) == (theirs[key].dtype, theirs[key].device)
        assert value.is_meta or torch.equal(value, theirs[key])


@pytest.mark.parametrize("name", PAIRS)
def test_same_signature(name: str) -> None:
    ours, theirs = PAIRS[name]
    assert issubclass(ours, theirs)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    assert getattr(ours, "__constants__", None) == getattr(theirs, "__constants__", None)


@pytest.mark.parametrize("name", PAIRS)
def test_every_combination_of_constructor_arguments(name: str) -> None:
    our_class, their_class = PAIRS[name]
    for arguments in constructor_arguments(name):
        ours, theirs = our_class(**arguments), their_class(**arguments)
        assert repr(ours) == repr(theirs)
        assert str(nn.Sequential(ours)) == str(nn.Sequential(theirs))
        assert_same_state(ours, theirs)
        assert list(ours.parameters()) == []
        assert [key for key, _ in ours.named_buffers()] == [key for key, _ in theirs.named_buffers()]
        assert_computes_the_same(ours, theirs)

        in_order = [arguments.get(key) for key in inspect.signature(our_class).parameters if key != "reduction"]
        in_order.insert(3, arguments["reduction"])
        assert_computes_the_same(our_class(*in_order), theirs)


@pytest.mark.parametrize("name", PAIRS)
def test_copies_and_files(name: str) -> None:
    our_class, their_class = PAIRS[name]
    for arguments in constructor_arguments(name):
        ours, theirs = our_class(**arguments), their_class(**arguments)
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twins = (
            copy.copy(ours),
            copy.deepcopy(ours),
            pickle.loads(pickle.dumps(ours)),
            torch.load(file, weights_only=False),
        )
        for twin in twins:
            assert type(twin) is our_class
            assert repr(twin) == repr(ours)
            assert_same_state(twin, ours)
            assert_computes_the_same(twin, theirs)
        if arguments.get("weight") is not None:
            twins[1].weight.zero_()
            assert ours.weight.count_nonzero() > 0


@pytest.mark.parametrize("name", PAIRS)
def test_state_is_exchanged_with_torchs(name: str) -> None:
    our_class, their_class = PAIRS[name]
    for arguments in constructor_arguments(name):
        ours, theirs = our_class(**arguments), their_class(**arguments)
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        zeroed = {
            key: torch.zeros_like(value) if isinstance(value, Tensor) else value for key, value in arguments.items()
        }
        fresh = their_class(**zeroed)
        fresh.load_state_dict(torch.load(file))
        assert_same_state(fresh, ours)
        fresh = our_class(**zeroed)
        fresh.load_state_dict(theirs.state_dict())
        assert_same_state(fresh, theirs)
    with pytest.raises(RuntimeError, match="Missing key"):
        our_class(weight=torch.rand(CLASSES)).load_state_dict(their_class().state_dict())


@pytest.mark.parametrize("name", PAIRS)
def test_moved_and_converted(name: str, device: str) -> None:
    our_class, their_class = PAIRS[name]
    conversions: dict[str, Any] = {
        "to float64": lambda module: module.to(torch.float64),
        "double": lambda module: module.double(),
        "half": lambda module: module.half(),
        "bfloat16": lambda module: module.bfloat16(),
        "to device": lambda module: module.to(device),
        "to meta": lambda module: module.to("meta"),
        "to_empty": lambda module: module.to_empty(device="meta"),
        "share_memory": lambda module: module.share_memory(),
        "requires_grad_": lambda module: module.requires_grad_(),
        "eval": lambda module: module.eval(),
        "apply": lambda module: module.apply(lambda each: None),
    }
    for arguments in constructor_arguments(name):
        for convert in conversions.values():
            ours, theirs = our_class(**arguments), their_class(**arguments)
            assert convert(ours) is ours
            convert(theirs)
            assert_same_state(ours, theirs)
            assert ours.training == theirs.training
        ours, theirs = our_class(**arguments).double(), their_class(**arguments).double()
        assert_computes_the_same(ours, theirs, torch.float64)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("weight", [[1.0, 2.0], 3.0, "weights"])
def test_a_weight_that_is_no_tensor(name: str, weight: Any) -> None:
    for module in PAIRS[name]:
        with pytest.raises(TypeError, match=r"cannot assign '(list|float|str)' object to buffer 'weight'"):
            module(weight=weight)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("reduction", ["average", ""])
def test_an_unknown_reduction_is_told_at_the_call(name: str, reduction: str) -> None:
    for module in PAIRS[name]:
        loss = module(reduction=reduction)
        with pytest.raises(ValueError, match=r"is not (a )?valid"):
            loss(*sample())


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_deprecated_reduction_arguments(size_average: bool | None, reduce: bool | None) -> None:
    for our_class, their_class in PAIRS.values():
        ours = our_class(size_average=size_average, reduce=reduce)
        theirs = their_class(size_average=size_average, reduce=reduce)
        assert ours.reduction == theirs.reduction
        assert_computes_the_same(ours, theirs)
    x, t = sample()
    for name in ("binary_cross_entropy_with_logits", "multilabel_soft_margin_loss"):
        torch.testing.assert_close(
            getattr(F, name)(x, t, None, size_average, reduce),
            getattr(torch_functional, name)(x, t, None, size_average, reduce),
        )


def test_the_deprecated_arguments_warn_as_torchs() -> None:
    for pair in PAIRS.values():
        for module in pair:
            with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
                module(size_average=False)


def test_samples_of_torchs_module_database() -> None:
    pytest.importorskip("expecttest", reason="torch's module database needs it")
    from torch.testing._internal.common_modules import module_db

    infos = {info.module_cls: info for info in module_db if info.module_cls in [theirs for _, theirs in PAIRS.values()]}
    assert len(infos) == 2
    for our_class, their_class in PAIRS.values():
        info = infos[their_class]
        for dtype in info.dtypes:
            inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
            assert len(inputs) >= 5
            for each in inputs:
                made, given = each.constructor_input, each.forward_input
                ours, theirs = our_class(*made.args, **made.kwargs), their_class(*made.args, **made.kwargs)
                mine, other = ours(*given.args, **given.kwargs), theirs(*given.args, **given.kwargs)
                assert mine.dtype == other.dtype
                torch.testing.assert_close(mine, other)
                torch.testing.assert_close(mine, each.reference_fn(ours, *given.args, **given.kwargs))
                x = given.args[0]
                torch.testing.assert_close(torch.autograd.grad(mine.sum(), x), torch.autograd.grad(other.sum(), x))


def test_sigmoid_cross_entropy_loss() -> None:
    weight = torch.rand(CLASSES)
    loss = fused_sce.SigmoidCrossEntropyLoss(weight=weight, pos_weight=weight, reduction="sum_classes")
    assert list(loss.state_dict()) == ["weight", "pos_weight"]
    assert repr(loss) == "SigmoidCrossEntropyLoss(reduction='sum_classes')"
    x, t = sample()
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(x, t), loss(x, t))
    with pytest.raises(ValueError, match="average is not a valid value for reduction"):
        fused_sce.SigmoidCrossEntropyLoss(reduction="average")


@pytest.mark.parametrize("loss", [fused_sce.BCEWithLogitsLoss, fused_sce.SigmoidCrossEntropyLoss])
def test_learnable_weights_stay_parameters(loss: Any) -> None:
    model = nn.Module()
    model.pos_weight = nn.Parameter(torch.ones(5))
    model.criterion = loss(pos_weight=model.pos_weight, weight=torch.rand(5))
    model.double()  # as .cuda()
    assert list(model.criterion.state_dict()) == ["pos_weight", "weight"]
    assert [id(each) for each in model.parameters()] == [id(model.criterion.pos_weight)]
    x, t = torch.randn(7, 5).double(), torch.rand(7, 5).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        value = model.criterion(x, t)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[0] > values[1] > values[2]


def test_a_weight_that_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r"pos_weight must be a tensor, got float: pass torch.tensor\(pos_weight\)"):
        fused_sce.SigmoidCrossEntropyLoss(pos_weight=2.0)  # type: ignore[arg-type]
