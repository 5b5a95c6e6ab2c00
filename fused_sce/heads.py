"""Classification heads that return logits, and putting one in place of a model's own."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn, SupportsIndex, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MultiClassHead", "MultiLabelHead", "replace_head"]


# "kaiming" with gain 1: no rectifier follows a head (He et al., 2015). "default" keeps what torch.nn.Linear does.
_INITIALISERS: dict[str, Callable[[Tensor], object]] = {
    "default": lambda weight: None,
    "kaiming_normal": functools.partial(nn.init.kaiming_normal_, nonlinearity="linear"),
    "kaiming_uniform": functools.partial(nn.init.kaiming_uniform_, nonlinearity="linear"),
    "xavier_normal": nn.init.xavier_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "zeros": nn.init.zeros_,
}


_Model = TypeVar("_Model", bound=nn.Module)
_Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d  # what a head is made of; convolutions with a 1x1 kernel only


class _LinearHead(nn.Linear):
    """Dropout and a linear layer.

    A subclass of `torch.nn.Linear`, so that state dicts keep the names `weight` and `bias` that checkpoints of the
    usual one-layer heads have, and code that asks a model for `fc.in_features` goes on working.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        dropout: float = 0.0,
        init: str = "kaiming_normal",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_features = _positive("in_features", in_features)
        num_classes = _positive("num_classes", num_classes)
        _check_head_options(dropout, init)
        self.dropout = float(dropout)
        self.init = init
        super().__init__(in_features, num_classes, bias=bias, device=device, dtype=dtype)

    @property
    def num_classes(self) -> int:
        """The number of logits per sample."""
        return self.out_features

    def reset_parameters(self) -> None:
        """Initialise weight by `init` and bias to 0 ("default": both as `torch.nn.Linear`)."""
        super().reset_parameters()
        _initialise(self, self.init)

    def forward(self, input: Tensor) -> Tensor:
        """Features (..., in_features) to logits (..., num_classes)."""
        if self.dropout > 0.0:
            input = F.dropout(input, self.dropout, self.training)
        return F.linear(input, self.weight, self.bias)  # torch.jit.script cannot compile super().forward

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


