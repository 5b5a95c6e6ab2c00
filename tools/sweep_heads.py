"""Replace the head of every family of classifiers of timm, torchvision and Hugging Face, and look at what comes out.

    python tools/sweep_heads.py [--table FILE.md] [--only TEXT]

A family is a model file of timm with the name that it gives its classifier, a builder file of torchvision, or a Hugging
Face architecture for image classification. Of each, one small model is built on the meta device (on the CPU where it
computes with numbers as it is built) from its configuration, without weights, and gets a head of LABELS outputs. It is

    replaced   if every output of a forward pass, in training and in evaluation mode, then has LABELS outputs
    refused    if replace_head raises ValueError, and the model is unchanged
    broken     otherwise
    not built  if the library itself cannot build it, or run it as built, here

The exit status is 1 if any is broken.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from fused_sce import replace_head

OLD_LABELS = 1000
LABELS = 7  # no model has as many outputs by itself
RESULTS = ("replaced", "refused", "broken", "not built")
# Of a family the first model that has such a word in its name: they are quick to build.
SMALL = ("test_", "atto", "femto", "pico", "nano", "xxs", "tiny", "xs", "mini", "small", "_s")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One family: `build` makes its model, `batch` a batch for it."""

    library: str
    family: str
    build: Callable[[], nn.Module]
    batch: Callable[[nn.Module], dict[str, Tensor]]


def small_first(names: list[str]) -> list[str]:
    """The names with a word of SMALL in front."""
    return sorted(names, key=lambda name: (not any(word in name for word in SMALL), len(name), name))


def of_timm() -> Iterator[Candidate]:
    """One model of each model file and classifier name."""
    families: dict[tuple[str, str], str] = {}
    for name in small_first(timm.list_models()):
        stated = timm.models.get_pretrained_cfg(name)
        family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        families.setdefault((family, str(stated.classifier if stated else None)), name)
    for (family, classifier), name in sorted(families.items()):
        yield Candidate(
            "timm",
            f"{family}, {classifier}: {name}",
            lambda name=name: timm.create_model(name, pretrained=False, num_classes=OLD_LABELS),  # type: ignore[misc]
            lambda model: {"x": torch.zeros(2, *model.pretrained_cfg["input_size"])},  # type: ignore[index]
        )


def of_torchvision() -> Iterator[Candidate]:
    """One model of each builder file: pictures, videos, quantised ones, and segmentation, a label per pixel."""
    families: dict[str, str] = {}
    for name in small_first(torchvision.models.list_models()):
        module = torchvision.models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
        if not module.startswith(("detection", "optical_flow")):  # they have no labels of whole pictures or pixels
            families.setdefault(module, name)
    for module, name in sorted(families.items()):
        side = 299 if "inception" in module else 224
        shape = (3, 16, side, side) if module.startswith("video") else (3, side, side)
        options: dict[str, object] = {"weights_backbone": None} if module.startswith("segmentation") else {}
        yield Candidate(
            "torchvision",
            f"{module}: {name}",
            lambda name=name, options=options: torchvision.models.get_model(name, **options),  # type: ignore[misc]
            lambda model, shape=shape: {"x": torch.zeros(2, *shape)},  # type: ignore[misc]
        )


def of_hugging_face() -> Iterator[Candidate]:
    """Every architecture for image classification, as its configuration's defaults describe it."""

    def batch(model: Any) -> dict[str, Tensor]:
        config = getattr(model.config, "vision_config", model.config)
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        name = model.main_input_name
        if name == "input_ids":  # ImageGPT reads colours by their numbers
            return {name: torch.zeros(2, 16, dtype=torch.int64)}
        return {name: torch.zeros(2, getattr(config, "num_channels", 3), height, width)}

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    for config, kinds in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.items():
        for kind in filter(None, kinds if isinstance(kinds, tuple) else (kinds,)):
            build = lambda kind=kind, config=config: kind(config(num_labels=OLD_LABELS))  # noqa: E731
            yield Candidate("Hugging Face", kind.__name__, build, batch)


def logits_of(output: Any) -> Iterator[Tensor]:
    """The logits among a model's outputs, whatever holds them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from logits_of(value)
    else:  # Hugging Face's outputs, which hold hidden states too, and torchvision's segmentation
        named = {name: value for name, value in output.items() if "logits" in name or name in ("out", "aux")}
        yield from logits_of(list((named or output).values())[: len(named) or 1])


def counts(model: nn.Module, batch: dict[str, Tensor]) -> list[int]:
    """The number of labels (dimension 1) of every output, in training and in evaluation mode."""
    found = []
    for training in (True, False):
        with torch.no_grad():
            output = model.train(training)(*batch.values()) if "x" in batch else model.train(training)(**batch)
        found += [tensor.shape[1] for tensor in logits_of(output)]
    return found


def state(model: nn.Module) -> list[tuple[str, int, bool]]:
    """What a refused model must still have."""
    return [(name, id(value), value.requires_grad) for name, value in model.named_parameters()]


def examine(candidate: Candidate, device: str) -> tuple[str, str]:
    """The result, and which layers were replaced, or why not."""
    with torch.device(device):
        try:
            model = candidate.build()
        except Exception as error:
            return "not built", first_line(error)
        unchanged = state(model)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                replace_head(model, LABELS, freeze_backbone=True)
        except ValueError as error:
            return ("refused", str(error)) if state(model) == unchanged else ("broken", "refused, but changed")
        except Exception as error:
            return "broken", first_line(error)
        heads = [name for name, value in model.named_parameters() if value.requires_grad and value.ndim > 1]
        how = ", ".join(name.removesuffix(".weight") for name in heads)
        how += "".join("; activation removed" for warning in caught if "replace_head removed" in str(warning.message))
        try:
            after = set(counts(model, candidate.batch(model)))
            return ("replaced", how) if after == {LABELS} else ("broken", f"{how}: outputs {after}")
        except Exception as error:
            result = "broken", f"{how}: {first_line(error)}"
        try:
            untouched = candidate.build()
            counts(untouched, candidate.batch(untouched))
        except Exception as error:
            result = "not built", first_line(error)
        return result


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:150]


def markdown(rows: list[tuple[str, str, str, str]], total: str) -> str:
    """The table."""
    lines = ["| Library | Family: model | Result | Layers replaced, or why not |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    return (
        f"# replace_head on every image-classification family\n\n{total}: `python tools/sweep_heads.py` with timm "
        f"{timm.__version__}, torchvision {torchvision.__version__.partition('+')[0]}, transformers "
        f"{transformers.__version__}. What the results mean stands at the top of that file.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def main() -> int:
    """Examine every family; print what needs a look, or write all of it as a table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="write all results here")
    parser.add_argument("--only", default="", metavar="TEXT", help="families whose library or name contains it")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    candidates = [*of_torchvision(), *of_timm(), *of_hugging_face()]
    for candidate in tqdm([c for c in candidates if options.only in f"{c.library} {c.family}"], unit="family"):
        result, how = examine(candidate, "meta")
        if result == "not built":
            result, how = examine(candidate, "cpu")
        rows.append((candidate.library, candidate.family, result, how))
        if result != "replaced" or options.only:
            tqdm.write(": ".join(rows[-1]))
    counted = Counter(row[2] for row in rows)
    total = ", ".join(f"{result} {counted[result]}" for result in RESULTS)
    print(total)
    if options.table:
        options.table.write_text(markdown(rows, total), encoding="utf-8")
    return int(counted["broken"] > 0)


if __name__ == "__main__":
    sys.exit(main())
