import numpy as np
import pytest
import torch

from hvdlarge.config.job_file import parse_job
from hvdlarge.data import image_transforms
from hvdlarge.data.image_transforms import Draws, TransformError
from hvdlarge.data.loader import LoadedMicroBatch
from hvdlarge.data.transforms import Transforms
from hvdlarge.exits import JobError
from hvdlarge.schedule.batch import MicroBatch

JOB = """
name: pictures
epochs: 1
data: {name: synthetic_images, args: {samples: 8}}
model: {name: resnet20}
batch: {base: 4, micro: 4}
lr: {base: 0.1}
"""
ALL = [
    "{name: random_crop, padding: 2}",
    "{name: random_flip}",
    "{name: random_resized_crop, size: 5}",
    "{name: normalize, mean: [0.5, 0.4, 0.3], std: [0.2, 0.3, 0.4]}",
    "{name: mixup, classes: 4}",
]


def sections(*texts):
    return parse_job(JOB, "job", [f"data.transforms=[{', '.join(texts)}]"]).data.transforms


def build(*texts, seed=3):
    def cast(value):
        return value.double() if value.is_floating_point() else value

    return Transforms(sections(*texts), seed, cast, torch.float64)


def loaded(start, stop, height=8, width=9):
    """Samples that depend on their numbers alone."""
    images = torch.stack(
        [
            torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(number))
            for number in range(start, stop)
        ]
    )
    targets = torch.arange(start, stop) % 4
    return LoadedMicroBatch(MicroBatch(0, start, stop), images.to(torch.uint8), targets)


def test_a_sample_is_transformed_alike_in_any_micro_batch():
    transform = build(*ALL[:4])
    whole = transform.train(loaded(10, 22))
    for start, stop in ((10, 14), (14, 15), (15, 22)):
        part = transform.train(loaded(start, stop))
        assert torch.equal(part.inputs, whole.inputs[start - 10 : stop - 10])
        assert torch.equal(part.targets, whole.targets[start - 10 : stop - 10])


def test_samples_seeds_and_places_in_the_list_draw_different_numbers():
    numbers = [
        Draws(seed, place, np.array([sample])).uniform(3)[0]
        for seed in range(3)
        for place in range(3)
        for sample in range(50)
    ]
    assert len(np.unique(np.concatenate(numbers))) == 3 * 3 * 50 * 3


