"""What tests hold against each other: logs and weights of runs."""

import json

import torch


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(ours, theirs):
    """Whether two checkpoints hold the same finite weights, bit for bit."""
    assert all(torch.isfinite(value).all() for value in ours["model"].values())
    return all(torch.equal(ours["model"][name], value) for name, value in theirs["model"].items())


def distance(ours, theirs):
    return max(
        (ours["model"][name].double() - value.double()).norm().item()
        / max(1e-3, value.double().norm().item())
        for name, value in theirs["model"].items()
    )
