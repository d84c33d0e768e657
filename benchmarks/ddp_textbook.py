"""DistributedDataParallel over gloo with LARS as a textbook writes it, on one thread per rank.

mpirun -np 2 python benchmarks/ddp_textbook.py --steps 20 --port 29500
"""

import argparse
import os
import time

import torch
from torch import distributed

from hvdlarge.models.resnet import ResNet20

WARM_UP = 15


@torch.no_grad()
def lars(model, velocities, lr=0.1, momentum=0.9, decay=1e-4, trust=0.001):
    """LARS as a loop over tensors."""
    for weight, velocity in zip(model.parameters(), velocities, strict=True):
        direction = weight.grad
        if weight.ndim > 1:
            ratio = trust * weight.norm() / (direction.norm() + decay * weight.norm())
            direction = ratio * (direction + decay * weight)
        velocity.mul_(momentum).add_(direction, alpha=lr)
        weight.sub_(velocity)


def main():
    """Train for some steps and print the seconds of one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--port", type=int, default=29500)
    options = parser.parse_args()
    rank, size = (int(os.environ[f"OMPI_COMM_WORLD_{what}"]) for what in ("RANK", "SIZE"))
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{options.port}", rank=rank, world_size=size
    )
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(ResNet20())
    velocities = [torch.zeros_like(weight) for weight in model.parameters()]
    images, labels = torch.randn(512, 3, 32, 32), torch.randint(10, (512,))
    for step in range(WARM_UP + options.steps):
        if step == WARM_UP:
            begin = time.perf_counter()
        chosen = torch.randint(len(images), (64,))
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        lars(model, velocities)
    if rank == 0:
        print(f"seconds a step: {(time.perf_counter() - begin) / options.steps}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
