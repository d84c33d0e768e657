"""The published variants of LARS under their names, so that the settings of another program can be
carried over.

Source:   `paper`: You, Gitman, Ginsburg (2017), Algorithm 1. `mlperf`: the MLPerf reference in
          TensorFlow, which is the paper's form with an epsilon. `torch`: the rate outside the
          buffer, as torch's SGD has it and most PyTorch forms of LARS with it. `larc`: NVIDIA
          Apex's LARC in its clipping mode. `optax`: decay added before the norm is taken.
Contract: pure; a preset gives defaults only, every option may be set beside it. Not part of a
          preset: how other implementations treat a gradient of zeros (see interface.py) and biases
          (see param_groups.py), and clamps that are in no paper.
"""

from __future__ import annotations

from typing import Any

_PAPER: dict[str, Any] = {
    "trust_coefficient": 0.001,
    "lr_in_momentum": True,
    "joint_norm": False,
    "clip": False,
    "nesterov": False,
    "eps": 0.0,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "mlperf": _PAPER | {"eps": 1e-7},
    "torch": _PAPER | {"lr_in_momentum": False, "eps": 1e-8},
    "larc": _PAPER
    | {"lr_in_momentum": False, "clip": True, "eps": 1e-8, "trust_coefficient": 0.02},
    "optax": _PAPER | {"joint_norm": True},
}
