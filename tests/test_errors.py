"""What bad input gets: an error that names the argument and what came, the same on every route."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fused_sce
from fused_sce import functional as F

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "bce": F.binary_cross_entropy_with_logits,
    "soft margin": F.multilabel_soft_margin_loss,
    "sigmoid cross-entropy": F.sigmoid_cross_entropy,
}


@pytest.fixture(params=list(FUNCTIONS))
def function(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return FUNCTIONS[request.param]


@pytest.fixture(params=["eager", "compiled", "transformed"])
def route(request: pytest.FixtureRequest) -> Callable[..., Callable[..., Tensor]]:
    """How the loss is reached; each wraps a function of (input, target)."""
    if request.param == "compiled":
        return lambda call: torch.compile(call, backend="eager")
    if request.param == "transformed":
        return lambda call: lambda x, t: torch.func.vmap(call)(x[None], t[None])
    return lambda call: call


def test_shapes_that_differ(function: Callable[..., Tensor], route: Callable[..., Callable[..., Tensor]]) -> None:
    with pytest.raises(
        ValueError,
        match=r"Target size \(torch.Size\(\[3, 5\]\)\) must be the same as input size \(torch.Size\(\[3, 4\]\)\)",
    ):
        route(function)(torch.randn(3, 4), torch.rand(3, 5))


def test_broadcastable_shapes_differ_too(function: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="must be the same as input size"):
        function(torch.randn(3, 4), torch.rand(4))


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_class_indices_get_a_hint(function: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"5 class indices met 5 rows of 4 logits.*one_hot\(target, 4\)"):
        function(torch.randn(5, 4), torch.randint(0, 4, shape))


def test_missing_squeeze_gets_a_hint(function: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"Both have 5 elements.*squeeze\(-1\)"):
        function(torch.randn(5, 1), torch.rand(5))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_dtypes_of_logits(
    function: Callable[..., Tensor],
    dtype: torch.dtype,
    route: Callable[..., Callable[..., Tensor]],
) -> None:
    with pytest.raises(TypeError, match=f"input must have dtype float32, float64, bfloat16 or float16, got {dtype}"):
        route(function)(torch.ones(3, 4).to(dtype), torch.rand(3, 4))


def test_swapped_arguments_get_a_hint(function: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError, match="did input and target change places"):
        function(torch.ones(3, 4, dtype=torch.int64), torch.randn(3, 4))
    with pytest.raises(TypeError, match=r"float8_e4m3fn$"):  # no hint: logits may be so narrow
        function(torch.ones(3, 4).to(torch.float8_e4m3fn), torch.randn(3, 4))


@pytest.mark.parametrize("name", ["target", "weight"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16])
def test_dtypes_of_targets_and_weights(function: Callable[..., Tensor], name: str, dtype: torch.dtype) -> None:
    arguments = {"target": torch.rand(3, 4), "weight": torch.rand(4)}
    arguments[name] = arguments[name].to(dtype)
    with pytest.raises(TypeError, match=f"{name} must have dtype float32, .*, bool, uint8, .* or int64, got {dtype}"):
        function(torch.randn(3, 4), **arguments)


@pytest.mark.parametrize("name", ["input", "target", "weight"])
def test_no_tensor(function: Callable[..., Tensor], name: str) -> None:
    arguments: dict[str, object] = {
        "input": torch.randn(3, 4),
        "target": torch.rand(3, 4),
        "weight": torch.rand(4),
    }
    arguments[name] = [1.0, 0.0]
    with pytest.raises(TypeError, match=f"{name} must be a tensor.*, got list"):
        function(**arguments)


@pytest.mark.parametrize(
    ("value", "cure"),
    [
        (255, "target > 0 makes labels of a mask"),
        (-1, "ignore_value=-1 of SigmoidCrossEntropyLoss"),
        (-100, "ignore_value=-100 of SigmoidCrossEntropyLoss"),
        (2, 'target_format="class_index" of SigmoidCrossEntropyLoss'),
    ],
)
def test_a_wrong_label_names_the_option_of_the_loss_that_has_it(value: int, cure: str) -> None:
    with pytest.raises(ValueError, match=rf"target\[1\] is {value}, .*{cure}"):
        fused_sce.BCEWithLogitsLoss()(torch.zeros(3), torch.tensor([0, value, 1]))


@pytest.mark.parametrize("name", ["input", "target", "weight"])
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "_mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_layouts_that_are_not_dense(function: Callable[..., Tensor], name: str, layout: str) -> None:
    arguments = {"input": torch.randn(3, 4), "target": torch.rand(3, 4), "weight": torch.rand(3, 4)}
    if name == "target" and "target_format" in inspect.signature(function).parameters and layout != "_mkldnn":
        if layout == "sparse_coo":
            with pytest.raises(TypeError, match=r"a sparse one of layout CSR, got .*sparse_coo.*target.to_sparse_csr"):
                function(arguments["input"], arguments["target"].to_sparse())
        return  # tests/test_targets.py
    dense = arguments[name]
    arguments[name] = dense.to_mkldnn() if layout == "_mkldnn" else dense.to_sparse(layout=getattr(torch, layout))
    with pytest.raises(TypeError, match=rf"{name} must be a dense tensor, got layout .*{layout}.*{name}.to_dense\(\)"):
        function(**arguments)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors(function: Callable[..., Tensor], layout: torch.layout) -> None:
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=layout)
    with pytest.raises(TypeError, match=r"input must be a dense tensor, got a nested one: .*torch.cat\(input.unbind"):
        function(x, torch.rand(5, 4))
    assert function(torch.cat(x.unbind()), torch.rand(5, 4)).dim() == 0


@pytest.mark.parametrize("shape", [(5,), (3,), (2, 3, 4), (1, 3, 4), (4, 1)])
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_weights_that_do_not_broadcast(name: str, shape: tuple[int, ...]) -> None:
    message = rf"^{name} of shape \({', '.join(map(str, shape))},?\) does not broadcast to the logits' shape \(3, 4\)"
    with pytest.raises(RuntimeError, match=message):
        F.sigmoid_cross_entropy(torch.randn(3, 4), torch.rand(3, 4), **{name: torch.rand(shape)})
    if name == "weight":
        with pytest.raises(RuntimeError, match=message):
            F.multilabel_soft_margin_loss(torch.randn(3, 4), torch.rand(3, 4), torch.rand(shape))


@pytest.mark.parametrize(
    ("logits", "factor", "cure", "dim"),
    [
        ((2, 3, 4, 5), (3,), "view(-1, 1, 1)", 1),
        ((3, 4), (3,), "view(-1, 1)", 0),
        ((3, 4), (4, 1), "view(-1)", 1),
        ((3, 4), (1, 1, 3), "view(-1, 1)", 0),
    ],
)
@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_the_view_that_broadcasts_is_named(
    name: str,
    logits: tuple[int, ...],
    factor: tuple[int, ...],
    cure: str,
    dim: int,
    route: Callable[..., Callable[..., Tensor]],
) -> None:
    x, t, values = torch.randn(logits), torch.rand(logits), torch.rand(factor)
    message = f"to apply its {values.numel()} values along dimension {dim} pass {name}.{cure}"
    with pytest.raises(RuntimeError, match=f"{re.escape(message)}$"):
        route(lambda x, t: F.sigmoid_cross_entropy(x, t, **{name: values}))(x, t)
    cured = eval(f"values.{cure}")
    assert torch.equal(cured.expand(logits).movedim(dim, 0).flatten(1)[:, 0], values.flatten())


@pytest.mark.parametrize(
    ("logits", "factor"), [((3, 3, 4), (3,)), ((3, 4), (5,)), ((4, 5), (2, 2)), ((3, 4), (3, 4, 1))]
)
def test_no_view_is_named_where_none_or_many_fit(logits: tuple[int, ...], factor: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=rf"the logits' shape {re.escape(str(logits))}$"):
        F.sigmoid_cross_entropy(torch.randn(logits), torch.rand(logits), weight=torch.rand(factor))


def test_a_pos_weight_of_too_few_labels() -> None:
    with pytest.raises(RuntimeError, match=r"it usually has one value for each label, shape \(7,\)$"):
        F.sigmoid_cross_entropy(torch.randn(5, 7), torch.rand(5, 7), pos_weight=torch.rand(4))


@pytest.mark.parametrize("name", ["target", "weight"])
def test_tensors_on_different_devices(function: Callable[..., Tensor], name: str) -> None:
    arguments = {"target": torch.rand(3, 4), "weight": torch.rand(4)}
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(RuntimeError, match=f"input is on cpu and {name} is on meta"):
        function(torch.randn(3, 4), **arguments)


@pytest.mark.parametrize("reduction", ["average", "Mean", ""])
def test_unknown_reduction(function: Callable[..., Tensor], reduction: str) -> None:
    with pytest.raises(ValueError, match=f"^{reduction} is not a valid value for reduction: .*mean, sum, none"):
        function(torch.randn(3, 4), torch.rand(3, 4), reduction=reduction)


def test_reductions_of_other_losses() -> None:
    with pytest.raises(ValueError, match="sum_classes is not a valid value"):
        F.binary_cross_entropy_with_logits(torch.randn(3), torch.rand(3), reduction="sum_classes")
    with pytest.raises(ValueError, match="average is not a valid value"):
        fused_sce.SigmoidCrossEntropyLoss(reduction="average")


def test_scalar_where_labels_are_needed() -> None:
    x, t = torch.randn(()), torch.rand(())
    with pytest.raises(ValueError, match="input is a scalar"):
        F.sigmoid_cross_entropy(x, t, reduction="sum_classes")
    with pytest.raises(IndexError, match="it is a scalar"):
        F.multilabel_soft_margin_loss(x, t)


def test_nothing_is_changed_by_a_refused_call() -> None:
    loss = fused_sce.BCEWithLogitsLoss(pos_weight=torch.rand(4))
    x = torch.randn(3, 5, requires_grad=True)
    before = x.detach().clone(), loss.pos_weight
    with pytest.raises(RuntimeError):
        loss(x, torch.rand(3, 5))
    assert torch.equal(x, before[0])
    assert x.grad is None
    assert loss.pos_weight is before[1]
