"""Augmentation against torchvision, one clip at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from convlstm_fish.data.modules.augment import COLUMNS, Augmentation
from convlstm_fish.errors import UserError


def clips(count: int = 6, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 2, 10, width), dtype=torch.uint8, generator=generator)


def batch(augmentation: Augmentation, epoch: int = 0, count: int = 6) -> tuple[Tensor, list[int]]:
    drawn = [augmentation.draw(7, epoch, index) for index in range(count)]
    return torch.stack([numbers for numbers, _ in drawn]), [seed for _, seed in drawn]


def apply(augmentation: Augmentation, video: Tensor, numbers: Tensor, seeds: list[int]) -> Tensor:
    return augmentation.apply(video.clone(), numbers, seeds, torch.float32)


@pytest.mark.parametrize("width", [12, 16])  # 16: eight pixels are moved at a time
def test_all_flips_are_the_published_four(width: int) -> None:
    video = clips(1, width).expand(4, -1, -1, -1, -1)
    numbers, seeds = batch(Augmentation("all"), count=4)
    made = apply(Augmentation("all"), video, numbers, seeds)
    clip = video[0] / 255
    for got, expected in zip(made, [clip, tv.vertical_flip(clip), tv.horizontal_flip(clip), clip.flip(-1, -2)]):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_clips_that_lie_apart_in_memory_are_flipped_alike() -> None:
    video = clips(4, 16)[:, ::2]
    numbers, seeds = batch(Augmentation("all"), count=4)
    made = Augmentation("all").apply(video, numbers, seeds, torch.float32)
    assert torch.equal(made, Augmentation("all").apply(video.contiguous(), numbers, seeds, torch.float32))


def test_random_flips_take_all_four_and_none_takes_one() -> None:
    numbers, _ = batch(Augmentation("random"), count=64)
    assert {tuple(row) for row in numbers[:, :2].tolist()} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert not batch(Augmentation("none"), count=64)[0][:, :4].any()


def test_shift_against_torchvision() -> None:
    augmentation = Augmentation("none", shift=3)
    numbers, seeds = batch(augmentation)
    assert {-3, 3} <= {int(x) for x in batch(augmentation, count=64)[0][:, 2:4].flatten()} <= set(range(-3, 4))
    made = apply(augmentation, clips(), numbers, seeds)
    for got, clip, row in zip(made, clips(), numbers.int().tolist()):
        moved = tv.affine(clip.flatten(0, 1), angle=0, translate=[row[3], row[2]], scale=1, shear=[0, 0])
        torch.testing.assert_close(got, moved.view_as(clip) / 255, rtol=0, atol=0)


def test_brightness_against_torchvision() -> None:
    augmentation = Augmentation("none", brightness=0.8)
    numbers, seeds = batch(augmentation)
    made = apply(augmentation, clips(), numbers, seeds)
    for got, clip, factor in zip(made, clips(), numbers[:, COLUMNS.index("brightness")].tolist()):
        assert 0.2 <= factor <= 1.8
        # One channel at a time: torchvision knows images of 1 and 3 channels.
        frames = (clip / 255).flatten(0, 1)[:, None]
        torch.testing.assert_close(got, tv.adjust_brightness(frames, factor).view_as(got))


def test_contrast_against_torchvision() -> None:
    augmentation = Augmentation("none", contrast=0.5)
    numbers, seeds = batch(augmentation)
    # torchvision takes the mean of each image, this project the mean of the clip: a clip of one frame is the same.
    video = clips()[:, :1, :1]
    made = apply(augmentation, video, numbers, seeds)
    for got, clip, factor in zip(made, video, numbers[:, COLUMNS.index("contrast")].tolist()):
        assert 0.5 <= factor <= 1.5
        torch.testing.assert_close(got[0], tv.adjust_contrast(clip[0] / 255, factor))
    # All frames of a clip are treated alike: equal pixels stay equal.
    dark_then_bright = torch.tensor([[10, 100], [10, 250]], dtype=torch.uint8).view(1, 2, 1, 1, 2)
    made = apply(augmentation, dark_then_bright, numbers[:1], seeds[:1])
    assert made[0, 0, 0, 0, 0] == made[0, 1, 0, 0, 0]


def test_noise_is_gaussian_and_a_function_of_the_key() -> None:
    augmentation = Augmentation("none", noise=0.05)
    video = torch.full((4, 10, 4, 30, 40), 128, dtype=torch.uint8)
    numbers, seeds = batch(augmentation, count=4)
    made = apply(augmentation, video, numbers, seeds)
    noise = made - 128 / 255
    assert noise.mean().abs() < 1e-3
    assert noise.std().item() == pytest.approx(0.05, rel=0.02)
    assert not torch.equal(noise[0], noise[1])
    # A clip's noise does not depend on its place in the batch.
    again = apply(augmentation, video[:2], numbers[[2, 0]], [seeds[2], seeds[0]])
    assert torch.equal(again, made[[2, 0]])
    assert not torch.equal(apply(augmentation, video, *batch(augmentation, 1, 4)), made)
    dark = apply(augmentation, torch.zeros_like(video), numbers, seeds)
    assert dark.min() == 0


def test_one_option_does_not_change_what_another_draws() -> None:
    alone, _ = Augmentation("random", brightness=0.3).draw(0, 1, 2)
    other, _ = Augmentation("random", brightness=0.3, contrast=0.2, noise=0.1).draw(0, 1, 2)
    assert torch.equal(alone[:5], other[:5])
    assert alone[5] == 1
    assert other[5] != 1


def test_nothing_asked_nothing_done() -> None:
    augmentation = Augmentation("none")
    made = apply(augmentation, clips(), *batch(augmentation))
    assert torch.equal(made, clips() / 255)
    assert augmentation.copies == 1
    assert Augmentation("all").copies == 4
    assert augmentation.apply(clips(), *batch(augmentation), torch.float64).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"brightness": 0.3, "contrast": 0.2, "noise": 0.1}])
def test_16_bits_are_rounded_from_32_once(dtype: torch.dtype, options: dict[str, float]) -> None:
    augmentation = Augmentation("all", **options)  # type: ignore[arg-type]
    made = augmentation.apply(clips(), *batch(augmentation), dtype)
    assert torch.equal(made, apply(augmentation, clips(), *batch(augmentation)).to(dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flips": "both"}, "flips: 'both' is not one of all, random, none"),
        ({"brightness": -0.1}, "brightness: -0.1 is not a number from 0 to 1"),
        ({"contrast": 1.5}, "contrast: 1.5 is not"),
        ({"noise": float("nan")}, "noise: nan is not"),
        ({"shift": -1}, "shift: -1 is not 0 or more pixels"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Augmentation(**options)


@pytest.mark.parametrize("flips", ["all", "none"])
def test_what_is_not_drawn_is_as_if_it_were(flips: str) -> None:
    for index in range(8):
        drawn, _ = Augmentation(flips, noise=0.1).draw(0, 1, index)
        assert torch.equal(Augmentation(flips).draw(0, 1, index)[0], drawn)
