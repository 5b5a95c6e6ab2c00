"""Whatever makes a program of the loss: torch.compile, torch.export, AOTInductor, torch.fx, traces, ONNX.

The program is right for any batch size, and the fused op is in it, once; in ONNX, which has no such operator, others.
"""

# Without `from __future__ import annotations`: torch.fx 2.11 cannot save a graph whose annotations are text.
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import fused_sce
from fused_sce import functional as F


class Model(nn.Module):
    """A head and its loss, as one program."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.head = nn.Linear(8, 5)
        self.loss = loss

    def forward(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(features)
        return self.loss(logits, target), logits


def losses() -> dict[str, nn.Module]:
    return {
        "mean": fused_sce.BCEWithLogitsLoss(pos_weight=torch.rand(5) + 0.5),
        "none": fused_sce.BCEWithLogitsLoss(reduction="none"),
        "sum_classes": fused_sce.SigmoidCrossEntropyLoss(reduction="sum_classes"),
        "smoothed": fused_sce.SigmoidCrossEntropyLoss(label_smoothing=0.1),
        "soft margin": fused_sce.MultiLabelSoftMarginLoss(),
        "soft margin none": fused_sce.MultiLabelSoftMarginLoss(reduction="none"),
    }


def batch(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 8), torch.rand(rows, 5)


def gradients(model: nn.Module, features: Tensor, target: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss, _ = model(features, target)
    loss.sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("name", list(losses()))
def test_one_graph_and_no_recompilation_per_batch_size(name: str) -> None:
    graphs = {"forward": 0, "backward": 0}

    def counted(direction: str) -> Any:
        def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            graphs[direction] += 1
            assert any("fused_sce" in str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        return compiler

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=counted("forward"), bw_compiler=counted("backward"))
    model = Model(losses()[name])
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 5, 8, 64):
        features, target = batch(rows)
        expected = gradients(model, features, target)
        torch.testing.assert_close(gradients(compiled, features, target), expected)
    assert graphs == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor(dtype: torch.dtype) -> None:
    torch._dynamo.reset()

    def step(x: Tensor, t: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x * 2, t) * 3

    compiled = torch.compile(step, fullgraph=True)
    for rows in (4, 9):
        x = torch.randn(rows, 5, dtype=dtype, requires_grad=True)
        t = torch.randint(0, 2, (rows, 5), dtype=torch.uint8)
        eager, fast = step(x, t), compiled(x, t)
        torch.testing.assert_close(fast, eager)
        torch.testing.assert_close(torch.autograd.grad(fast, x), torch.autograd.grad(eager, x))


def test_compiled_gradient_is_rounded_once() -> None:
    # The upstream factor must not be rounded to the gradient's dtype before the product: 0.1 would be off by 0.1 %.
    torch._dynamo.reset()

    def step(x: Tensor, t: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x, t, reduction="sum") * 0.1

    x, t = torch.randn(64, 80, dtype=torch.bfloat16, requires_grad=True), torch.rand(64, 80)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x, t), x)[0], torch.autograd.grad(step(x, t), x)[0])


def exported(name: str) -> tuple[Model, torch.export.ExportedProgram]:
    model = Model(losses()[name])
    rows = torch.export.Dim("rows")
    program = torch.export.export(model, batch(6), dynamic_shapes={"features": {0: rows}, "target": {0: rows}})
    return model, program


@pytest.mark.parametrize("name", list(losses()))
def test_export_with_any_batch(name: str) -> None:
    model, program = exported(name)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("fused_sce" in target for target in targets) == 1, targets
    for rows in (6, 2, 33):
        inputs = batch(rows)
        torch.testing.assert_close(program.module()(*inputs), model(*inputs))


@pytest.mark.parametrize("name", list(losses()))
def test_exported_program_is_saved_loaded_and_trained(name: str, tmp_path: Path) -> None:
    model, program = exported(name)
    features, target = batch(9)
    expected = gradients(model, features, target)
    # The program shares the model's parameters: their gradients would be found even if it gave none.
    model.zero_grad()
    torch.testing.assert_close(gradients(copy.deepcopy(program.module()), features, target), expected)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(gradients(loaded, features, target), expected)


def test_aot_inductor_package(tmp_path: Path) -> None:
    model, program = exported("mean")
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for rows in (6, 1, 33):
            inputs = batch(rows)
            loss, logits = loaded(*inputs)
            expected_loss, expected_logits = model(*inputs)
            torch.testing.assert_close(loss, expected_loss)
            torch.testing.assert_close(logits, expected_logits)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", list(losses()))
def test_torchscript_is_refused_with_the_remedy(name: str) -> None:
    def step(x: Tensor, t: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x, t)

    for program in (losses()[name], Model(losses()[name]), F.binary_cross_entropy_with_logits, step):
        with pytest.raises(RuntimeError, match=r"cannot be scripted.*torch\.compile.*torch\.export"):
            torch.jit.script(program)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", list(losses()))
def test_a_trace_is_right_for_any_batch(name: str) -> None:
    # not for the batch of its example alone
    loss = losses()[name]
    program = torch.jit.trace(loss, (torch.randn(4, 5, requires_grad=True), torch.rand(4, 5)))
    for rows in (4, 1, 9):
        x, t = torch.randn(rows, 5, requires_grad=True), torch.rand(rows, 5)
        ours, expected = program(x, t), loss(x, t)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(expected.sum(), x))


@pytest.mark.parametrize("name", list(losses()))
def test_fx(name: str, tmp_path: Path) -> None:
    model = Model(losses()[name])
    program = torch.fx.symbolic_trace(model)
    assert program.code.count("fused_sce_functional_") == 1
    torch.save(program, tmp_path / "program.pt")
    loaded = torch.load(tmp_path / "program.pt", weights_only=False)
    torch._dynamo.reset()
    for each in (program, loaded, torch.compile(program, backend="aot_eager", fullgraph=True)):
        for rows in (4, 9):
            features, target = batch(rows)
            expected = gradients(model, features, target)
            torch.testing.assert_close(gradients(program, features, target), expected)
            torch.testing.assert_close(each(features, target), model(features, target))


@pytest.fixture
def onnx() -> Any:
    pytest.importorskip("onnxscript", reason="torch.onnx needs it")
    return pytest.importorskip("onnx.reference")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("exporter", ["torch.export", "TorchScript"])
@pytest.mark.parametrize("name", list(losses()))
def test_onnx(name: str, exporter: str, tmp_path: Path, onnx: Any) -> None:
    model = Model(losses()[name]).eval()
    path = str(tmp_path / "model.onnx")
    options: dict[str, Any]
    if exporter == "torch.export":
        rows = torch.export.Dim("rows")
        options = {"dynamic_shapes": {"features": {0: rows}, "target": {0: rows}}, "verbose": False}
    else:
        options = {"input_names": ["features", "target"], "dynamic_axes": {"features": {0: "n"}, "target": {0: "n"}}}
    torch.onnx.export(model, batch(4), path, dynamo=exporter == "torch.export", **options)
    program = onnx.ReferenceEvaluator(path)
    for rows in (4, 9):
        features, target = batch(rows)
        inputs = {"features": features.numpy(), "target": target.numpy()}
        for ours, expected in zip(program.run(None, inputs), model(features, target), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours).reshape(expected.shape), expected.detach())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("exporter", ["torch.export", "TorchScript"])
def test_onnx_keeps_both_tails(exporter: str, tmp_path: Path, onnx: Any) -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([-largest, -200, -104, -88, -17, 0, 17, 88, 104, 200, largest]).repeat(2, 1)
    t = torch.stack([torch.zeros(11), torch.ones(11)])
    loss = fused_sce.BCEWithLogitsLoss(reduction="none").eval()
    path = str(tmp_path / "loss.onnx")
    torch.onnx.export(loss, (x, t), path, dynamo=exporter == "torch.export", input_names=["x", "t"])
    (ours,) = onnx.ReferenceEvaluator(path).run(None, {"x": x.numpy(), "t": t.numpy()})
    # ONNX has no log1p: below 1 an error of that size is its.
    torch.testing.assert_close(torch.from_numpy(ours), loss(x, t), rtol=1e-6, atol=1e-7)