def test_draws_are_uniform():
    draws = Draws(0, 0, np.arange(20_000))
    values = draws.uniform(2)
    assert 0 <= values.min() < values.max() < 1
    counts = np.histogram(values[:, 0], bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # χ² of 19 degrees of freedom, 0.1 %
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.03
    corners = draws.integers(9, 2)
    assert np.unique(corners).tolist() == list(range(9))


def test_random_crop_is_a_window_of_the_padded_image():
    images = torch.rand(5, 3, 8, 9)
    corners = np.array([[0, 0], [4, 4], [2, 2], [1, 3], [0, 4]])
    cropped = image_transforms.crop(images, 2, corners)
    for image, (top, left), result in zip(images.numpy(), corners, cropped.numpy(), strict=True):
        padded = np.pad(image, [(0, 0), (2, 2), (2, 2)])
        assert (result == padded[:, top : top + 8, left : left + 9]).all()
    assert torch.equal(cropped[2], images[2])  # in the middle


def test_random_flip_mirrors_the_chosen_images():
    images = torch.rand(3, 1, 2, 4)
    flipped = image_transforms.flip(images, np.array([True, False, True]))
    assert torch.equal(flipped[1], images[1])
    assert (flipped[0].numpy() == images[0].numpy()[:, :, ::-1]).all()
    assert torch.equal(build("{name: random_flip, probability: 0}").train(loaded(0, 9)).inputs,
                       loaded(0, 9).inputs.double() / 255)  # fmt: skip


def test_a_part_that_is_on_pixels_is_copied():
    images = torch.rand(2, 3, 8, 12, dtype=torch.float64)
    # Rows 2 to 5 and columns 6 to 9
    boxes = np.array([[4 / 8, 8 / 12, 4 / 8, 4 / 12]])
    part = image_transforms.resize_boxes(images, boxes, 4)
    assert torch.allclose(part, images[:, :, 2:6, 6:10], rtol=0, atol=1e-13)


def test_resizing_is_that_of_torch():
    """Bilinear interpolation of torch, which is another function than the one that is used."""
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    whole = np.array([[0.5, 0.5, 1.0, 1.0]])
    for size in (7, 12, 30):
        expected = torch.nn.functional.interpolate(
            images, (size, size), mode="bilinear", align_corners=False
        )
        assert torch.allclose(
            image_transforms.resize_boxes(images, whole, size), expected, atol=1e-12
        )


def test_random_parts_have_areas_and_ratios_of_their_ranges():
    draws = Draws(1, 2, np.arange(5000))
    height, width = 40, 60
    y, x, tall, wide = image_transforms.random_boxes(draws, height, width, (0.1, 0.6), (0.5, 2.0)).T
    assert ((y - tall / 2 > -1e-12) & (y + tall / 2 < 1 + 1e-12)).all()
    assert ((x - wide / 2 > -1e-12) & (x + wide / 2 < 1 + 1e-12)).all()
    fits = (tall < 1) & (wide < 1)
    assert fits.mean() > 0.8
    area, ratio = (tall * wide)[fits], (wide * width / (tall * height))[fits]
    assert 0.1 <= area.min() < 0.11
    assert area.max() <= 0.6
    assert 0.5 <= ratio.min() < 0.51
    assert 1.99 < ratio.max() <= 2.0
    assert abs(np.log(ratio).mean()) < 0.1  # the logarithm is uniform


def test_evaluation_takes_the_centre():
    images = loaded(0, 3, height=16, width=16)
    transform = build(*ALL[:2], "{name: random_resized_crop, size: 14, centre: 0.875}")
    result = transform.evaluate(images)
    expected = images.inputs[:, :, 1:15, 1:15].double() / 255
    assert torch.allclose(result.inputs, expected, atol=1e-12)
    assert torch.equal(result.targets, images.targets)


def test_normalize_gives_mean_0_and_deviation_1():
    images = loaded(0, 40)
    values = images.inputs.double() / 255
    mean, std = (getattr(values, name)((0, 2, 3)).tolist() for name in ("mean", "std"))
    transform = build(f"{{name: normalize, mean: {mean}, std: {std}}}")
    for result in (transform.train(images), transform.evaluate(images)):
        assert torch.allclose(result.inputs.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-12)
        assert torch.allclose(result.inputs.std((0, 2, 3)), torch.ones(3).double(), atol=1e-12)


def test_mixup_mixes_images_and_classes_by_the_same_weights():
    images = loaded(0, 5)
    result = build("{name: mixup, classes: 4, alpha: 0.7}").train(images)
    plain = images.inputs.double() / 255
    for number in range(5):
        other = 4 - number
        weight = ((result.inputs[number] - plain[other]) / (plain[number] - plain[other])).nanmean()
        expected = torch.zeros(4).double()
        if number == other:
            weight = torch.tensor(1.0).double()
        expected[images.targets[number]] += weight
        expected[images.targets[other]] += 1 - weight
        assert torch.allclose(result.targets[number], expected, atol=1e-12)
    weights = Draws(0, 0, np.arange(4000)).beta(0.7)
    assert abs(weights.mean() - 0.5) < 0.02
    assert abs(weights.var() - 1 / (4 * (2 * 0.7 + 1))) < 0.005  # of Beta(α, α)


def test_mixup_takes_integers_of_any_width_and_names_classes_that_there_are_not():
    images, mix = loaded(0, 5), build("{name: mixup, classes: 4}")
    narrow = images._replace(targets=images.targets.to(torch.uint8))
    assert torch.equal(mix.train(narrow).targets, mix.train(images).targets)
    for targets, problem in (
        (images.targets.bool(), "takes class indices"),
        (images.targets + 1, "mixup has 4 classes; the targets go from 1 to 4"),
        (images.targets - 1, "the targets go from -1 to 2"),
    ):
        with pytest.raises(TransformError, match=problem):
            mix.train(images._replace(targets=targets))


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "{name: random_corp}": "did you mean 'random_crop'",
        "{name: random_crop, padding: 0}": "padding",
        "{name: random_crop, pading: 2}": "padding",
        "{name: random_resized_crop}": "size",
        "{name: random_resized_crop, size: 8, area: [0.5, 0.1]}": "area must be .smallest, largest.",
        "{name: normalize, mean: [0.1], std: [0.1, 0.2]}": "1 means and 2 standard deviations",
        "{name: normalize, mean: [0.1], std: [0]}": "std",
        "{name: mixup}": "classes",
        "{name: random_flip, probability: 1.5}": "probability",
    }.items(),
)
def test_wrong_sections_are_refused(text, message):
    with pytest.raises(JobError, match=message):
        sections(text)


def test_inputs_that_are_no_images_are_refused():
    transform = build("{name: random_flip}")
    batch = MicroBatch(0, 0, 2)
    with pytest.raises(TransformError, match=r"these are of shape \(2, 7\)"):
        transform.train(LoadedMicroBatch(batch, torch.zeros(2, 7), torch.zeros(2).long()))
    with pytest.raises(TransformError, match="not of int64"):
        transform.train(LoadedMicroBatch(batch, torch.zeros(2, 3, 4, 4).long(), torch.zeros(2)))
    with pytest.raises(TransformError, match="3 means, and the images have 1 channels"):
        build(ALL[3]).evaluate(LoadedMicroBatch(batch, torch.zeros(2, 1, 4, 4), torch.zeros(2)))
    with pytest.raises(TransformError, match="class indices"):
        build(ALL[4]).train(LoadedMicroBatch(batch, torch.zeros(2, 1, 4, 4), torch.rand(2, 4)))
