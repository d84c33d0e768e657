"""A user's own model, loss and data set, through torch's DataLoader, as the README shows them."""

import json
import re

import torch
from launching import ROOT


def example_of_the_readme():
    text = (ROOT / "README.md").read_text()
    blocks = dict(re.findall(r"`(my_\w+\.(?:py|yaml))`:\n+```(?:python|yaml)\n(.*?)```", text, flags=re.DOTALL))
    assert set(blocks) == {"my_parts.py", "my_job.yaml"}
    return blocks


def test_the_readmes_own_model_and_data_set_run_alike_on_any_world(train, folder):
    for name, text in example_of_the_readme().items():
        (folder / name).write_text(text)
    weights = []
    for workers, extra in (
        (None, []),
        (2, []),
        (2, ["data.num_workers=2"]),
        (3, ["data.num_workers=1", "data.prefetch_steps=1"]),
    ):
        run = f"runs/{workers}{len(weights)}"
        ended = train(workers, "my_job.yaml", "precision=fp64", f"run_dir={run}", *extra)
        assert ended.code == 0, ended.err
        weights.append(torch.load(folder / run / "checkpoints/last.pt", weights_only=True)["model"])
        summary = json.loads((folder / run / "summary.json").read_text())
        assert summary["growths"] >= 1
    for other in weights[1:]:
        for name, value in other.items():
            assert (value - weights[0][name]).norm() <= 1e-10 * weights[0][name].norm().clamp_min(1e-3), name
