"""Models of Hugging Face's transformers with random weights, built from their configuration.

Nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM


def causal_lm(kind: str, **configuration: Any) -> torch.nn.Module:
    """A model that continues text, such as `gpt2`, with the arguments of its configuration."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **configuration))


def masked_lm(kind: str, **configuration: Any) -> torch.nn.Module:
    """A model that fills gaps, such as `bert`, with the arguments of its configuration."""
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **configuration))
