"""The optimizers as sections of the job file: their typed keys, and what updates the weights.

Contract: importable without torch; every rate, decay and range is checked when the job is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(BaseModel):
    """What every optimizer has: which parameters are adapted and decayed.

    Attributes:
        implementation: package.module:class of the torch optimizer, built with the section's own
            keys. Empty for a section that updates each tensor itself (per_tensor.py).
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )
    implementation: ClassVar[str] = ""
    if TYPE_CHECKING:
        name: str  # each section's own, by which the job file tells them apart

    weight_decay: NotNegative = 0.0
    """Weight decay of the parameters that are not excluded."""
    exclude_bias_and_norm: bool = True
    """Exclude biases and normalisation parameters from weight decay and trust ratios; false is the
    LARS paper's reading.
    """
    exclude: tuple[str, ...] = ()
    """Name patterns (with * and ?) of further parameters to exclude."""
    excluded_lr_factor: NotNegative = 1.0
    """Multiplies the learning rate of excluded parameters."""

    @property
    def options(self) -> dict[str, Any]:
        """The section's own keys: what the torch optimizer is built with, beside the parameters."""
        return self.model_dump(exclude={"name", *OptimizerSection.model_fields})


class Lars(OptimizerSection):
    """LARS; a preset names a published form, whose options job_file.py puts where the job sets
    none; the paper's by default.
    """

    implementation: ClassVar[str] = "hvdlarge.optim.lars:LARS"

    name: Literal["lars"] = "lars"
    """LARS (You, Gitman, Ginsburg 2017)."""
    preset: Literal["paper", "mlperf", "torch", "larc", "optax"] = "paper"
    """Published form whose options are the defaults of the keys below."""
    momentum: Fraction = 0.9
    """Momentum m."""
    trust_coefficient: Positive = 0.001
    """Trust coefficient η of the local learning rate η·‖w‖ / (‖g‖ + β‖w‖)."""
    lr_in_momentum: bool = True
    """Whether the rate multiplies the gradient inside the momentum buffer, as in the paper."""
    joint_norm: bool = False
    """Use ‖g + βw‖ instead of ‖g‖ + β‖w‖ in the trust ratio."""
    clip: bool = False
    """LARC's clipping mode: the effective rate of a tensor is the smaller of its trust ratio and
    the learning rate, instead of their product."""
    nesterov: bool = False
    """Nesterov momentum."""
    eps: NotNegative = 0.0
    """Added to the denominator of the trust ratio."""

    @model_validator(mode="after")
    def _fits(self) -> Lars:
        return _checked_nesterov(self)

    @property
    def options(self) -> dict[str, Any]:
        """The section's own keys but the preset, which has set the others already."""
        return {key: value for key, value in super().options.items() if key != "preset"}


class Sgd(OptimizerSection):
    """torch's SGD with momentum."""

    implementation: ClassVar[str] = "hvdlarge.optim.torch_optimizers:SGD"

    name: Literal["sgd"] = "sgd"
    """torch.optim.SGD."""
    momentum: Fraction = 0.9
    """Momentum."""
    nesterov: bool = False
    """Nesterov momentum."""

    @model_validator(mode="after")
    def _fits(self) -> Sgd:
        return _checked_nesterov(self)


class Lamb(OptimizerSection):
    """LAMB: Adam's direction with a trust ratio."""

    implementation: ClassVar[str] = "hvdlarge.optim.lamb:LAMB"

    name: Literal["lamb"] = "lamb"
    """LAMB (You et al. 2020)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the averages of the gradient and of its square."""
    eps: Positive = 1e-6
    """Added to the root of the second average."""


class Moments(OptimizerSection):
    """What torch's Adam and AdamW have."""

    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the averages of the gradient and of its square."""
    eps: Positive = 1e-8
    """Added to the root of the second average."""


class Adam(Moments):
    """torch's Adam, the decay added to the gradient."""

    implementation: ClassVar[str] = "hvdlarge.optim.torch_optimizers:Adam"

    name: Literal["adam"] = "adam"
    """torch.optim.Adam."""


class AdamW(Moments):
    """torch's AdamW, the decay apart from the gradient."""

    implementation: ClassVar[str] = "hvdlarge.optim.torch_optimizers:AdamW"

    name: Literal["adamw"] = "adamw"
    """torch.optim.AdamW."""


class Adagrad(OptimizerSection):
    """torch's Adagrad."""

    implementation: ClassVar[str] = "hvdlarge.optim.torch_optimizers:Adagrad"

    name: Literal["adagrad"] = "adagrad"
    """torch.optim.Adagrad."""
    eps: Positive = 1e-10
    """Added to the root of the sum of squares."""


class RmsProp(OptimizerSection):
    """torch's RMSprop."""

    implementation: ClassVar[str] = "hvdlarge.optim.torch_optimizers:RMSprop"

    name: Literal["rmsprop"] = "rmsprop"
    """torch.optim.RMSprop."""
    alpha: Fraction = 0.99
    """Decay rate of the average of squares."""
    momentum: Fraction = 0.0
    """Momentum."""
    eps: Positive = 1e-8
    """Added to the root of the average of squares."""


class OwnOptimizer(OptimizerSection):
    """A subclass of torch.optim.Optimizer, by its import path."""

    name: Annotated[str, Field(pattern=r"^[^:]+:[^:]+$")]
    """A subclass of `torch.optim.Optimizer`: one of torch's, or your own."""
    args: dict[str, Any] = {}
    """Keyword arguments of the class, beside the parameters, `lr` and `weight_decay`."""


def _checked_nesterov(optimizer: Any) -> Any:
    if optimizer.nesterov and optimizer.momentum == 0:
        raise ValueError("nesterov needs a momentum above 0")
    return optimizer
