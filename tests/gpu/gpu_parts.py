"""Own parts of the jobs of these tests."""

import time

import torch

from hvdlarge.data.digits import digits


class Crowded(torch.nn.Module):
    """A layer for the digits that runs out of the GPU's memory in a training pass of its own."""

    def __init__(self, at_pass):
        super().__init__()
        self.head = torch.nn.Linear(64, 10)
        self.at_pass, self.passes = at_pass, 0

    def forward(self, images):
        if self.training:
            self.passes += 1
            if self.passes == self.at_pass:
                torch.empty(2**45, device=images.device)
        return self.head(images.flatten(1))


class OneByOne(torch.utils.data.Dataset):
    """The digits, sample by sample; one of them may carry a label that no class has."""

    def __init__(self, dataset, wrong=None, seconds=0.0):
        self.dataset, self.wrong, self.seconds = dataset, wrong, seconds

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        time.sleep(self.seconds)
        image, label = self.dataset[index]
        return (image, torch.tensor(17)) if index == self.wrong else (image, label)


def data(wrong=None, seconds=0.0):
    train, test = digits()
    return OneByOne(train, wrong, seconds), test


class Pairs(torch.nn.Module):
    """Two predictions for each digit: logits of shape (n, 10, 2)."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(64, 20)

    def forward(self, images):
        return self.head(images.flatten(1)).view(-1, 10, 2)


class LabelsTwice(OneByOne):
    """The digits with their label twice, shape (2,)."""

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return image, torch.as_tensor(label).expand(2)


def data_of_pairs():
    train, test = digits()
    return LabelsTwice(train), LabelsTwice(test)
