"""Logs, weights and checkpoints of runs, compared with each other."""

import json

import torch


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(ours, theirs):
    """Whether two checkpoints hold the same finite weights, bit for bit."""
    assert all(torch.isfinite(value).all() for value in ours["model"].values())
    return all(torch.equal(ours["model"][name], value) for name, value in theirs["model"].items())


def distance(ours, theirs):
    """The largest relative distance of any tensor of two checkpoints: model, loss, their averages, carried states."""

    def tensors(checkpoint):
        kinds = ("model", "loss", "ema", "ema_loss", "carried")
        parts = ((part, checkpoint.get(part, {})) for part in kinds)
        return {f"{part}.{name}": value for part, held in parts for name, value in held.items()}

    return weight_distance(tensors(ours), tensors(theirs))


def weight_distance(ours, theirs):
    """The largest distance of any tensor of two state dicts, relative to its norm or to 1e-3."""
    assert ours.keys() == theirs.keys()
    distances = [0.0]
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):  # and no extra state
            assert ours[name].dtype == value.dtype
            wide = torch.complex128 if value.is_complex() else torch.float64
            gap = (ours[name].to(wide) - value.to(wide)).norm().item()
            distances.append(gap / max(1e-3, value.to(wide).norm().item()))
    return torch.tensor(distances, dtype=torch.float64).max().item()  # nan if any is
