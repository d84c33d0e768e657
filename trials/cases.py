"""Hypothesis strategies for cases, as plain JSON: a job composed of blocks, the number of workers
and the interruptions of its run.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from hvdlarge.config.job import Gradients

Case = dict[str, Any]

_SOURCES = ["none", "torch", "numpy", "random", "all"]
_PLAIN_BLOCKS: list[dict[str, Any]] = [
    {"kind": "linear"},
    {"kind": "linear", "bias": False},
    {"kind": "conv"},
    {"kind": "norm", "form": "layer"},
    {"kind": "norm", "form": "group"},
    {"kind": "batch_norm"},
    {"kind": "batch_norm", "momentum": 0.5},
    {"kind": "dropout"},
    {"kind": "noise", "source": "torch"},
    {"kind": "lstm"},
    {"kind": "attention"},
]
_ODD_BLOCKS: list[dict[str, Any]] = [
    *(
        {"kind": "batch_norm", "form": form}
        for form in (
            "no_affine",
            "frozen",
            "evaluated",
            "subclass",
            "untracked",
            "never",
            "twice",
            "twice_apart",
            "named_twice",
            "checkpointed",
            "reentrant",
            "skipped_by_data",
            "skipped_by_chance",
        )
    ),
    {"kind": "batch_norm", "form": "flat"},
    {"kind": "batch_norm", "momentum": 1.0},
    {"kind": "batch_norm", "momentum": 0.0},
    {"kind": "conv2d"},
    {"kind": "parametrized", "form": "weight"},
    {"kind": "empty"},
    *(
        {"kind": "buffer", "dtype": dtype, "persistent": persistent, "scalar": scalar}
        for dtype, persistent, scalar in (
            ("bool", True, False),
            ("uint8", True, True),
            ("int32", True, False),
            ("float16", True, True),
            ("bfloat16", True, False),
            ("float64", False, False),
            ("complex64", True, False),
            ("float32", False, True),
            ("int16", True, False),
        )
    ),
    {"kind": "integers"},
    {"kind": "hooked", "when": "pass"},
    {"kind": "expanded", "rows": 1},
    {"kind": "instance_norm"},
    *(
        {"kind": "noise", "source": source, "checkpointed": True}
        for source in ("torch", "numpy", "random")
    ),
    {"kind": "noise", "source": "numpy"},
    {"kind": "noise", "source": "random"},
    {"kind": "noise", "source": "all", "always": True},
    *({"kind": "skipped", "by": by} for by in ("data", "torch", "random", "all")),
    {"kind": "embedding"},
    {"kind": "tied"},
    {"kind": "frozen"},
    {"kind": "unused"},
    {"kind": "scale"},
    *({"kind": "brittle", "shift": shift} for shift in (1.0, 1.5, 2.0, 3.0)),
    *({"kind": "leashed", "limit": limit} for limit in (0.003, 0.01, 0.03, 0.1)),
    {"kind": "spectral", "form": "frozen"},
    {"kind": "spectral", "form": "buffer"},
    {"kind": "widened"},
    {"kind": "halved"},
    {"kind": "extra", "form": "constant"},
    {"kind": "extra", "form": "tensor"},
    {"kind": "reset"},
    {"kind": "reset", "saved": True},
]
_BAD_BLOCKS: list[dict[str, Any]] = [
    {"kind": "batch_norm", "form": "renorm"},
    {"kind": "batch_norm", "form": "cumulative"},
    {"kind": "spectral", "form": "trained"},
    {"kind": "embedding", "sparse": True},
    {"kind": "private_noise", "seeded": True},
    {"kind": "private_noise", "seeded": False},
    {"kind": "power_iteration", "persistent": True},
    {"kind": "power_iteration", "persistent": False},
    {"kind": "counting"},
    {"kind": "extra", "form": "counted"},
    {"kind": "transposed"},
    {"kind": "lazy"},
    {"kind": "instance_norm", "tracks": True},
    {"kind": "batch_norm", "form": "shared"},
    {"kind": "remembering"},
    {"kind": "act_norm", "by_weight": False},
    {"kind": "act_norm", "by_weight": True},
    {"kind": "renormed"},
    {"kind": "renormed", "within": True},
    {"kind": "parametrized", "form": "settled"},
    {"kind": "switching"},
    {"kind": "hooked", "when": "sum"},
    {"kind": "expanded", "rows": 2},
    {"kind": "parametrized", "form": "spectral"},
    {"kind": "evaluated", "saved": True},
    {"kind": "evaluated", "saved": False},
]
_QUIET_SETS = ["in_memory", "subset_in_memory", "mixed_in", "tensors"]
_DRAWING_SETS = [
    "listed",
    "listed_many",
    "own_item",
    "own_batch",
    "subset",
    "subset_own_batch",
    "subset_many",
    "nested",
    "transformed",
    "transformed_many",
    "nested_transformed",
    "transformed_subset",
    "delegating",
    "delegating_many",
    "one_below_many",
    "concatenated",
    "stacked",
]
_PLAIN_LOSSES = ["cross_entropy", "function"]
_ODD_LOSSES = ["regression", "temperature", "centers", "mixup", "normed", "named", "weighted"]
_EVERY_STEP_BY_TIME = 1e-9  # minutes

# Changes of keys until an interruption that must not affect the results.
_CHANGES: list[dict[str, Any]] = [
    {"data": {"prefetch_steps": 2}},
    {"checkpoint": {"every_steps": 2, "keep": 2}},
    # Not micro_batch, on which the random draws of an evaluation depend
    {"evaluate": {"every_epochs": 0.5}},
    {"log": {"every_steps": 3}, "compare_every_steps": 2},
    {"checkpoint": {"best": "test_loss"}},
    {"checkpoint": {"every_minutes": _EVERY_STEP_BY_TIME}},
    {"on_nonfinite": {"policy": "skip"}},
]
_BASE_LRS = {
    "lars": 4.0,
    "lamb": 0.02,
    "sgd": 0.2,
    "adam": 0.01,
    "adamw": 0.01,
    "adagrad": 0.05,
    "rmsprop": 0.005,
}


def _often(draw: st.DrawFn, times_in_ten: int) -> bool:
    return draw(st.integers(0, 9)) >= 10 - times_in_ten


@st.composite
def cases(draw: st.DrawFn, largest_world: int = 8, threads: bool = True) -> Case:
    """A case.

    Args:
        draw: of Hypothesis.
        largest_world: maximum number of workers.
        threads: whether ranks are threads, so that worlds can be killed and have any size up to
            `largest_world`; otherwise every world has that size, or one worker.
    """
    sizes = [size for size in (2, 3, 4, 2, 3, 4, 5, 8, 1) if size <= largest_world]
    bad = _often(draw, 2)
    model, features = draw(_models(bad))
    loss = draw(_losses(bad))
    if loss["args"]["kind"] == "named":
        model["gives"] = "dict"
    training, batch, epochs = draw(_batches(features, bad))
    exact = _often(draw, 3)
    job: dict[str, Any] = {
        "name": "drawn",
        "seed": draw(st.sampled_from([0, 1, 2, 2**63 - 1])),
        "epochs": epochs,
        "precision": "fp32" if _often(draw, 1) else "fp64",
        "reduction": "exact" if exact else "fast",
        "data": {
            "name": "trials.blocks:data",
            "args": training,
            "prefetch_steps": draw(st.integers(1, 4)),
        },
        "model": {"name": "trials.blocks:model", "args": model},
        "loss": {"name": "trials.blocks:loss", "args": loss["args"]},
        "batch": batch,
        "lr": {},
        "optimizer": draw(_optimizers()),
        "evaluate": {
            "every_epochs": draw(st.sampled_from([1.0, 0.4, 3.0])),
            "micro_batch": draw(st.integers(1, 12)),
        },
        "checkpoint": draw(_checkpoints()),
        "log": {"every_steps": draw(st.sampled_from([1, 2, 10]))},
        "compare_every_steps": draw(st.integers(1, 3)),
        "gradients": {},
    }
    job["lr"] = draw(_lr_sections(job["optimizer"]["name"], epochs, batch))
    if training.get("gives") == "image" and _often(draw, 5):
        job["model"]["channels_last"] = True
    # In 16 bits only exact mode is reproducible: rounding of sums is amplified to 8 or 11 bits
    if exact and _often(draw, 2):
        job["precision"] = draw(st.sampled_from(["bf16", "fp16"]))
    if (
        (not exact or _often(draw, 1))
        and _is_quiet(model, loss["args"], training)
        and _often(draw, 4)
    ):
        batch["micro"] = "auto"
    if _often(draw, 2):
        job["gradients"]["clip_norm"] = draw(st.sampled_from([0.05, 0.5, 5.0]))
    if not exact and _often(draw, 1):
        job["horovod"] = {"groups": draw(st.integers(1, 6))}
    skips = any(
        block["kind"] == "skipped" or "skipped" in block.get("form", "")
        for block in model["blocks"]
    )
    if "missing" in Gradients.model_fields and (skips or _often(draw, 1)):
        job["gradients"]["missing"] = "zero" if _often(draw, 9) else "error"
    if training.get("poisoned") is not None or not _stays_finite(model) or _often(draw, 1):
        job["on_nonfinite"] = draw(_nonfinite())
    workers = draw(st.sampled_from(sizes)) if threads else largest_world
    grows = job["lr"]["decay"]["policy"] in ("constant", "multistep", "exponential")
    changes = [
        change for change in _CHANGES if "on_nonfinite" not in change or "on_nonfinite" not in job
    ]
    if "test_samples" not in training:  # the best result of no evaluation is refused
        changes = [change for change in changes if "best" not in change.get("checkpoint", {})]
    if training.get("poisoned") is not None or not _stays_finite(model):
        changes = [change for change in changes if "on_nonfinite" not in change]
        # The checkpoint that a rollback returns to depends on these keys and on the length
        if job["on_nonfinite"]["policy"] == "rollback":
            changes = [
                change for change in changes if not change.keys() & {"checkpoint", "evaluate"}
            ]
            grows = False
    interruptions = st.lists(
        _interruptions(workers, largest_world, threads, grows, changes), min_size=1, max_size=3
    )
    return {
        "job": job,
        "workers": workers,
        "seed": draw(st.integers(0, 99)),
        "interruptions": draw(interruptions) if _often(draw, 6) else [],
    }


def _stays_finite(model: dict[str, Any]) -> bool:
    return all(block["kind"] not in ("brittle", "leashed") for block in model["blocks"])


@st.composite
def _nonfinite(draw: st.DrawFn) -> dict[str, Any]:
    policy = draw(st.sampled_from(["skip", "stop", "rollback", "rollback"]))
    section: dict[str, Any] = {"policy": policy}
    if policy != "stop" and draw(st.booleans()):
        section["limit"] = draw(st.integers(1, 20))
    if policy == "rollback" and draw(st.booleans()):
        section["lr_factor"] = draw(st.sampled_from([0.9, 0.1]))
    return section


def _is_quiet(model: dict[str, Any], loss: dict[str, Any], training: dict[str, Any]) -> bool:
    """Whether results do not depend on the micro-batches, so that they may be `auto`."""
    independent = all(
        block["kind"] in ("linear", "conv", "conv2d", "norm", "tied", "scale", "integers")
        for block in model["blocks"]
    )
    by_sample = training.get("source", "none") == "none" or training["kind"] in (
        "listed",
        "own_item",
        "subset",
        "nested",
    )
    return (
        independent and loss["kind"] in ("cross_entropy", "function", "temperature") and by_sample
    )


@st.composite
def _models(draw: st.DrawFn, bad: bool) -> tuple[dict[str, Any], int]:
    features = draw(st.sampled_from([2, 4, 6]))
    blocks = draw(
        st.lists(
            st.one_of(st.sampled_from(_PLAIN_BLOCKS), st.sampled_from(_ODD_BLOCKS)), max_size=3
        )
    )
    if bad and draw(st.booleans()):
        blocks.insert(draw(st.integers(0, len(blocks))), draw(st.sampled_from(_BAD_BLOCKS)))
    model = {
        "blocks": blocks,
        "features": features,
        "outputs": 3,
        "returned": "eval" if _often(draw, 1) else "train",
    }
    return model, features


@st.composite
def _losses(draw: st.DrawFn, bad: bool) -> dict[str, Any]:
    kind = draw(st.sampled_from(_ODD_LOSSES if _often(draw, 4) else _PLAIN_LOSSES))
    if bad and _often(draw, 2):
        kind = draw(st.sampled_from(["averaging", "vector"]))
    arguments: dict[str, Any] = {}
    if kind == "temperature" and draw(st.booleans()):
        arguments["frozen"] = True
    if kind == "cross_entropy" and draw(st.booleans()):
        arguments["label_smoothing"] = 0.1
    return {"args": {"kind": kind, **arguments}}


@st.composite
def _batches(
    draw: st.DrawFn, features: int, bad: bool
) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Arguments of the data set, batch section and epochs: a few steps of a few micro-batches."""
    samples = draw(st.integers(1, 100))
    first = draw(st.integers(1, 40))
    micro = draw(st.integers(-(-first // 6), first))
    total = draw(st.integers(1, 8 * first))
    kind = draw(st.sampled_from(_DRAWING_SETS if _often(draw, 7) else _QUIET_SETS))
    training: dict[str, Any] = {"kind": kind, "samples": samples, "features": features}
    if kind in _DRAWING_SETS:
        training["source"] = draw(st.sampled_from(_SOURCES))
    if kind == "listed":
        training["gives"] = draw(st.sampled_from(["tensor", "numpy", "dict", "tuple", "image"]))
    if bad and _often(draw, 2):
        training = {
            "kind": "private",
            "samples": samples,
            "features": features,
            "seeded": draw(st.booleans()),
        }
    if _often(draw, 6):
        training["test_samples"] = draw(st.integers(1, 25))
        if bad and _often(draw, 2):
            training["private_test"] = True
    if _often(draw, 1):
        training["poisoned"] = draw(st.integers(0, samples - 1))
    batch: dict[str, Any] = {"base": first, "micro": micro}
    if _often(draw, 3):
        batch |= {"base": draw(st.integers(1, 40)), "initial": first}
    epochs = total / samples
    if _often(draw, 4):
        growth: dict[str, Any] = {
            "policy": "adabatch",
            "factor": draw(st.sampled_from([2.0, 1.3, 3.0])),
        }
        if draw(st.booleans()):
            growth["every_epochs"] = epochs * draw(st.sampled_from([0.5, 0.3]))
        else:
            growth["at_epochs"] = [
                epochs * part for part in draw(st.sampled_from([[0.5], [0.2, 0.6]]))
            ]
        if draw(st.booleans()):
            growth["max"] = first + draw(st.integers(0, 40))
        batch["growth"] = growth
    return training, batch, epochs


@st.composite
def _optimizers(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(st.sampled_from(["lars", "lars", "lars", *_BASE_LRS]))
    options: dict[str, Any] = {
        "name": name,
        "weight_decay": draw(st.sampled_from([0.0, 1e-3, 0.05])),
    }
    if name == "lars":
        options["preset"] = draw(st.sampled_from(["paper", "mlperf", "torch", "larc", "optax"]))
        options["trust_coefficient"] = draw(st.sampled_from([0.001, 0.02]))
    if name in ("lars", "sgd"):
        options["momentum"] = draw(st.sampled_from([0.9, 0.5, 0.0]))
        options["nesterov"] = options["momentum"] > 0 and draw(st.booleans())
    if _often(draw, 2):
        options["exclude_bias_and_norm"] = False
    if _often(draw, 2):
        options["exclude"] = ["head.*"]
    if _often(draw, 2):
        options["excluded_lr_factor"] = draw(st.sampled_from([0.5, 0.0, 2.0]))
    return options


@st.composite
def _lr_sections(
    draw: st.DrawFn, optimizer: str, epochs: float, batch: dict[str, Any]
) -> dict[str, Any]:
    section: dict[str, Any] = {"base": _BASE_LRS[optimizer] * draw(st.sampled_from([1.0, 0.1]))}
    section["scaling"] = draw(st.sampled_from(["none", "linear", "sqrt"]))
    factor = batch.get("initial", batch["base"]) / batch["base"]
    decay = draw(
        st.sampled_from(
            ["constant", "polynomial", "cosine", "exponential", "multistep", "one_cycle"]
        )
    )
    section["decay"] = {"policy": decay}
    if decay == "multistep":
        section["decay"] |= {"gamma": 0.5, "every_epochs": epochs / 3}
    if decay == "exponential":
        section["decay"] |= {"gamma": 0.7, "every_epochs": epochs / 3}
    warmup = draw(st.sampled_from(["none", "linear", "legw"]))
    if warmup != "none" and decay != "one_cycle":
        length = 0.4 * epochs / (factor if warmup == "legw" else 1.0)
        section["warmup"] = {"policy": warmup, "epochs": length}
        if draw(st.booleans()):
            section["warmup"]["on_growth"] = draw(st.sampled_from(["ramp", "jump"]))
    return section


@st.composite
def _checkpoints(draw: st.DrawFn) -> dict[str, Any]:
    section: dict[str, Any] = {"keep": draw(st.integers(1, 3))}
    if _often(draw, 7):
        section["every_steps"] = draw(st.integers(1, 5))
    elif draw(st.booleans()):
        section["every_epochs"] = draw(st.sampled_from([0.3, 1.0]))
    if _often(draw, 1):
        section["every_minutes"] = _EVERY_STEP_BY_TIME
    return section


@st.composite
def _interruptions(
    draw: st.DrawFn,
    workers: int,
    largest_world: int,
    threads: bool,
    grows: bool,
    changes: list[dict[str, Any]],
) -> dict[str, Any]:
    """One interruption: where in the run it comes, how many workers resume, and changes of the job
    until then.
    """
    how = draw(st.sampled_from(["stop", "kill"])) if threads else "stop"
    interruption = {
        "how": how,
        "at": draw(st.integers(0, 100)) / 100,
        "by_rank": draw(st.integers(0, 3)),
        "workers": workers,
    }
    if _often(draw, 4):
        interruption["workers"] = (
            draw(st.integers(1, min(4, largest_world))) if threads else largest_world
        )
    if _often(draw, 2):
        interruption["changes"] = draw(st.sampled_from(changes))
    if grows and _often(draw, 2):
        interruption["epochs"] = draw(st.sampled_from([0.4, 0.7, 0.9]))
    return interruption
