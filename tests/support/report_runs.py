"""Run folders made up for reports, with every kind of line that a run can log."""

import json
import math
import random

LAYERS = [f"{part}.{name}" for part in ("conv1", "conv2", "block1.conv", "block2.conv", "head")
          for name in ("weight", "bias")]  # fmt: skip
KINDS = ("layers", "noise", "distance")
BEGAN = 1_795_746_150.0  # 2026-11-27T02:22:30Z, when all of these runs began
START = "2026-11-27T02:22:30+0000"


def write_report_run(folder, steps=400, kinds=KINDS, timed=True, seed=0, slower=1.0, finished=True,
                     job=None, resumed_at=()):  # fmt: skip
    """A run of AdaBatch from 32 to 128 samples, 20 epochs of 1,491, logged every 5 steps."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    job = job or {"name": folder.name, "epochs": 20.0, "lr": {"base": 1.0 + seed}}
    (folder / "job.resolved.yaml").write_text(json.dumps(job))
    (folder / "environment.json").write_text(json.dumps({"world_size": 2, "device": "cpu"}))
    starts = [{"time": START, "step": 0, "world_size": 2}]
    metrics, decisions = [], []
    samples, now, stage_before = 0, BEGAN + 0.5, None
    for step in range(steps):
        if step in resumed_at:  # an hour later, on more workers
            now += 3600
            hours, seconds = divmod(now - BEGAN + 2 * 3600 + 22 * 60 + 30, 3600)
            clock = f"{int(hours):02d}:{int(seconds // 60):02d}:{int(seconds % 60):02d}"
            starts.append({"time": f"2026-11-27T{clock}+0000", "step": step, "world_size": 4})
        stage = min(2, 3 * step // steps)
        batch, lr = 32 * 2**stage, 0.1 * min(1, (step + 1) / 20)
        decision = {"step": step, "samples_seen": samples, "epoch": samples / 1491.2, "stage": stage,
                    "stage_batch": batch, "global_batch": batch, "micro_batch": 16, "lr": lr,
                    "is_last": step == steps - 1}  # fmt: skip
        if stage_before not in (None, stage):
            decision["grew_from"] = batch // 2
        decisions.append(decision)
        stage_before = stage
        samples += batch
        now += 0.05 * slower * 2**stage
        here = {"step": step, "epoch": samples / 1491.2, "samples_seen": samples}
        timing = {"time": now} if timed else {}
        share = step / steps
        if step % 5 == 4:
            line = here | timing | {"global_batch": batch, "lr": lr, "loss": 2.3 * math.exp(-5 * share) * draw.uniform(0.7, 1.3),
                "trust_ratio_min": 1e-3, "trust_ratio_max": 2e-2, "forward_seconds": 0.1 * slower * 2**stage,
                "backward_seconds": 0.12 * slower * 2**stage, "allreduce_seconds": 0.03 * slower, "decide_seconds": 0.001}  # fmt: skip
            metrics.append(
                line | ({"samples_per_second": batch / 0.05 / slower / 2**stage} if timed else {})
            )
        if step % 10 == 9 and "layers" in kinds:
            metrics.append(here | timing | {"layers": {name: {
                "weight_norm": 3.0, "gradient_norm": 0.5, "update_ratio": 1e-3 * draw.uniform(0.5, 2),
                "trust_ratio": None if name.endswith("bias") else 1e-3 * (1 + number) * math.exp(2 * share) * draw.uniform(0.8, 1.2),
            } for number, name in enumerate(LAYERS)}})  # fmt: skip
        if step % 20 == 19 and "noise" in kinds:
            scale = None if step < 40 else 60 * math.exp(3 * share) * draw.uniform(0.7, 1.4)
            metrics.append(here | timing | {"noise_scale": scale, "gradient_square": 0.1, "gradient_variance": 7.0, "global_batch": batch})  # fmt: skip
        if "distance" in kinds and (step < 20 or step % 5 == 4):
            distance = 0.8 * (step + 1) ** 0.35 * draw.uniform(0.995, 1.005)
            metrics.append(here | timing | {"weight_distance": distance, "distances": {name: distance / (2 + number) for number, name in enumerate(LAYERS)}})  # fmt: skip
        if step % 20 == 19 or step == steps - 1:
            accuracy = 1 - 0.9 * math.exp(-6 * share) * draw.uniform(0.9, 1.1)
            metrics.append(here | timing | {"test_loss": 2.3 * math.exp(-4 * share), "accuracy": accuracy, "ema_test_loss": 2.2 * math.exp(-4.2 * share), "ema_accuracy": min(1.0, accuracy + 0.01)})  # fmt: skip
    for name, lines in (("metrics", metrics), ("decisions", decisions), ("starts", starts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "summary.json").write_text(
            json.dumps({"steps": steps, "samples_per_second": 640.0 / slower})
        )
    return folder
