"""Makes torchvision importable where its compiled operators cannot be loaded.

The package index gives a torchvision that is built for CUDA. Beside a torch that is built for a CPU its operators do not load, and then
it can be imported only if they are declared. The models and data sets that are tested use none of them.
"""

import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parents[2] / ".ecosystem/torchvision"
SUPPRESSION = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def make_importable():
    """Add torchvision to the search path."""
    try:
        for library in FOLDER.glob("torchvision/_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", SUPPRESSION)
    sys.path.append(str(FOLDER))
