"""Lists of clips as batches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from convlstm_fish import ConvLSTM
from convlstm_fish.layers import collate_clips, pad_clips

CLIPS = [torch.randn(n, 1, 4, 5) for n in (2, 5, 3)]


def test_pads_with_zeros_and_says_the_lengths() -> None:
    video, lengths = pad_clips(CLIPS)
    assert video.shape == (3, 5, 1, 4, 5)
    assert lengths.tolist() == [2, 5, 3]
    for clip, row, n in zip(CLIPS, video, lengths.tolist()):
        assert torch.equal(row[:n], clip)
        assert row[n:].eq(0).all()
    assert torch.equal(pad_clips(CLIPS, batch_first=False)[0], video.transpose(0, 1))


def test_a_padded_batch_is_its_clips() -> None:
    layer = ConvLSTM(1, 2, 3, bidirectional=True)
    video, lengths = pad_clips(CLIPS)
    output, (h_n, _) = layer(video, None, lengths)
    for n, clip in enumerate(CLIPS):
        alone, (h, _) = layer(clip)
        assert torch.allclose(output[n, : len(clip)], alone, atol=1e-6)
        assert torch.allclose(h_n[:, n], h, atol=1e-6)


def test_a_dataloader_makes_batches_of_clips() -> None:
    samples = [{"video": clip, "label": n, "index": torch.tensor(10 * n)} for n, clip in enumerate(CLIPS)]
    batch = next(iter(DataLoader(samples, batch_size=3, collate_fn=collate_clips)))
    assert batch["video"].shape == (3, 5, 1, 4, 5)
    assert batch["lengths"].tolist() == [2, 5, 3]
    assert batch["label"].tolist() == [0, 1, 2]
    assert batch["index"].tolist() == [0, 10, 20]


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([], "at least one clip, got none"),
        ([torch.zeros(2, 1, 4, 5), torch.zeros(2, 1, 4, 6)], "frames of one shape and dtype"),
        ([torch.zeros(2, 3), torch.zeros(2, 3).double()], "frames of one shape and dtype"),
        ([torch.zeros(2, 3), torch.zeros(0, 3)], r"at least one frame, got lengths \[2, 0\]"),
    ],
)
def test_refuses(clips: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pad_clips(clips)
