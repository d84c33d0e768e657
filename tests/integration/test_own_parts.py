"""A user's own model, loss and data set, through torch's DataLoader, as the documentation shows them."""

import json
import re

import torch
from support.launching import ROOT


def example_of_the_documentation():
    text = (ROOT / "docs" / "own-model-and-data.md").read_text()
    blocks = dict(
        re.findall(
            r"`(my_\w+\.(?:py|yaml))`:\n+```(?:python|yaml)\n(.*?)```", text, flags=re.DOTALL
        )
    )
    assert set(blocks) == {"my_parts.py", "my_job.yaml"}
    return blocks


def test_documented_model_and_data_give_the_same_result_on_any_world(train, folder):
    for name, text in example_of_the_documentation().items():
        (folder / name).write_text(text)
    weights = []
    for workers, extra in (
        (None, []),
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
            assert (value - weights[0][name]).norm() <= 1e-10 * weights[0][name].norm().clamp_min(
                1e-3
            ), name


BESIDE = """
import torch

class Beside(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.full((4,), index / 64), index % 2

def data():
    return Beside(), None
"""
BESIDE_JOB = """
name: beside
epochs: 1
data: {name: 'beside_parts:data', num_workers: 1}
model: {name: 'torch.nn:Linear', args: {in_features: 4, out_features: 2}}
batch: {base: 16, micro: 8}
lr: {base: 0.1}
"""


def test_parts_beside_the_job_file_are_found_by_loader_processes_too(train, folder):
    (folder / "study").mkdir()
    (folder / "study/beside_parts.py").write_text(BESIDE)
    (folder / "study/job.yaml").write_text(BESIDE_JOB)
    ended = train(2, "study/job.yaml")
    assert ended.code == 0, ended.text
    assert (folder / "runs/beside/summary.json").exists()


SECRET_PARTS = """
from hvdlarge.data.digits import digits

def data(token):
    assert token == "s3cret-of-ada" or token == "s3cret-of-bob"
    return digits()
"""


def test_a_secret_of_the_environment_is_in_no_file_of_the_run_and_a_changed_one_is_noticed(
    train, folder
):
    (folder / "secret_parts.py").write_text(SECRET_PARTS)
    arguments = [
        "jobs/digits.yaml",
        "data={name: 'secret_parts:data', args: {token: '${TOKEN}'}}",
        "epochs=1",
        "run_dir=run",
    ]
    ended = train(2, *arguments, TOKEN="s3cret-of-ada")
    assert ended.code == 0, ended.err
    files = [path for path in (folder / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".pt" for path in files)
    assert [path for path in files if b"s3cret" in path.read_bytes()] == []
    assert "already finished" in train(None, *arguments, TOKEN="s3cret-of-ada").out
    other = train(None, *arguments, TOKEN="s3cret-of-bob")
    assert other.code == 77
    assert 'data.args.token is "sha256:' in other.err
    assert "s3cret" not in ended.out + ended.err + other.out + other.err


def test_documented_hooks_and_policy_run_on_two_workers(train, folder):
    for page in ("hooks.md", "schedules.md"):
        text = (ROOT / "docs" / page).read_text()
        for name, code in re.findall(
            r"`(my_\w+\.py)`:\n\n```python\n(.*?)```", text, flags=re.DOTALL
        ):
            (folder / name).write_text(code)
    decay = "lr.decay={policy: 'my_schedule:InverseTime', halving_epochs: 2}"
    hooks = "hooks=['my_hooks:Curve', {name: 'my_hooks:Norms', args: {every: 50}}]"
    optimizer = "optimizer={name: 'torch.optim:NAdam', args: {momentum_decay: 0.004}, weight_decay: 1e-4}"  # fmt: skip
    ended = train(2, "digits", "epochs=2", "lr.base=0.005", "run_dir=run", decay, hooks, optimizer)
    assert ended.code == 0, ended.err
    assert "step 50: " in ended.out
    lines = (folder / "run/curve.csv").read_text().splitlines()
    logged = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    assert len(lines) == sum("loss" in line or "test_loss" in line for line in logged) > 5
    assert json.loads((folder / "run/summary.json").read_text())["accuracy"] > 0.8