def _positive(name: str, value: object) -> int:
    """`value` as an int of at least 1."""
    if not isinstance(value, SupportsIndex) or isinstance(value, bool):
        counted = f"; give their number, {len(value)}" if isinstance(value, (list, tuple, set, dict)) else ""
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}{counted}")
    number = operator.index(value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def _check_head_options(dropout: float, init: str) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"dropout must be a float in [0, 1), got {type(dropout).__name__} {dropout!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if init not in _INITIALISERS:
        raise ValueError(f"init must be one of {', '.join(_INITIALISERS)}, got {init!r}")


def _initialise(layer: _Layer, init: str) -> None:
    if init != "default":
        _INITIALISERS[init](layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class MultiLabelHead(_LinearHead):
    """A head for labels that do not exclude each other: one independent logistic output per label.

    It returns logits, for a loss that takes logits (`fused_sce.BCEWithLogitsLoss` and its relatives): a sigmoid before
    the loss loses the gradient of every confident output.

    Args:
        in_features: size of the backbone's features.
        num_classes: number of labels C.
        dropout: probability of zeroing a feature in training, in [0, 1).
        init: "kaiming_normal", "kaiming_uniform", "xavier_normal", "xavier_uniform", "zeros" or "default" (torch's).
            All but "default" set the bias to 0, every label's first probability to about one half.
        bias: whether there is one.
        device: where the parameters are made.
        dtype: of the parameters.

    Shape:
        input (..., in_features) -> logits (..., num_classes), of the parameters' dtype.

    Raises:
        ValueError: An argument is out of its range.
    """

    def predict_proba(self, input: Tensor) -> Tensor:
        """Features (..., in_features) to the probability of each label (..., num_classes)."""
        return torch.sigmoid(self(input))


class MultiClassHead(_LinearHead):
    """A head for classes that exclude each other: logits for `torch.nn.CrossEntropyLoss`.

    Arguments, shapes and errors are those of `MultiLabelHead`.
    """

    def predict_proba(self, input: Tensor) -> Tensor:
        """Features (..., in_features) to the probability of each class (..., num_classes), which sum to 1."""
        return torch.softmax(self(input), dim=-1)


_TASKS = {"multilabel": MultiLabelHead, "multiclass": MultiClassHead}
# Hugging Face's names for them.
_PROBLEM_TYPES = {"multilabel": "multi_label_classification", "multiclass": "single_label_classification"}

# Where models keep their classifier: torchvision's families (fc: ResNet, RegNet, ShuffleNet, Inception; classifier:
# DenseNet, VGG, EfficientNet, MobileNet, ConvNeXt; head: Swin; heads: ViT), timm's (head, fc, classifier, head.fc), and
# those of older ports (last_linear, _fc) and language models (score).
_HEAD_NAMES = ("fc", "classifier", "head", "heads", "last_linear", "_fc", "score")

# Further classifiers of the same labels: GoogLeNet's, Inception's, segmentation models', distilled models'.
_FURTHER_HEADS = ("aux1", "aux2", "AuxLogits", "aux_classifier", "head_dist")

# Between a head and the loss these spoil logits. In a Sequential every activation does; beside a head, as an attribute
# of the same module, only these are likely to be applied to its output.
_PROBABILITIES = (nn.Sigmoid, nn.LogSigmoid, nn.Softmax, nn.Softmax2d, nn.LogSoftmax)


def replace_head(
    model: _Model,
    num_classes: int,
    *,
    task: str = "multilabel",
    head: str | Sequence[str] | None = None,
    dropout: float = 0.0,
    init: str = "kaiming_normal",
    freeze_backbone: bool = False,
) -> _Model:
    """Put a new head in place of whatever produces a model's output, in place.

    The head is the last linear layer or 1x1 convolution under the name that timm states, or under a name that models of
    torchvision, timm and Hugging Face use. Where a model has several heads that are known (distilled DeiT, LeViT,
    GoogLeNet's auxiliary ones), all are replaced. A new head takes its input size, dtype, device and training mode from
    the old one. Without dropout it is a plain `torch.nn.Linear` or convolution, which every tool knows; with dropout it
    is a `MultiLabelHead` or `MultiClassHead`, or a convolution behind a `torch.nn.Dropout`.

    An activation behind the head in a `torch.nn.Sequential` becomes an Identity, with a warning: the model must return
    logits. An activation that `forward` itself applies cannot be seen from here: remove it yourself.

    What the model keeps about its labels follows: `num_classes`, `num_labels`, and Hugging Face's `config.num_labels`,
    `id2label`, `label2id` (new names where the number changes) and `problem_type`.

    Args:
        model: a classifier. Of a DataParallel, DDP or compiled model replace the head before wrapping it.
        num_classes: number of labels, or of classes.
        task: "multilabel" for labels that do not exclude one another, "multiclass" for classes that do.
        head: qualified name of the head, such as "backbone.fc", or several of them; found if None. A container stands
            for its last layer.
        dropout: probability of zeroing a feature before the head in training, in [0, 1).
        init: see `MultiLabelHead`.
        freeze_backbone: stop the gradient of all parameters but the new head's. Batch normalisation still updates its
            running statistics in training mode; call `.eval()` on the backbone to stop that too.

    Returns:
        The same model.

    Raises:
        TypeError: `model`, `num_classes`, `head` or `dropout` has a wrong type.
        ValueError: An argument is out of its range; or the model has no head that is known, several of which only some
            are known, or one that something with parameters or a sigmoid follows. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    num_classes = _positive("num_classes", num_classes)
    _check_head_options(dropout, init)
    if task not in _TASKS:
        raise ValueError(f"task must be one of {', '.join(_TASKS)}, got {task!r}")
    names = _find_heads(model) if head is None else _given_heads(model, head)
    layers = _layers(model)
    new = {name: _new_head(layers[name], name, num_classes, task, dropout, init) for name in names}
    activations = [found for name in names for found in _activations_behind(model, name, head is not None)]

    if freeze_backbone:
        model.requires_grad_(False)
    for name in activations:
        warnings.warn(
            f"replace_head removed {name} ({type(model.get_submodule(name)).__name__}), which stood behind the head: "
            "the model returns logits, and the loss applies the sigmoid",
            stacklevel=2,
        )
        model.set_submodule(name, nn.Identity())
    for name in names:
        # Under every name that the layer has.
        for alias, module in list(model.named_modules(remove_duplicate=False)):
            if module is layers[name]:
                model.set_submodule(alias, new[name])
        _record(model, name, _size(layers[name])[1], num_classes)
    _record_in_config(model, num_classes, task)
    return model


def _find_heads(model: nn.Module) -> list[str]:
    """Qualified names of the layers that produce the model's output."""
    for wrapped in ("module", "_orig_mod"):  # DataParallel and DistributedDataParallel; torch.compile
        if [name for name, _ in model.named_children()] == [wrapped]:
            raise ValueError(
                f"{type(model).__name__} wraps a model: replace the head of its .{wrapped}, before wrapping it, as "
                "wrappers and optimizers keep the parameters that they were given"
            )
    layers = _layers(model)
    last = {name: list(inner)[-1] for name, child in model.named_children() if (inner := _layers(child, name))}

    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if labels is not None and hasattr(model, "base_model_prefix"):  # Hugging Face: what is not the base is head
        base = model.base_model_prefix
        found = [layer for name, layer in last.items() if name != base and _size(layers[layer])[1] == labels]
        return found or _refuse(model)

    stated = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")  # timm's record: a name or several
    found = [stated] if isinstance(stated, str) else list(stated or ())
    if not found or not all(name in layers for name in found):
        found = [_only_layer(model, name) for name in _HEAD_NAMES if name in last][:1] or _refuse(model)
    children = {name.partition(".")[0] for name in found}
    found += [last[name] for name in _FURTHER_HEADS if name in last and name not in children]
    # A layer of as many outputs at the end of another part may be a head that is not known here.
    others = [layer for name, layer in last.items() if layer not in found and name not in children]
    others = [layer for layer in others if _beside(layers[found[0]], layers[layer], same_inputs=False)]
    return _refuse_several(model, [*found, *others]) if others else found


def _refuse(model: nn.Module) -> NoReturn:
    children = dict(model.named_children())
    empty = [name for name in _HEAD_NAMES if name in children]
    if empty:  # as timm's models have that were built with num_classes=0
        why = f"its {empty[0]} has no linear layer ({type(children[empty[0]]).__name__}). Build it with a classifier"
    else:
        why = f"no linear layer is, or ends, {', '.join(_HEAD_NAMES)}. Its parts are {', '.join(children) or 'none'}"
    likely = [f', such as head="{name}"' for name in _layers(model)][-1:]
    raise ValueError(
        f"{type(model).__name__} has no head that replace_head knows: {why}. "
        f"Or name the layer that produces the logits{''.join(likely)}"
    )


def _given_heads(model: nn.Module, head: str | Sequence[str]) -> list[str]:
    """The layers that the user names; for a container, its last."""
    names = [head] if isinstance(head, str) else head
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"head must be the name of a layer, or a list of names, got {head!r}")
    parts = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in parts or not _layers(parts[name]):
            what = f"that is a {type(parts[name]).__name__}" if name in parts else "there is no such part"
            raise ValueError(
                f"head must name a linear layer or a 1x1 convolution, got {name!r}: {what}. The last ones of "
                f"{type(model).__name__} are {', '.join(list(_layers(model))[-4:]) or 'none'}"
            )
    return [_only_layer(model, name) for name in names]


def _only_layer(model: nn.Module, name: str) -> str:
    """The last layer of the part `name`, if the part does not seem to hold several heads."""
    layers = _layers(model.get_submodule(name), name)
    *others, last = layers
    beside = [other for other in others if _beside(layers[last], layers[other])]
    if beside:
        _refuse_several(model, [*beside, last])
    return last


def _refuse_several(model: nn.Module, names: list[str]) -> NoReturn:
    raise ValueError(
        f"{type(model).__name__} seems to have several heads: {', '.join(names)}. "
        f"Name those that produce the model's output, such as head={names}"
    )


def _layers(part: nn.Module, prefix: str = "") -> dict[str, _Layer]:
    """The linear layers and 1×1 convolutions of a part, by their qualified names, in the order of their making."""
    return {name: module for name, module in part.named_modules(prefix=prefix) if _is_layer(module)}


def _is_layer(module: nn.Module) -> TypeGuard[_Layer]:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return {*module.kernel_size, *module.stride, module.groups} == {1}
    return isinstance(module, nn.Linear)


def _size(layer: _Layer) -> tuple[int, int]:
    """The numbers of inputs and outputs."""
    return (
        (layer.in_features, layer.out_features)
        if isinstance(layer, nn.Linear)
        else (layer.in_channels, layer.out_channels)
    )


def _beside(head: _Layer, other: _Layer, same_inputs: bool = True) -> bool:
    """Whether `other` looks like one more head, and not like a layer in front of `head`."""
    (inputs, outputs), (other_inputs, other_outputs) = _size(head), _size(other)
    return other_outputs != inputs and (other_outputs == outputs or (same_inputs and other_inputs == inputs))


def _new_head(old: _Layer, name: str, num_classes: int, task: str, dropout: float, init: str) -> nn.Module:
    if isinstance(old.weight, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"the head {name} ({type(old).__name__}) does not know its input size yet: "
            "run the model once, on any batch, before replace_head"
        )
    inputs, _ = _size(old)
    new: nn.Module
    with old.weight.device:
        if not isinstance(old, nn.Linear):
            kind = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(old, kind))
            layer: _Layer = kind(inputs, num_classes, kernel_size=1)
            _initialise(layer, init)
            new = nn.Sequential(nn.Dropout(dropout), layer) if dropout else layer
        elif dropout:
            new = _TASKS[task](inputs, num_classes, dropout=dropout, init=init)
        else:
            new = nn.Linear(inputs, num_classes)
            _initialise(new, init)
    if old.weight.is_floating_point():  # a quantised head's are not
        new = new.to(old.weight.dtype)
    return new.train(old.training)


