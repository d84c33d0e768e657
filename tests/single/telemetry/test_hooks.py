"""Hooks: which are called, what is refused, and whom the watchdog names."""

import pytest
import torch

from hvdlarge.comm.solo import SoloChannel
from hvdlarge.config.job_file import parse_job
from hvdlarge.exits import JobError
from hvdlarge.resilience.watchdog import Watchdog
from hvdlarge.telemetry.hooks import Hook, Hooks, check_hook

JOB = "name: a\nepochs: 1\ndata: {name: digits}\nmodel: {name: mlp}\nbatch: {base: 8, micro: 4}\nlr: {base: 1}\n"


class Recorder:
    def __init__(self):
        self.seen = []

    def after_step(self, step):
        self.seen.append(step)


class Derived(Hook):
    def on_end(self, run, finished):
        """Overridden."""


def hooks_of(hook, watchdog=None):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    watchdog = watchdog or Watchdog(0, {"step": 1.0})
    return Hooks([("my_parts:Own", hook)], SoloChannel(), watchdog, {"": model}), model


def test_what_a_hook_lacks_is_not_asked_for():
    hook = Recorder()
    hooks, _ = hooks_of(hook)
    hooks.call("after_step", lambda: ["a step"])
    hooks.call("after_evaluation", lambda: pytest.fail("nobody wants it"))
    assert hook.seen == ["a step"]
    check_hook("own", Derived())
    hooks_of(Derived())[0].call("after_step", lambda: pytest.fail("nobody wants it"))


class Misspelt(Recorder):
    def after_evaluations(self, step):
        """Never called."""


class WrongArguments:
    def on_end(self, run):
        """Takes too little."""


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (object(), "hooks: own has none of on_start, after_step"),
        (Hook(), "has none of"),
        (Misspelt(), "has after_evaluations, which is never called; did you mean 'after_evaluation'"),
        (WrongArguments(), r"on_end is called with \(run, finished\): too many positional"),
    ],
)  # fmt: skip
def test_what_is_no_hook_is_refused(hook, message):
    with pytest.raises(JobError, match=message):
        check_hook("own", hook)


class Acts:
    def __init__(self, act):
        self.after_step = act


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda model: 1 / 0, r"hooks: my_parts:Own: after_step raises ZeroDivisionError: .*test_hooks.py, line \d+, in"),
        (lambda model: model[0].weight.mul_(2), "after_step changes '0.weight'"),
        (lambda model: model(torch.randn(4, 2)), "after_step changes '1.(running_mean|num_batches_tracked)'"),
        (lambda model: model.eval(), "after_step leaves 'the model' in evaluation mode"),
        (lambda model: model(torch.randn(4, 2)).sum().backward(), "does not require grad"),
    ],
)  # fmt: skip
def test_what_a_hook_must_not_do_ends_the_run(act, message):
    hooks, model = hooks_of(Acts(act))
    with pytest.raises(JobError, match=f"(?s){message}"):
        hooks.call("after_step", lambda: [model])


def test_a_hook_may_evaluate_and_put_the_mode_back():
    def look(model):
        model.eval()
        model(torch.randn(4, 2))
        model.train()

    hooks, model = hooks_of(Acts(look))
    hooks.call("after_step", lambda: [model])


def test_a_model_may_hold_tensors_of_inference_mode():
    """Which have no version, and cannot be changed."""
    hook = Recorder()
    hooks, model = hooks_of(hook)
    with torch.inference_mode():
        constants = torch.ones(3)
    model.register_buffer("constants", constants)
    hooks.call("after_step", lambda: ["a step"])
    assert hook.seen == ["a step"]


def test_the_watchdog_is_told_which_hook_runs():
    watchdog = Watchdog(0, {"step": 1.0})
    phases = []
    hooks, _ = hooks_of(Acts(lambda _: phases.append(watchdog._phase)), watchdog)
    hooks.call("after_step", lambda: [None])
    assert phases == ["hook my_parts:Own"]


def test_the_job_names_hooks_with_or_without_arguments():
    job = parse_job(JOB, "job.yaml", ["hooks=['a:B', {name: 'a:C', args: {n: 1}}]"])
    assert [(hook.name, hook.args) for hook in job.hooks] == [("a:B", {}), ("a:C", {"n": 1})]
    assert parse_job(job.to_yaml(), "job.yaml") == job
    assert job.resume_signature() == parse_job(JOB, "job.yaml").resume_signature()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[B]", "hooks.0 is \"B\": it is written package.module:attribute"),
        ("'a:B'", "hooks is \"a:B\": "),
        ("[{name: 'a:B', arg: {}}]", "unknown key 'hooks.0.arg'; did you mean 'args'"),
        ("[3]", "hooks.0 is 3: it must be a section"),
    ],
)  # fmt: skip
def test_a_wrong_list_of_hooks_is_refused(value, message):
    with pytest.raises(JobError, match=message):
        parse_job(JOB, "job.yaml", [f"hooks={value}"])
