from torch import Tensor

compiler: str
cuda_version: str
cuda_archs: str

def available_isas() -> str: ...
def isa() -> str: ...
def usual_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    reduction: str,
    soft_margin: bool,
    /,
) -> Tensor | None: ...
