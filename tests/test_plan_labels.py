"""The plan of a layer of very many labels is what a profiler sees."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import plan_labels
import pytest
import torch
from plan_labels import KINDS, Setting, plan

# Small, and so that each part of the memory is more than the tolerance.
MANY_CHUNKS = Setting(labels=4001, rows=128, features=64, positives=8, optimizer="sgd", chunk_bytes=2**18)
TOLERANCE = 0.002
SETTINGS = {
    "many chunks": MANY_CHUNKS,
    "one chunk": dataclasses.replace(MANY_CHUNKS, labels=500, chunk_bytes=2**20),
    "adam": dataclasses.replace(MANY_CHUNKS, optimizer="adam"),
    "bfloat16": dataclasses.replace(MANY_CHUNKS, dtype="bfloat16"),
    "float16": dataclasses.replace(MANY_CHUNKS, dtype="float16"),
    "many features": dataclasses.replace(MANY_CHUNKS, rows=32, features=300, chunk_bytes=2**16),
    "many positives": dataclasses.replace(MANY_CHUNKS, positives=64),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_memory(name: str, kind: str) -> None:
    setting = SETTINGS[name]
    assert plan(setting).peak(kind) == pytest.approx(plan_labels.measure(setting, kind), rel=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_and_messages_of_one_of_eight_ranks(dtype: str) -> None:
    setting = dataclasses.replace(MANY_CHUNKS, labels=4001 * 8, ranks=8, dtype=dtype)
    planned = plan(setting)
    few = dataclasses.replace(setting, labels=16 * 8, features=256)  # in float32 the exchange is the peak
    for each in (setting, few):
        assert plan(each).total == pytest.approx(plan_labels.measure(each, "by chunks"), rel=TOLERANCE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        plan_labels.train(setting, "by chunks")
    exchanged = [event for event in profile.events() if event.name.startswith("_c10d_functional::")]
    waits = [event for event in exchanged if event.name.endswith("::wait_tensor")]
    sums = [event.input_shapes[0] for event in exchanged if event.name.endswith("::all_reduce")]
    assert len(exchanged) == len(waits) + len(sums)
    assert sums == [[], [128, 64]] * 2  # the loss, and the gradient by the features, in each of two steps
    assert planned.sent == 2 * 7 * (128 * 64 * setting.item + 4) // 8


LOSSES = ("_sigmoid_cross_entropy_forward_out", "_sigmoid_cross_entropy_backward_out", "sigmoid_cross_entropy")


def operands(setting: Setting) -> Iterator[tuple[str, list[list[int]]]]:
    """What the layer runs in a step, with the shapes of its tensors, those that it writes included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        plan_labels.train(setting, "by chunks")
    for event in profile.events():
        inside = event.cpu_parent.name if event.cpu_parent else ""
        if inside in ("fused_sce::_linear_sigmoid_cross_entropy", "aten::matmul"):
            yield event.name.split("::")[-1], [shape for shape in event.input_shapes if shape]


@pytest.mark.parametrize("name", ["many chunks", "bfloat16", "float16"])
def test_operations_and_traffic(name: str) -> None:
    setting = SETTINGS[name]
    rows, features, item = setting.rows, setting.features, setting.item
    operations = of_products = of_loss = 0
    for operator, shapes in operands(setting):
        elements = sum(math.prod(shape) for shape in shapes if shape != [rows, setting.positives])
        if operator in LOSSES:
            of_loss += elements * item
        elif operator == "sum":
            of_products += elements * item
        elif operator == "add_" and shapes == [[rows, features]] * 2:  # the sum in float32, and a part
            of_products += rows * features * (4 + 4 + item)
        elif operator in ("mm", "addmm", "addmm_"):
            first, second = shapes[:2] if operator == "mm" else shapes[1:3]
            operations += 2 * first[0] * first[1] * second[1]
            of_products += elements * item
            if operator == "addmm_" or len(shapes) == 2:  # it reads what it writes; or it makes what it writes
                of_products += rows * features * item
    planned = plan(setting)
    assert (operations, of_loss, of_products) == (
        2 * planned.operations,  # there are two steps
        2 * planned.loss_traffic,
        2 * planned.product_traffic,
    )


def test_ranks_divide_the_labels() -> None:
    of_one = plan(dataclasses.replace(MANY_CHUNKS, labels=501, ranks=1))
    for labels, ranks in ((2004, 4), (2003, 4)):
        divided = plan(dataclasses.replace(MANY_CHUNKS, labels=labels, ranks=ranks))
        list_of_own = 128 * 8 * 8
        of_rank = dataclasses.replace(divided, batch=divided.batch - list_of_own, exchange=0, sent=0)
        assert of_rank == of_one
        # In a ring of four, each sends a quarter three times to add up, and three times to spread the sum.
        assert divided.sent == 6 * (128 * 64 * 4 + 4) // 4


def test_state_of_the_optimizer() -> None:
    setting, parameters = dataclasses.replace(MANY_CHUNKS, dtype="bfloat16"), 4001 * 65
    for optimizer, master, state, traffic in (
        ("sgd", False, 0, 3 * 2),
        ("sgd", True, 4, 2 * 2 + 2 * 4),
        ("adam", False, 8, 3 * 2 + 4 * 4),
        ("adam", True, 12, 2 * 2 + 6 * 4),
    ):
        planned = plan(dataclasses.replace(setting, optimizer=optimizer, master=master))
        assert planned.state == state * parameters
        assert planned.optimizer_traffic == traffic * parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 0}, "ranks must be at least 1, got 0"),
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, float16, got 'float64'"),
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adam, got 'lion'"),
        ({"master": True}, "master must be False for float32"),
        ({"chunk_bytes": 511}, "chunk_bytes must hold the logits of one label, 512 bytes for 128 rows of float32"),
    ],
)
def test_bad_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(MANY_CHUNKS, **options)


@pytest.mark.parametrize("options", [{"ranks": 2}, {"dtype": "bfloat16", "optimizer": "adam"}])
def test_what_cannot_be_measured(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="measurement"):
        plan_labels.measure(dataclasses.replace(MANY_CHUNKS, **options), "dense")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1.00 kB"), (12345, "12.3 kB"), (9.996e6, "10.0 MB"), (2e18, "2000 PB")],
)
def test_amounts(number: float, text: str) -> None:
    assert plan_labels.amount(number, "B") == text


def test_the_page_has_what_the_tool_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs/huge_label_spaces.md").read_text(encoding="utf-8")
    planned = re.sub(r" \*\*[^*|]+\*\*(?= \|)", "", page)  # without what was measured
    commands = re.findall(r"^    python tools/plan_labels.py(.*)$", page, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["plan_labels.py", *re.sub(r"--measure \S+", "", command).split()])
        assert plan_labels.main() == 0
        assert capsys.readouterr().out in planned
