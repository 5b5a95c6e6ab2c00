"""Classification heads that return logits, and putting one in place of a model's own."""

from __future__ import annotations

import functools
import numbers
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]
from torch.nn import functional as F

from fused_sce._checks import positive
from fused_sce._linear import CHUNK_BYTES
from fused_sce._torch_private import WRAPPED
from fused_sce.functional import linear_topk
from fused_sce.losses import LinearSigmoidCrossEntropyLoss

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
        in_features = positive("in_features", in_features)
        num_classes = positive("num_classes", num_classes)
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
        return F.linear(self._dropped(input), self.weight, self.bias)

    def _dropped(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.dropout, self.training) if self.dropout > 0.0 else input

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


def _check_head_options(dropout: object, init: str) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real):
        raise TypeError(f"dropout must be a float in [0, 1), got {type(dropout).__name__} {dropout!r}")
    if not 0.0 <= float(dropout) < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if init not in tuple(_INITIALISERS):  # a tuple takes what cannot be hashed, too
        raise ValueError(f"init must be one of {', '.join(_INITIALISERS)}, got {init!r}")


def _initialise(layer: _Layer, init: str) -> nn.Module:
    """Initialise the weight by `init` and the bias to 0; "default" keeps both as torch made them."""
    if init != "default":
        _INITIALISERS[init](layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return layer


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
        fused_loss: True, or a `LinearSigmoidCrossEntropyLoss` for its options: in training call the head with the
            target as well, and it returns the loss, without the memory of the logits. For many thousands of labels.
        bias: whether there is one.
        device: where the parameters are made.
        dtype: of the parameters.

    Shape:
        input (..., in_features) -> logits (..., num_classes), of the parameters' dtype. With a target, as the loss
        takes it: -> the loss, a scalar.

    Raises:
        TypeError: An argument has another type, or a target came without `fused_loss`.
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        dropout: float = 0.0,
        init: str = "kaiming_normal",
        fused_loss: bool | LinearSigmoidCrossEntropyLoss = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(fused_loss, bool | LinearSigmoidCrossEntropyLoss):
            raise TypeError(
                f"fused_loss must be True, False or a LinearSigmoidCrossEntropyLoss, got {type(fused_loss).__name__}"
            )
        super().__init__(in_features, num_classes, dropout=dropout, init=init, bias=bias, device=device, dtype=dtype)
        self.fused_loss = LinearSigmoidCrossEntropyLoss() if fused_loss is True else fused_loss or None

    def forward(self, input: Tensor, target: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Features (..., in_features) to logits (..., num_classes), or with a target to the loss."""
        input = self._dropped(input)
        if not is_scripting():  # noqa: SIM102, a script leaves out what depends on this alone
            if target is not None or mask is not None:
                return self._loss(input, target, mask)
        return F.linear(input, self.weight, self.bias)  # torch.jit.script cannot compile super().forward

    def _loss(self, input: Tensor, target: Any, mask: Tensor | None) -> Tensor:
        if self.fused_loss is None:
            if isinstance(target, torch.fx.Proxy):  # torch.fx.symbolic_trace gives one for every argument
                return F.linear(input, self.weight, self.bias)
            raise TypeError(
                "this head returns logits and takes no target: make it with fused_loss=True, or call a loss with them"
            )
        loss: Tensor = self.fused_loss(input, self.weight, target, self.bias, mask=mask)
        return loss

    def predict(self, input: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k most probable labels of features (..., in_features), without the memory of the logits.

        Returns:
            Their logits (..., k), the largest first, and their indices, as `torch.topk`.

        Raises:
            ValueError: `k` is less than 1, or more than there are labels.
        """
        chunk_bytes = CHUNK_BYTES if self.fused_loss is None else self.fused_loss.chunk_bytes
        return linear_topk(self._dropped(input), self.weight, k, self.bias, chunk_bytes=chunk_bytes)

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

_BUILD_IT = "Build the model with a classifier (in timm, num_classes above 0)"

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
    GoogLeNet's auxiliary ones), all are replaced. Where the structure leaves a doubt, nothing is. Structure means the
    order of registration: what `forward` does cannot be seen, an activation that it applies included.

    A new head takes its input size, bias or lack of it, dtype, device and training mode from the old one. Without
    dropout it is a plain `torch.nn.Linear` or convolution, which every tool knows; with dropout it is a
    `MultiLabelHead` or `MultiClassHead`. An activation behind the head in a `torch.nn.Sequential` becomes an Identity,
    with a warning: the model must return logits.

    What the model keeps about its labels follows: `num_classes`, `num_labels`, and Hugging Face's `config.num_labels`,
    `id2label`, `label2id` (new names where the number changes) and `problem_type`.

    Args:
        model: a classifier. Replace its head before wrapping it in DataParallel, DDP or FSDP, and before compiling it.
        num_classes: number of labels, or of classes.
        task: "multilabel" for labels that do not exclude one another, "multiclass" for classes that do.
        head: qualified name of the head, such as "backbone.fc", or several of them; found if None. A container stands
            for its last layer.
        dropout: probability of zeroing a feature before the head in training, in [0, 1); 0 for a convolution.
        init: see `MultiLabelHead`.
        freeze_backbone: stop the gradient of all parameters but the new head's. Batch normalisation still updates its
            running statistics in training mode; call `.eval()` on the backbone to stop that too.

    Returns:
        The same model.

    Raises:
        TypeError: `model`, `num_classes`, `head` or `dropout` has a wrong type.
        ValueError: An argument is out of its range; or the head is not found; or there seem to be further heads; or a
            sigmoid, or a layer with parameters, comes after it. The model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    num_classes = positive("num_classes", num_classes)
    _check_head_options(dropout, init)
    if task not in tuple(_TASKS):
        raise ValueError(f"task must be one of {', '.join(_TASKS)}, got {task!r}")
    names = _find_heads(model) if head is None else _given_heads(model, head)
    old = {name: _layers(model)[name] for name in names}
    new = {name: _new_head(old[name], name, num_classes, task, dropout, init) for name in names}
    activations = [found for name in names for found in _activations_behind(model, name)]
    if head is None:
        for name in names:
            _refuse_readers(model, name)
            _refuse_sigmoid_beside(model, name)

    for name in activations:  # first, as a warning can be turned into an error
        warnings.warn(
            f"replace_head removed {name} ({type(model.get_submodule(name)).__name__}), which stood behind the head: "
            "the model returns logits, and the loss applies the sigmoid",
            stacklevel=2,
        )
    for name in names:
        _record(model, name, _size(old[name])[1], num_classes, task)
    if freeze_backbone:
        model.requires_grad_(False)
    for name in activations:
        model.set_submodule(name, nn.Identity())
    for name in names:
        # Under every name that the layer has.
        for alias, module in list(model.named_modules(remove_duplicate=False)):
            if module is old[name]:
                model.set_submodule(alias, new[name])
    return model


# --- Finding the head ----------------------------------------------------------------------------


def _find_heads(model: nn.Module) -> list[str]:
    """Qualified names of the layers that produce the model's output."""
    for wrapped in WRAPPED:
        if [name for name, _ in model.named_children()] == [wrapped]:
            raise ValueError(
                f"{type(model).__name__} wraps a model: replace the head of its .{wrapped}, before wrapping it, as "
                "wrappers and optimizers keep the parameters that they were given"
            )
    layers = _layers(model)
    last = {name: list(inner)[-1] for name, child in model.named_children() if (inner := _layers(child, name))}

    labels = getattr(getattr(model, "config", None), "num_labels", None)
    if labels is not None and hasattr(model, "base_model_prefix"):  # Hugging Face: what is not the base is head
        kind = type(model).__name__
        if type(model).__module__.startswith("transformers.") and not re.search("Classification|Segmentation", kind):
            _refuse(model, "it is no classifier")  # of detectors and others, more than the head depends on the labels
        found = [
            last[name] for name in last if name != model.base_model_prefix and _size(layers[last[name]])[1] == labels
        ]
        return _last_in_chain(layers, found) or _refuse(
            model, f"nothing behind its base has {labels} outputs (num_labels)"
        )

    stated = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")  # timm's record: a name or several
    if stated:
        found = [name for name in ([stated] if isinstance(stated, str) else stated) if name in layers]
        if not found:  # as with num_classes=0
            _refuse(model, f"it has no linear layer {stated}, as timm's record says. {_BUILD_IT}", built=False)
    else:
        named = [name for name in _HEAD_NAMES if name in dict(model.named_children())]
        found = _last_in_chain(layers, [_only_layer(model, name) for name in named if name in last])
        if len(found) > 1:
            _refuse_several(model, found)
        if not found:
            if named:
                part = type(model.get_submodule(named[0]))
                empty = f"its {named[0]} ({part.__module__}.{part.__qualname__}) has no linear layer of torch.nn"
                _refuse(model, f"{empty}. {_BUILD_IT}", built=False)
            _refuse(model, f"no linear layer is, or ends, {', '.join(_HEAD_NAMES)}")
    children = {name.partition(".")[0] for name in found}
    found += [last[name] for name in _FURTHER_HEADS if name in last and name not in children]
    # A layer of as many outputs at the end of another part may be a head that is not known here.
    replaced = [layers[name] for name in found]
    others = [layer for name, layer in last.items() if name not in children and layers[layer] not in replaced]
    others = [layer for layer in others if _beside(replaced[0], layers[layer], same_inputs=False)]
    if others:
        _refuse_several(model, [*found, *others])
    return found


def _given_heads(model: nn.Module, head: str | Sequence[str]) -> list[str]:
    """The layers that the user names; for a container, its last."""
    names = [head] if isinstance(head, str) else head
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"head must be the name of a layer, or a list of names, got {head!r}")
    parts = dict(model.named_modules(remove_duplicate=False))
    del parts[""]  # the model itself
    for name in names:
        if name not in parts or not _layers(parts[name], name):
            what = f"that is a {type(parts[name]).__name__}" if name in parts else "there is no such part"
            raise ValueError(
                f"head must name a linear layer or a convolution with a 1x1 kernel, got {name!r}: {what}. The last "
                f"ones of {type(model).__name__} are {', '.join(list(_layers(model))[-4:]) or 'none'}"
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


def _last_in_chain(layers: dict[str, _Layer], names: list[str]) -> list[str]:
    """Those of `names` whose outputs no other one of them takes as its inputs."""
    inputs = {name: _size(layers[name])[0] for name in names}
    return [
        name
        for name in names
        if _size(layers[name])[1] not in [inputs[other] for other in names if layers[other] is not layers[name]]
    ]


def _refuse_readers(model: nn.Module, name: str) -> None:
    """Raise ValueError if something that is registered later reads as many values as the layer `name` puts out."""
    outputs = _size(_layers(model)[name])[1]
    modules = list(model.named_modules())
    places = [place for place, (key, _) in enumerate(modules) if key == name]  # none where it is an alias
    for key, part in modules[places[0] + 1 :] if places else ():
        if _reads(part) == outputs:
            raise ValueError(
                f"{name} of {type(model).__name__} does not seem to produce its output, as {key} "
                f"({type(part).__name__}) reads {outputs} values. Name the layer that produces the logits, such as "
                f'head="{name}"'
            )


def _reads(part: nn.Module) -> int | None:
    """The number of values, per position, that a layer with parameters reads."""
    if isinstance(part, nn.LayerNorm):
        return part.normalized_shape[-1]
    for attribute in ("in_features", "in_channels", "num_features"):
        if isinstance(number := getattr(part, attribute, None), int):
            return number
    return None


def _refuse(model: nn.Module, why: str, built: bool = True) -> NoReturn:
    last = [list(layers)[-1] for name, child in model.named_children() if (layers := _layers(child, name))]
    hint = f', such as head="{last[-1]}"' if last and built else ""
    raise ValueError(
        f"{type(model).__name__} has no head that replace_head knows: {why}. Its parts are "
        f"{', '.join(name for name, _ in model.named_children()) or 'none'}. "
        f"Name the layer that produces the logits{hint}"
    )


def _refuse_several(model: nn.Module, names: list[str]) -> NoReturn:
    raise ValueError(
        f"{type(model).__name__} seems to have several heads: {', '.join(names)}. "
        f"Name those that produce the model's output, such as head={names}"
    )


def _layers(part: nn.Module, prefix: str = "") -> dict[str, _Layer]:
    """The linear layers and 1x1 convolutions of a part, by all their qualified names, in the order of registration."""
    named = part.named_modules(prefix=prefix, remove_duplicate=False)
    return {name: module for name, module in named if name and _is_layer(module)}


def _is_layer(module: nn.Module) -> TypeGuard[_Layer]:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return {*module.kernel_size, *module.stride, module.groups} == {1} and set(module.padding) == {0}
    return isinstance(module, nn.Linear)


def _size(layer: _Layer) -> tuple[int, int]:
    """The numbers of inputs and outputs."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _beside(head: _Layer, other: _Layer, same_inputs: bool = True) -> bool:
    """Whether `other` looks like one more head, or like one behind `head`, and not like a layer in front of it."""
    (inputs, outputs), (other_inputs, other_outputs) = _size(head), _size(other)
    alike = other_outputs == outputs or (same_inputs and other_inputs in (inputs, outputs))
    return other is not head and other_outputs != inputs and alike


# --- Putting the new one there -------------------------------------------------------------------


def _new_head(old: _Layer, name: str, num_classes: int, task: str, dropout: float, init: str) -> nn.Module:
    if isinstance(old.weight, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"the head {name} ({type(old).__name__}) does not know its input size yet: "
            "run the model once, on any batch, before replace_head"
        )
    if hasattr(old.weight, "device_mesh"):
        raise ValueError(f"the head {name} is sharded (a DTensor): replace it before the model is sharded")
    bias = old.bias is not None
    new: nn.Module
    with old.weight.device:
        if dropout:
            if not isinstance(old, nn.Linear):
                raise ValueError(f"dropout must be 0 for the head {name}, a convolution, got {dropout}")
            new = _TASKS[task](old.in_features, num_classes, dropout=dropout, init=init, bias=bias)
        elif isinstance(old, nn.Linear):
            new = _initialise(nn.Linear(old.in_features, num_classes, bias=bias), init)
        else:
            kind = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(old, kind))
            new = _initialise(kind(old.in_channels, num_classes, 1, bias=bias), init)
    if old.weight.is_floating_point():  # a quantised head's are not
        new = new.to(old.weight.dtype)
    return new.train(old.training)


def _activations_behind(model: nn.Module, head: str) -> list[str]:
    """The activations that follow a head in the Sequentials around it."""
    found, name = [], head
    while name:
        inside, name = name, name.rpartition(".")[0]
        if not isinstance(parent := model.get_submodule(name), nn.Sequential):
            continue
        children = {
            f"{name}.{key}".removeprefix("."): child
            for key, child in parent.named_modules(remove_duplicate=False)
            if key and "." not in key
        }
        behind = list(children)[list(children).index(inside) + 1 :]
        for inner, part in (item for key in behind for item in children[key].named_modules(prefix=key)):
            activation = type(part).__module__ == nn.ReLU.__module__ and not isinstance(part, nn.MultiheadAttention)
            if activation or isinstance(part, _PROBABILITIES):
                found.append(inner)
            elif [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
                raise ValueError(
                    f"behind the head {head} stands {inner} ({type(part).__name__}), which was made for the old "
                    'number of outputs. Name the layer that produces the logits: head="..."'
                )
    return found


def _refuse_sigmoid_beside(model: nn.Module, head: str) -> None:
    """Raise ValueError if the model, or a container of the head, has a sigmoid that `forward` may apply to it."""
    name = head
    while name:
        name = name.rpartition(".")[0]
        parent = model.get_submodule(name)
        if isinstance(parent, nn.Sequential):
            continue
        for key, child in parent.named_children():
            if any(isinstance(part, _PROBABILITIES) for part in child.modules()) and not [*child.parameters()]:
                beside = f"{name}.{key}".removeprefix(".")
                raise ValueError(
                    f"beside the head {head} stands {beside} ({type(child).__name__}). If forward applies it to the "
                    "logits, put a torch.nn.Identity in its place first, as the loss wants logits; if it does not, "
                    f'say head="{head}"'
                )


def _record(model: nn.Module, name: str, old_number: int, num_classes: int, task: str) -> None:
    """Bring up to date what the model, and the containers of its head, keep about the number of labels."""
    while name:
        name = name.rpartition(".")[0]
        part = model.get_submodule(name)
        for attribute in ("num_classes", "num_labels"):
            kept = vars(part).get(attribute)
            if type(kept) is int and kept == old_number:
                setattr(part, attribute, num_classes)
        # Hugging Face builds the head of a saved model by its configuration when it is loaded again.
        config: Any = vars(part).get("config")
        if hasattr(config, "id2label") and config.num_labels == old_number:
            config.num_labels = num_classes  # where it changes, this makes id2label and label2id anew
            config.problem_type = _PROBLEM_TYPES[task]
