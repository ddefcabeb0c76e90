"""The three frame predictors against compact definitions of their originals, written here from the sources."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convlstm_fish.models import EncoderForecaster, FramePredictor, StackedPredictor
from convlstm_fish.models.frame_network import FrameNetwork
from convlstm_fish.models.patches import from_patches, to_patches


class ConcatCell(nn.Module):
    """Holm's cell: one biased convolution over [x, h], gates in the order i, f, o, g."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels + hidden, 4 * hidden, 3, padding=1)
        self.hidden = hidden

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, o, g = self.conv(torch.cat([x, h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class Holm(nn.Module):
    """His network by its own definition, a loop over cells."""

    def __init__(self, hidden: int, channels: int = 1) -> None:
        super().__init__()
        self.cells = nn.ModuleList([ConcatCell(channels, hidden)] + [ConcatCell(hidden, hidden) for _ in range(3)])
        self.cnn = nn.Conv3d(hidden, channels, (1, 3, 3), padding=(0, 1, 1))
        self.hidden = hidden

    def forward(self, video: Tensor, steps: int) -> Tensor:
        n, _, _, height, width = video.shape
        h = [video.new_zeros(n, self.hidden, height, width) for _ in range(4)]
        c = list(h)
        for frame in video.unbind(1):
            h[0], c[0] = self.cells[0](frame, h[0], c[0])
            h[1], c[1] = self.cells[1](h[0], h[1], c[1])
        vector, outputs = h[1], []
        for _ in range(steps):
            h[2], c[2] = self.cells[2](vector, h[2], c[2])
            h[3], c[3] = self.cells[3](h[2], h[3], c[3])
            vector = h[3]
            outputs.append(vector)
        return self.cnn(torch.stack(outputs, 2)).sigmoid().transpose(1, 2)

    def copy_into(self, ours: FramePredictor) -> None:
        hidden = self.hidden
        with torch.no_grad():
            for theirs, cell in zip(self.cells, [*ours.encoder, *ours.decoder]):

                def reorder(t: Tensor) -> Tensor:
                    i, f, o, g = t.split(hidden)
                    return torch.cat([i, f, g, o])

                weight = reorder(theirs.conv.weight)
                cell.weight_ih.copy_(weight[:, :-hidden])
                cell.weight_hh.copy_(weight[:, -hidden:])
                cell.bias.copy_(reorder(theirs.conv.bias))
            ours.head.load_state_dict(self.cnn.state_dict())


def moving_square(n: int, frames: int, size: int) -> Tensor:
    """(n, frames, 1, size, size): a bright 3x3 square that moves one pixel a frame, wrapping round."""
    video = torch.zeros(n, frames, 1, size, size)
    video[:, :, :, :3, :3] = 1
    corner, velocity = torch.randint(size, (n, 2)), torch.randint(-1, 2, (n, 2))
    for k in range(n):
        for t in range(frames):
            video[k, t] = video[k, t].roll((corner[k] + t * velocity[k]).tolist(), (1, 2))
    return video


def holm_losses(steps: int, hidden: int, size: int, frames: int) -> list[tuple[float, float]]:
    """(their loss, our loss) of each training step, from the same weights on the same batches."""
    torch.manual_seed(0)
    theirs, ours = Holm(hidden), FramePredictor(1, hidden)
    theirs.copy_into(ours)
    adam = [torch.optim.Adam(n.parameters(), lr=1e-3, betas=(0.9, 0.98)) for n in (theirs, ours)]
    pairs = []
    for _ in range(steps):
        video = moving_square(2, 2 * frames, size)
        x, y = video[:, :frames], video[:, frames:]
        predictions = (theirs(x, frames), ours.to_frames(ours(x, frames)))
        losses = [F.mse_loss(p, y) for p in predictions]
        for optimizer, loss in zip(adam, losses):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        pairs.append((losses[0].item(), losses[1].item()))
    return pairs


def test_holm_training_starts_alike() -> None:
    for theirs, ours in holm_losses(8, hidden=6, size=10, frames=4):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_holm_training_stays_alike_for_fifty_steps() -> None:
    pairs = holm_losses(50, hidden=64, size=12, frames=10)
    assert pairs[-1][0] < 0.5 * pairs[0][0]
    for theirs, ours in pairs:
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_holm_prediction_does_not_depend_on_how_many_follow() -> None:
    torch.manual_seed(0)
    network = FramePredictor(1, 4)
    video = torch.rand(2, 3, 1, 8, 8)
    long = network.predict(video, 9)
    assert long.shape == (2, 9, 1, 8, 8)
    torch.testing.assert_close(network.predict(video, 4), long[:, :4])


class OpenStlCell(nn.Module):
    """Two convolutions without bias, summed; gates i, f, g, o."""

    def __init__(self, channels: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.conv_x = nn.Conv2d(channels, 4 * hidden, kernel, padding=kernel // 2, bias=False)
        self.conv_h = nn.Conv2d(hidden, 4 * hidden, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (self.conv_x(x) + self.conv_h(h)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


def openstl_patches(video: Tensor, p: int) -> Tensor:
    """Its reshape_patch, loop for loop in channels-last order, given and returned channels-first."""
    n, t, c, height, width = video.shape
    last = video.permute(0, 1, 3, 4, 2)
    out = video.new_empty(n, t, height // p, width // p, p * p * c)
    for i in range(height // p):
        for j in range(width // p):
            out[:, :, i, j] = last[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p].reshape(n, t, -1)
    return out.permute(0, 1, 4, 2, 3)


def openstl(cells: list[OpenStlCell], head: nn.Conv2d, frames: Tensor, context: int, mask: Tensor) -> Tensor:
    """All predictions of ConvLSTM_Model.forward for patched frames (N, T, C, H, W); mask (N, T - context - 1)."""
    n, total, _, height, width = frames.shape
    h = [frames.new_zeros(n, cell.conv_h.in_channels, height, width) for cell in cells]
    c, generated = list(h), []
    for t in range(total - 1):
        x = frames[:, t]
        if t >= context:
            keep = mask[:, t - context].to(x.dtype)[:, None, None, None]
            x = keep * x + (1 - keep) * generated[-1]
        for k, cell in enumerate(cells):
            h[k], c[k] = cell(x, h[k], c[k])
            x = h[k]
        generated.append(head(x))
    return torch.stack(generated, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_stack_is_openstl_convlstm(channels: int, eta: float) -> None:
    torch.manual_seed(1)
    ours = StackedPredictor(channels, (6, 5, 4), 5, patch_size=2).double()
    cells = []
    for cell in ours.recurrent:
        twin = OpenStlCell(cell.in_channels, cell.hidden_channels, 5).double()
        twin.conv_x.weight, twin.conv_h.weight = cell.weight_ih, cell.weight_hh
        cells.append(twin)
    assert ours.head.bias is None
    video = torch.rand(3, 9, channels, 8, 12, dtype=torch.float64)
    mask = torch.rand(3, 4) < eta
    x, future = video[:, :4], video[:, 4:]
    patched = openstl_patches(video, 2)
    theirs = openstl(cells, ours.head, patched, 4, mask)
    logits = ours(x, 5, future, mask, with_context=True)
    torch.testing.assert_close(openstl_patches(logits, 2), theirs)
    torch.testing.assert_close(ours(x, 5, future, mask), logits[:, 3:])
    # the loss over all predicted frames, and its gradient, are the same too
    loss = F.mse_loss(theirs, patched[:, 1:])
    ours_loss = F.mse_loss(logits, video[:, 1:])
    torch.testing.assert_close(ours_loss, loss)
    parameters = list(ours.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(ours_loss, parameters), torch.autograd.grad(loss, parameters), rtol=1e-9, atol=1e-12
    )


def test_openstl_setting_has_its_size() -> None:
    count = sum(p.numel() for p in StackedPredictor().parameters())
    # 4 gates of 128, 5x5 kernels, 16 channels in, and the 1x1 head
    assert count == 4 * 128 * 25 * (16 + 7 * 128) + 128 * 16


def shi(network: EncoderForecaster, video: Tensor, steps: int) -> Tensor:
    """Figure 3 step by step: copied states, no input, 1x1 convolution over the states of all layers."""
    states = [None] * len(network.encoder)
    for x in openstl_patches(video, network.patch_size).unbind(1):
        for k, cell in enumerate(network.encoder):
            states[k] = cell(x, states[k])
            x = states[k][0]
    zero, out = torch.zeros_like(openstl_patches(video, network.patch_size)[:, 0]), []
    for _ in range(steps):
        x = zero
        for k, cell in enumerate(network.forecaster):
            states[k] = cell(x, states[k])
            x = states[k][0]
        out.append(network.head(torch.cat([h for h, _ in states], 1)))
    return torch.stack(out, 1)


@pytest.mark.parametrize("peephole", [None, "channel", (4, 3)])
def test_forecaster_is_shi_figure_three(peephole: object) -> None:
    torch.manual_seed(2)
    network = EncoderForecaster(1, (5, 4, 3), 3, patch_size=2, peephole=peephole).double()
    for name, parameter in network.named_parameters():
        if "weight_c" in name:
            nn.init.normal_(parameter)
    video = torch.rand(2, 4, 1, 8, 6, dtype=torch.float64)
    torch.testing.assert_close(openstl_patches(network(video, 5), 2), shi(network, video, 5))
    assert (peephole is not None) == any("weight_ci" in name for name in network.state_dict())


def test_forecaster_feeds_frames_back() -> None:
    torch.manual_seed(3)
    network = EncoderForecaster(1, (4,), 3, patch_size=1, feedback=True)
    video, future = torch.rand(2, 3, 1, 6, 6), torch.rand(2, 4, 1, 6, 6)
    free = network(video, 4)
    taught = network(video, 4, future, torch.ones(2, 3, dtype=torch.bool))
    mixed = network(video, 4, future, torch.tensor([[True] * 3, [False] * 3]))
    torch.testing.assert_close(mixed[0], taught[0])
    torch.testing.assert_close(mixed[1], free[1])
    assert not torch.allclose(free[:, 1:], taught[:, 1:])
    # what is fed is the frame, not its logit: the sequence continued by hand
    by_hand = network(video, 1)
    torch.testing.assert_close(by_hand[:, 0], free[:, 0])
    moved = future.clone()
    moved[:, 0] = network.to_frames(free[:, 0])
    again = network(video, 2, moved[:, :2], torch.ones(2, 1, dtype=torch.bool))
    torch.testing.assert_close(again, free[:, :2])


@pytest.mark.parametrize("shape", [(2, 3, 1, 8, 12), (4, 8, 8), (1, 2, 5, 4, 4)])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_patches_invert(shape: tuple[int, ...], p: int) -> None:
    video = torch.rand(shape)
    patches = to_patches(video, p)
    assert patches.shape[-3:] == (shape[-3] * p * p, shape[-2] // p, shape[-1] // p)
    assert torch.equal(from_patches(patches, p), video)


def test_patches_are_openstl_order() -> None:
    video = torch.rand(2, 3, 3, 8, 4)
    assert torch.equal(to_patches(video, 4), openstl_patches(video, 4))
    assert not torch.equal(to_patches(video, 4)[0], F.pixel_unshuffle(video[0], 4))


@pytest.mark.parametrize(
    "network",
    [
        FramePredictor(2, 4, patch_size=2),
        FramePredictor(2, (3, 5, 4), 5, head_kernel_size=(3, 1, 1), output_activation="identity"),
        EncoderForecaster(2, (4, 3), 3, patch_size=2),
        EncoderForecaster(2, (4,), 3, feedback=True),
        StackedPredictor(2, (4, 3), 3, patch_size=2, bias=True),
    ],
    ids=lambda n: type(n).__name__,
)
def test_every_parameter_learns_under_autocast(network: FrameNetwork) -> None:
    video, truth = torch.rand(2, 3, 2, 8, 8), torch.rand(2, 4, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(video, 4)
    assert logits.shape == truth.shape
    F.mse_loss(network.to_frames(logits.float()), truth).backward()
    unused = (
        {"forecaster.0.weight_ih"}
        if isinstance(network, EncoderForecaster) and not network.feeds_frames_back
        else set()
    )
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad.abs().sum() > 0) == (name not in unused), name


def test_exports() -> None:
    network = FramePredictor(1, 4).eval()
    video = torch.rand(1, 3, 1, 8, 8)
    exported = torch.export.export(network, (video,)).module()
    torch.testing.assert_close(exported(video), network(video))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FramePredictor(0), "in_channels"),
        (lambda: FramePredictor(1, 0), "hidden_channels"),
        (lambda: FramePredictor(1, ()), "hidden_channels"),
        (lambda: FramePredictor(patch_size=0), "patch_size"),
        (lambda: FramePredictor(head_kernel_size=(1, 2, 3)), r"\(1, 2, 3\)"),
        (lambda: FramePredictor(output_activation="softmax"), "softmax"),
        (lambda: FramePredictor(1, 4)(torch.rand(2, 3, 3, 8, 8)), r"\(2, 3, 3, 8, 8\)"),
        (lambda: FramePredictor(1, 4)(torch.rand(2, 3, 1, 8, 8), 0), "steps"),
        (lambda: StackedPredictor(1, (4,))(torch.rand(2, 3, 1, 9, 8)), r"\(9, 8\)"),
        (lambda: StackedPredictor(1, (4,))(torch.rand(2, 3, 1, 8, 8), 2, None, torch.ones(2, 1)), "future"),
        (
            lambda: StackedPredictor(1, (4,))(
                torch.rand(2, 3, 1, 8, 8), 2, torch.rand(2, 2, 1, 8, 8), torch.ones(2, 2)
            ),
            r"\(2, 2\)",
        ),
        (
            lambda: EncoderForecaster(1, (4,))(
                torch.rand(2, 3, 1, 8, 8), 2, torch.rand(2, 2, 1, 8, 8), torch.ones(2, 1)
            ),
            "feedback",
        ),
    ],
)
def test_wrong_use_names_the_value(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]
