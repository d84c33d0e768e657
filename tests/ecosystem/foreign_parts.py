"""What a user of other libraries writes: calls that build a model or a data set. Named in jobs as foreign_parts:name."""

import torch

WORDS, LENGTH = 32, 9  # tokens 0 to 3 are special: padding, unknown, mask, end
PADDING, MASK = 0, 2


def sentences(samples=53):
    """Sentences of 3 to 9 tokens as plain lists, padded; the labels of the padding do not count."""
    draw = torch.Generator().manual_seed(0)

    def sentence():
        length = int(torch.randint(3, LENGTH + 1, (), generator=draw))
        words = torch.randint(4, WORDS, (length,), generator=draw).tolist()
        padding = LENGTH - length
        return {
            "input_ids": words + [PADDING] * padding,
            "attention_mask": [1] * length + [0] * padding,
            "labels": words + [-100] * padding,
        }

    return [sentence() for _ in range(samples)], [sentence() for _ in range(20)]


def words(samples=53):
    """The same sentences without padding or labels, which a collator of transformers adds."""
    train, test = (
        [{"input_ids": sample["input_ids"][: sum(sample["attention_mask"])]} for sample in split]
        for split in sentences(samples)
    )
    return train, test


def causal_lm(kind, **configuration):
    from transformers import AutoConfig, AutoModelForCausalLM

    configuration = AutoConfig.for_model(kind, vocab_size=WORDS, **configuration)
    return AutoModelForCausalLM.from_config(configuration)


def pretrained_causal_lm(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def write_pretrained(folder):
    """A GPT-2 as a user downloads one: its configuration, and its weights in model.safetensors."""
    causal_lm("gpt2", n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2).save_pretrained(folder)


def masked_lm(kind, **configuration):
    from transformers import AutoConfig, AutoModelForMaskedLM

    configuration = AutoConfig.for_model(kind, vocab_size=WORDS, **configuration)
    return AutoModelForMaskedLM.from_config(configuration)


def encoder_decoder(kind, **configuration):
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    configuration = AutoConfig.for_model(kind, vocab_size=WORDS, **configuration)
    return AutoModelForSeq2SeqLM.from_config(configuration)


def classifier_of_pictures(kind, **configuration):
    from transformers import AutoConfig, AutoModelForImageClassification

    return AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, **configuration))


def pictures(size=32, samples=53):
    """Pairs (picture, class)."""
    draw = torch.Generator().manual_seed(0)
    classes = torch.randint(3, (samples + 20,), generator=draw)
    values = torch.randn(samples + 20, 3, size, size, generator=draw)
    values[:, 0] += classes.view(-1, 1, 1)
    both = torch.utils.data.TensorDataset(values, classes)
    return torch.utils.data.random_split(both, [samples, 20])


def arrow(path):
    """An Arrow file on disk, mapped into memory: samples are dicts."""
    from datasets import load_from_disk

    sets = load_from_disk(path).with_format("torch")
    return sets["train"], sets["test"]


def write_arrow(path, size=8, samples=53):
    from datasets import Dataset, DatasetDict

    def split(part):
        values, classes = zip(*part, strict=True)
        return Dataset.from_dict(
            {"pixel_values": torch.stack(values).numpy(), "labels": torch.stack(classes).numpy()}
        )

    train, test = pictures(size, samples=samples)
    DatasetDict({"train": split(train), "test": split(test)}).save_to_disk(path)


def augmented_arrow(path):
    """The same file, with noise that a transform draws when pictures are read."""
    from datasets import load_from_disk

    sets = load_from_disk(path).with_transform(noisy)
    return sets["train"], sets["test"]


def noisy(batch):
    values = torch.tensor(batch["pixel_values"])
    return {
        "pixel_values": list(values + 0.1 * torch.randn_like(values)),
        "labels": batch["labels"],
    }


def class_folder(root):
    """Folders of picture files, one for each class, read and augmented by torchvision."""
    from torchvision import datasets, transforms

    augmented = transforms.Compose(
        [
            transforms.RandomResizedCrop(64, scale=(0.6, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
        ]
    )
    plain = transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor()])
    return (
        datasets.ImageFolder(f"{root}/train", augmented),
        datasets.ImageFolder(f"{root}/test", plain),
    )
