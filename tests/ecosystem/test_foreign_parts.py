"""Models and data sets of other libraries, unchanged, give the same run on any number of workers, and go on as if never stopped."""

import pytest
import torch
from support.comparing import distance
from support.whole_runs import alone, job_of, train

from hvdlarge.exits import Stopped

pytestmark = pytest.mark.filterwarnings("default")  # other libraries' warnings are their own

SENTENCES = "data={name: 'foreign_parts:sentences', collate: 'transformers:default_data_collator'}"
SHIFTED = "loss={name: from_model, args: {labels: labels, shifted: true}}"
LABELLED = "loss={name: from_model, args: {labels: labels}}"
# Statistics of a few values and a high rate magnify rounding from step to step: EfficientNet of timm with 32 × 32 pixels, micro-batches of
# 4 and a rate of 0.02 goes from 2e-13 after one step to 9e-10 after 13; with 96 × 96 pixels or micro-batches of 8 it stays below 1e-12
CALM = ["lr.base=0.02", "epochs=2", "batch.base=16", "batch.micro=8"]
PICTURES = "data={name: 'foreign_parts:pictures', args: {size: 64}}"
ARROW = "data={name: 'foreign_parts:arrow', args: {path: ARROW}, targets: labels}"
GPT2 = "kind: gpt2, n_positions: 9, n_embd: 16, n_layer: 2, n_head: 2"
BERT = "hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32"
VIT = f"{BERT}, image_size: 8, patch_size: 4, num_labels: 3"


def of(module, name, arguments):
    return f"model={{name: '{module}:{name}', args: {{{arguments}}}}}"


CASES = {
    "GPT-2": [SENTENCES, of("foreign_parts", "causal_lm", GPT2), SHIFTED],
    "GPT-2 with eager attention and LAMB": [
        SENTENCES,
        of("foreign_parts", "causal_lm", f"{GPT2}, attn_implementation: eager"),
        SHIFTED,
        "optimizer={name: lamb, weight_decay: 0.01}",
        "lr.base=0.01",
    ],
    "GPT-2, its logits taken": [
        "data={name: 'foreign_parts:sentences', collate: 'transformers:default_data_collator', targets: labels}",
        of("foreign_parts", "causal_lm", GPT2),
        "model.output=logits",
        "loss={name: 'test_foreign_parts:of_tokens'}",
    ],
    "GPT-2 with the weights of a folder": [
        SENTENCES,
        of("foreign_parts", "pretrained_causal_lm", "folder: PRETRAINED"),
        SHIFTED,
    ],
    "GPT-2 with the weights of a file, which rank 0 reads": [
        SENTENCES,
        of("foreign_parts", "causal_lm", GPT2),
        SHIFTED,
        "init_from={path: WEIGHTS}",
    ],
    "BERT": [SENTENCES, of("foreign_parts", "masked_lm", f"kind: bert, {BERT}"), LABELLED],
    "BERT, gaps drawn by the collator": [
        "data={name: 'foreign_parts:words', collate: 'gaps:collate', num_workers: 1}",
        of("foreign_parts", "masked_lm", f"kind: bert, {BERT}"),
        LABELLED,
        "batch.micro=8",
    ],
    "Llama": [
        SENTENCES,
        of("foreign_parts", "causal_lm", f"kind: llama, {BERT}, num_key_value_heads: 1"),
        SHIFTED,
    ],
    "T5": [
        SENTENCES,
        of("foreign_parts", "encoder_decoder", "kind: t5, d_model: 16, d_kv: 8, d_ff: 32, num_layers: 2, num_heads: 2, decoder_start_token_id: 0"),
        LABELLED,
    ],
    "ViT of transformers on an Arrow set": [
        ARROW,
        of("foreign_parts", "classifier_of_pictures", f"kind: vit, {VIT}"),
        "model.output=logits",
    ],
    "an Arrow set, its labels inside the model, with loader processes": [
        "data={name: 'foreign_parts:arrow', args: {path: ARROW}, num_workers: 1}",
        of("foreign_parts", "classifier_of_pictures", f"kind: vit, {VIT}"),
        "loss={name: from_model}",
    ],
    "an Arrow set with a transform that draws": [
        "data={name: 'foreign_parts:augmented_arrow', args: {path: ARROW}, targets: labels}",
        of("foreign_parts", "classifier_of_pictures", f"kind: vit, {VIT}"),
        "model.output=logits",
    ],
    "ResNet of timm": [PICTURES, *CALM, of("timm", "create_model", "model_name: test_resnet, num_classes: 3")],
    "ViT of timm with stochastic depth": [
        PICTURES,
        *CALM,
        of("timm", "create_model", "model_name: test_vit, num_classes: 3, img_size: 64, drop_path_rate: 0.3, drop_rate: 0.1"),
    ],
    "EfficientNet of timm, channels last": [
        PICTURES,
        *CALM,
        of("timm", "create_model", "model_name: test_efficientnet, num_classes: 3, drop_rate: 0.3"),
        "model.channels_last=true",
    ],
    "efficientnet_pytorch": [
        PICTURES,
        *CALM,
        of("efficientnet_pytorch", "EfficientNet.from_name", "model_name: efficientnet-b0, num_classes: 3, image_size: 64, width_coefficient: 0.25"),
    ],
    "a mobile net of torchvision": [
        "data={name: 'foreign_parts:class_folder', args: {root: PICTURES}}",
        *CALM,
        of("torchvision.models", "mobilenet_v3_small", "num_classes: 4, width_mult: 0.25"),
    ],
}  # fmt: skip


def of_tokens(logits, labels):
    """The sum over the tokens that count, each predicted from those before it, and their number."""
    from torch.nn.functional import cross_entropy

    logits, labels = logits[:, :-1].transpose(1, 2), labels[:, 1:]
    return cross_entropy(logits, labels, reduction="sum"), (labels != -100).sum()


@pytest.fixture
def written(control, folder):
    """Files that the data sets read, by the word that stands for them in a job."""
    if control.rank == 0:
        import foreign_parts
        from parts.make_pictures import write

        foreign_parts.write_arrow(folder / "arrow")
        foreign_parts.write_pretrained(folder / "pretrained")
        write(folder / "pictures", train=15, test=5)
    control.barrier()
    return {
        "ARROW": folder / "arrow",
        "PICTURES": folder / "pictures",
        "PRETRAINED": folder / "pretrained",
        "WEIGHTS": folder / "pretrained/model.safetensors",
    }


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_any_number_of_workers_and_a_stop_give_the_same_run(
    control, tensors, folder, written, changes
):
    for word, path in written.items():
        changes = [change.replace(f": {word}", f": '{path}'") for change in changes]
    job = job_of(changes)
    expected = alone(job, control, folder)
    result = train(job, control, tensors, folder / "whole")
    assert distance(result, expected) < 1e-12
    assert result["state"]["results"] == pytest.approx(expected["state"]["results"], rel=1e-9)
    with pytest.raises(Stopped):
        train(job, control, tensors, folder / "parts", stop_after=3)
    control.barrier()
    # Bit for bit, but for the convolutions of a GPU, which add in any order without `deterministic`
    bound = 1e-12 if torch.cuda.is_available() else 0.0
    assert distance(train(job, control, tensors, folder / "parts"), result) <= bound
