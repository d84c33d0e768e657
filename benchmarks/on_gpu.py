"""ResNet-50 on one GPU: a textbook loop of torch alone, and the engine's waits for the GPU.

    python benchmarks/on_gpu.py [--batch 256] [--steps 30] [--rounds 5]
    python benchmarks/on_gpu.py --waits

The loop is the one of torch's and timm's examples: autocast to bfloat16, channels-last, fused SGD,
the loss read every tenth step; its samples are noise, in pinned memory or on the GPU. `--job FILE`
writes the job with which `python -m hvdlarge.bench step FILE` measures the engine.
"""

import argparse
import collections
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from hvdlarge.models.resnet import ResNet50

JOB = """\
name: resnet50
epochs: 1
data: {{name: synthetic_images, args: {{samples: {samples}, size: 224, classes: 1000}}}}
model: {{name: resnet50, channels_last: true}}
precision: bf16
batch: {{base: {batch}, micro: {batch}}}
lr: {{base: 0.1}}
optimizer: {{name: lars, weight_decay: 1e-4}}
run_dir: {folder}
"""


def textbook(batch, resident):
    """A function that trains so many steps and returns seconds per step."""
    model = ResNet50().cuda().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True
    )
    criterion = torch.nn.CrossEntropyLoss()
    images = torch.randn(512, 3, 224, 224)
    labels = torch.randint(1000, (512,))
    images, labels = (
        (images.cuda(), labels.cuda()) if resident else (images.pin_memory(), labels.pin_memory())
    )

    def train(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for step in range(steps):
            first = step * batch % (513 - batch)
            inputs = images[first : first + batch].to("cuda", non_blocking=True)
            targets = labels[first : first + batch].to("cuda", non_blocking=True)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cuda", torch.bfloat16):
                loss = criterion(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 9:
                loss.item()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps

    return train


def measure(batch, steps, rounds):
    """Print seconds per step and samples per second of the loops, interleaved."""
    loops = {
        "textbook loop, pinned": textbook(batch, False),
        "textbook loop, on the GPU": textbook(batch, True),
    }
    for loop in loops.values():
        loop(8)  # warm-up
    seconds = collections.defaultdict(list)
    for _ in range(rounds):
        for name, loop in loops.items():
            seconds[name].append(loop(steps))
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(
            f"{name:<28} {1e3 * middle:.1f} ms a step ({1e3 * min(values):.1f} to "
            f"{1e3 * max(values):.1f}), {batch / middle:,.0f} samples/s"
        )


def waits(batch, steps=20):
    """Print where the engine's steps wait for the GPU, by torch's warnings and its profiler."""
    from hvdlarge.train import main

    class Watch:
        """Warns of each wait from the fifth step on."""

        def after_step(self, step):
            if step.step == 4:
                torch.cuda.set_sync_debug_mode("warn")

    with tempfile.TemporaryDirectory() as folder:
        text = JOB.format(samples=steps * batch, batch=batch, folder=f"{folder}/run")
        (Path(folder) / "job.yaml").write_text(text + "hooks: [{name: 'watch:Watch'}]\n")
        module = type(sys)("watch")
        module.Watch = Watch
        Watch.__module__ = "watch"
        sys.modules["watch"] = module
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with torch.profiler.profile() as profile:
                code = main([f"{folder}/job.yaml"])
            torch.cuda.set_sync_debug_mode("default")
    places = collections.Counter(
        f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)
    )
    calls = {
        event.key: event.count
        for event in profile.key_averages()
        if "Synchronize" in event.key or "Memcpy DtoH" in event.key
    }
    print(json.dumps({"exit code": code, "steps": steps, "calls": calls}, indent=1))
    print(f"places that wait, in the last {steps - 5} steps:")
    for place, count in places.most_common():
        print(f"{count:6} {place}")


def options():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--waits", action="store_true", help="list what the engine waits for")
    parser.add_argument("--no-autotune", action="store_true", help="without cudnn.benchmark")
    parser.add_argument("--job", type=Path, metavar="FILE", help="write the engine's job and end")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = options()
    if chosen.job:
        chosen.job.write_text(JOB.format(samples=50000, batch=chosen.batch, folder="runs/resnet50"))
        sys.exit()
    if not torch.cuda.is_available():
        sys.exit("on_gpu: torch sees no GPU here")
    torch.backends.cudnn.benchmark = not chosen.no_autotune
    if chosen.waits:
        waits(chosen.batch)
    else:
        measure(chosen.batch, chosen.steps, chosen.rounds)
