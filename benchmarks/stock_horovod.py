"""A Horovod loop as it is written after Horovod's own documentation: no setting is made, nothing is
tuned.

mpirun -np 2 python benchmarks/stock_horovod.py --steps 20
"""

import argparse
import time

import horovod.torch as hvd
import torch

from hvdlarge.models.resnet import ResNet20

WARM_UP = 15


def main():
    """Train for some steps and print the seconds of one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    hvd.init()
    torch.manual_seed(0)
    model = ResNet20()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    images, labels = torch.randn(512, 3, 32, 32), torch.randint(10, (512,))
    for step in range(WARM_UP + options.steps):
        if step == WARM_UP:
            begin = time.perf_counter()
        chosen = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    if hvd.rank() == 0:
        print(f"seconds a step: {(time.perf_counter() - begin) / options.steps}")


if __name__ == "__main__":
    main()
