"""docs/models.md: every built-in model, its arguments, and its numbers of parameters."""

import inspect
import re

import pytest
from support.counting_parameters import build, count
from support.launching import ROOT

from hvdlarge.config import registry

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE))
CIFAR = {"form": "cifar", "classes": 10}
SMALLER = {"encoder_layers": 4, "decoder_layers": 4}
COUNTED = [
    *((name, {}) for name in registry.MODELS),
    ("alexnet", CIFAR),
    ("alexnet_bn", CIFAR),
    ("vgg19_bn", CIFAR),
    ("resnet50", {"version": "v1"}),
    ("lenet", {"form": "caffe"}),
    ("lenet", {"form": "lenet5"}),
    ("row_lstm", {"row": 28, "hidden": 128}),
    ("lstm_lm", {"hidden": 650}),
    ("lstm_lm", {"hidden": 1500}),
    ("gnmt", SMALLER),
    ("gnmt", {"attention": "previous", "target_tokens": 32000}),
]


@pytest.mark.parametrize(("name", "arguments"), COUNTED, ids=str)
def test_the_page_gives_the_number_of_parameters(name, arguments):
    assert f"{count(build(name, **arguments)):,}" in ROWS[name]


@pytest.mark.parametrize("name", registry.MODELS)
def test_the_page_gives_every_argument(name):
    signature = inspect.signature(registry.load("model.name", name, registry.MODELS))
    row = ROWS["alexnet"] if ROWS[name].startswith("as `alexnet`") else ROWS[name]
    arguments = re.findall(r"`(\w+)` \(", row.split(" | ")[0])
    assert arguments == list(signature.parameters)


def test_the_page_has_no_other_model():
    assert ROWS.keys() == registry.MODELS.keys()
