"""Classification heads that return logits, and putting one in place of a model's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

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
        if in_features < 1:
            raise ValueError(f"in_features must be at least 1, got {in_features}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if init not in _INITIALISERS:
            raise ValueError(f"init must be one of {', '.join(_INITIALISERS)}, got {init!r}")
        self.dropout = dropout
        self.init = init
        super().__init__(in_features, num_classes, bias=bias, device=device, dtype=dtype)

    @property
    def num_classes(self) -> int:
        """The number of logits per sample."""
        return self.out_features

    def reset_parameters(self) -> None:
        """Initialise weight by `init` and bias to 0 ("default": both as `torch.nn.Linear`)."""
        super().reset_parameters()
        if self.init != "default":
            _INITIALISERS[self.init](self.weight)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Features (..., in_features) to logits (..., num_classes)."""
        if self.dropout:
            input = F.dropout(input, self.dropout, self.training)
        return super().forward(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


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


_HEADS: dict[str, type[MultiLabelHead] | type[MultiClassHead]] = {
    "multilabel": MultiLabelHead,
    "multiclass": MultiClassHead,
}

# Where models keep their classifier: torchvision's families (fc: ResNet, RegNet, ShuffleNet, Inception; classifier:
# DenseNet, VGG, EfficientNet, MobileNet, ConvNeXt; head: Swin; heads: ViT), timm's (head, fc, classifier, head.fc), and
# Hugging Face's (classifier, score).
_HEAD_NAMES = ("fc", "classifier", "head", "heads", "last_linear", "score")

# The second classifier that GoogLeNet and Inception train with.
_AUXILIARY_HEADS = ("aux1.fc2", "aux2.fc2", "AuxLogits.fc")


def replace_head(
    model: nn.Module,
    num_classes: int,
    *,
    task: str = "multilabel",
    dropout: float = 0.0,
    init: str = "kaiming_normal",
    freeze_backbone: bool = False,
) -> nn.Module:
    """Put a new head in place of a model's last linear layer, in place.

    The head is found under the names that torchvision, timm and Hugging Face models use; inside a container it is the
    last linear layer. The new one takes its input size, dtype, device and training mode. The second head of GoogLeNet
    and Inception is replaced as well.

    Args:
        model: any module with such a head.
        num_classes: number of labels, or of classes.
        task: "multilabel" puts a `MultiLabelHead` there, "multiclass" a `MultiClassHead`.
        dropout: probability of zeroing a feature before the head in training, in [0, 1).
        init: see `MultiLabelHead`.
        freeze_backbone: stop the gradient of all parameters but the new head's. Batch normalisation still updates its
            running statistics in training mode; call `.eval()` on the backbone to stop that too.

    Returns:
        The same model.

    Raises:
        ValueError: An argument is out of its range, or the model has no head of a known name; it is then unchanged.
    """
    if task not in _HEADS:
        raise ValueError(f"task must be one of {', '.join(_HEADS)}, got {task!r}")
    names = list(_head_names(model))
    if not names:
        parts = ", ".join(name for name, _ in model.named_children()) or "none"
        raise ValueError(
            f"{type(model).__name__} has no head that replace_head knows: no linear layer is, or ends, "
            f"{', '.join(_HEAD_NAMES)}. Its parts are {parts}. "
            "Put a fused_sce.MultiLabelHead where it belongs yourself"
        )

    heads = {}
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        heads[name] = _HEADS[task](
            old.in_features,
            num_classes,
            dropout=dropout,
            init=init,
            device=old.weight.device,
            dtype=old.weight.dtype,
        ).train(old.training)

    if freeze_backbone:
        model.requires_grad_(False)
    for name, head in heads.items():
        model.set_submodule(name, head)
    for attribute in ("num_classes", "num_labels"):  # timm's and Hugging Face's own record of it
        if isinstance(getattr(model, attribute, None), int):
            setattr(model, attribute, num_classes)
    return model


def _head_names(model: nn.Module) -> Iterator[str]:
    """Qualified names of the linear layers to replace: the head, then auxiliary ones. Nothing: no known head."""
    for name in _HEAD_NAMES:
        head = getattr(model, name, None)
        if not isinstance(head, nn.Module):
            continue
        inner = [part for part, module in head.named_modules() if isinstance(module, nn.Linear)]
        if inner:
            yield f"{name}.{inner[-1]}" if inner[-1] else name
            break
    else:
        return
    modules = dict(model.named_modules())
    for name in _AUXILIARY_HEADS:
        if isinstance(modules.get(name), nn.Linear):
            yield name
