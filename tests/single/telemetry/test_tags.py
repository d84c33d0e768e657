"""The names of curves: those that people know, for every figure that is a finite number."""

import math

from hvdlarge.telemetry.tags import tags

CLOCK = {"step": 9, "epoch": 0.5, "samples_seen": 320, "time": 1.8e9}


def test_the_line_of_a_step():
    record = CLOCK | {
        "global_batch": 32,
        "lr": 0.1,
        "loss": 0.5,
        "trust_ratio_min": 1e-3,
        "fetch_seconds": 0.5,
        "allreduce_seconds": 1.5,
        "noise_scale": None,
        "weight_distance": math.inf,
        "gradient_square": 2.0,
    }
    assert tags(record) == {
        "train/epoch": 0.5,
        "train/samples_seen": 320,
        "train/global_batch": 32,
        "train/lr": 0.1,
        "train/loss": 0.5,
        "train/trust_ratio_min": 1e-3,
        "time/fetch": 0.5,
        "time/allreduce": 1.5,
        "train/gradient_square": 2.0,
    }


def test_mappings_keep_their_names():
    layers = {
        "fc.weight": {"weight_norm": 2.0, "trust_ratio": None, "update_ratio": 0.1},
        "fc.bias": {"weight_norm": math.nan},
    }
    figures = tags(CLOCK | {"layers": layers, "distances": {"fc.weight": 3.0}})
    assert figures == {
        "train/epoch": 0.5,
        "train/samples_seen": 320,
        "layers/fc.weight/weight_norm": 2.0,
        "layers/fc.weight/update_ratio": 0.1,
        "distances/fc.weight": 3.0,
    }


def test_an_evaluation():
    record = CLOCK | {"test_loss": 0.2, "accuracy": 0.9, "ema_test_loss": 0.1, "ema_accuracy": 1}
    record["evaluate_seconds"] = 0.25
    assert tags(record) == {
        "eval/loss": 0.2,
        "eval/accuracy": 0.9,
        "eval/ema_loss": 0.1,
        "eval/ema_accuracy": 1,
        "time/evaluate": 0.25,
    }