def _activations_behind(model: nn.Module, name: str, named_by_user: bool) -> list[str]:
    """The activations between a head and the output, as far as the structure shows them."""
    head, found = name, []
    while name:
        path = name.rpartition(".")[0]
        parent = model.get_submodule(path)
        children = {
            f"{path}.{key}".removeprefix("."): child for key, child in parent._modules.items() if child is not None
        }
        if isinstance(parent, nn.Sequential):
            behind = list(children)[list(children).index(name) + 1 :]
            for inner, part in (item for key in behind for item in children[key].named_modules(prefix=key)):
                if type(part).__module__ == nn.ReLU.__module__ and not isinstance(part, nn.MultiheadAttention):
                    found.append(inner)
                elif [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
                    raise ValueError(
                        f"behind the head {head} stands {inner} ({type(part).__name__}), which was made for the old "
                        'number of outputs. Name the layer that produces the logits: head="..."'
                    )
        elif not named_by_user:
            for key, child in children.items():
                if isinstance(child, _PROBABILITIES):
                    raise ValueError(
                        f"beside the head {head} stands {key} ({type(child).__name__}). If forward applies it to the "
                        "logits, put a torch.nn.Identity in its place first, as the loss wants logits; if it does not, "
                        f'say head="{head}"'
                    )
        name = path
    return found


def _record(model: nn.Module, name: str, old_number: int, num_classes: int) -> None:
    """Bring up to date what the model, and the containers of its head, keep about the number of labels."""
    while name:
        name = name.rpartition(".")[0]
        part = model.get_submodule(name)
        for attribute in ("num_classes", "num_labels"):
            kept = vars(part).get(attribute)
            if kept == old_number or (part is model and isinstance(kept, int)):
                setattr(part, attribute, num_classes)


def _record_in_config(model: nn.Module, num_classes: int, task: str) -> None:
    """Hugging Face builds the head of a saved model by its configuration when it is loaded again."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "id2label"):
        config.num_labels = num_classes  # where it changes, this makes id2label and label2id anew
        config.problem_type = _PROBLEM_TYPES[task]
