"""ConvLSTM against torch.nn.LSTM, which it is pixel by pixel where kernels are 1x1, and its own promises."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from convlstm_fish import ConvLSTM

N, T, C, HIDDEN, SIZE = 4, 6, 3, 5, (2, 3)
LENGTHS = [3, 6, 1, 4]


def twins(**options: Any) -> tuple[ConvLSTM, nn.LSTM]:
    """A 1x1 ConvLSTM and the nn.LSTM with the same weights."""
    torch.manual_seed(0)
    layer = ConvLSTM(C, HIDDEN, 1, options.pop("num_layers", 1), dtype=torch.float64, **options)
    lstm = nn.LSTM(
        C,
        HIDDEN,
        layer.num_layers,
        batch_first=layer.batch_first,
        bidirectional=layer.bidirectional,
        dtype=torch.float64,
    )
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
        directions = 2 if layer.bidirectional else 1
        for k, cell in enumerate(layer.cells):
            suffix = f"_l{k // directions}" + ("_reverse" if k % directions else "")
            getattr(lstm, "weight_ih" + suffix).copy_(cell.weight_ih.flatten(1))
            getattr(lstm, "weight_hh" + suffix).copy_(cell.weight_hh.flatten(1))
            getattr(lstm, "bias_ih" + suffix).copy_(cell.bias)
            getattr(lstm, "bias_hh" + suffix).zero_()
    return layer, lstm


def to_pixels(x: Tensor) -> Tensor:
    """(N, T, C, H, W) with each pixel as a clip of its own, (N * H * W, T, C)."""
    return x.permute(0, 3, 4, 1, 2).flatten(0, 2)


def pixels_of_states(state: Tensor) -> Tensor:
    """(layers, N, C, H, W) to (layers, N * H * W, C)."""
    return state.permute(0, 1, 3, 4, 2).flatten(1, 3)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("with_state", [False, True])
def test_is_torch_lstm_at_every_pixel(
    num_layers: int, bidirectional: bool, lengths: list[int] | None, with_state: bool
) -> None:
    layer, lstm = twins(num_layers=num_layers, bidirectional=bidirectional)
    x = torch.randn(N, T, C, *SIZE, dtype=torch.float64).requires_grad_()
    hx = None
    if with_state:
        shape = (len(layer.cells), N, HIDDEN, *SIZE)
        hx = (
            torch.randn(shape, dtype=torch.float64).requires_grad_(),
            torch.randn(shape, dtype=torch.float64).requires_grad_(),
        )
    output, (h_n, c_n) = layer(x, hx, None if lengths is None else torch.tensor(lengths))
    found = (to_pixels(output), pixels_of_states(h_n), pixels_of_states(c_n))

    flat = to_pixels(x)
    flat_hx = None if hx is None else (pixels_of_states(hx[0]).contiguous(), pixels_of_states(hx[1]).contiguous())
    if lengths is None:
        out, states = lstm(flat, flat_hx)
    else:
        each = torch.tensor(lengths).repeat_interleave(SIZE[0] * SIZE[1])
        packed = pack_padded_sequence(flat, each, batch_first=True, enforce_sorted=False)
        packed_out, states = lstm(packed, flat_hx)
        out = pad_packed_sequence(packed_out, batch_first=True, total_length=T)[0]
    expected = (out, *states)

    cotangents = [torch.randn_like(y) for y in expected]
    for one, other in zip(found, expected):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
    inputs = [x, *(hx or ())]
    grads = torch.autograd.grad(sum((y * g).sum() for y, g in zip(found, cotangents)), [*inputs, *layer.parameters()])
    judged = torch.autograd.grad(
        sum((y * g).sum() for y, g in zip(expected, cotangents)), [*inputs, *lstm.parameters()]
    )
    by_name = dict(zip([name for name, _ in lstm.named_parameters()], judged[len(inputs) :]))
    expected_grads = list(judged[: len(inputs)])
    for k in range(len(layer.cells)):
        suffix = f"_l{k // (1 + bidirectional)}" + ("_reverse" if bidirectional and k % 2 else "")
        expected_grads += [by_name[name + suffix] for name in ("weight_ih", "weight_hh", "bias_ih")]
    for one, other in zip(grads, expected_grads):
        assert torch.allclose(one.flatten(), other.flatten(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_packed_sequence_goes_in_and_out(bidirectional: bool) -> None:
    layer, lstm = twins(num_layers=2, bidirectional=bidirectional)
    clips = [torch.randn(length, C, 1, 1, dtype=torch.float64) for length in LENGTHS]
    packed = nn.utils.rnn.pack_sequence(clips, enforce_sorted=False)
    output, (h_n, c_n) = layer(packed)
    expected, (h, c) = lstm(nn.utils.rnn.pack_sequence([clip.flatten(1) for clip in clips], enforce_sorted=False))
    assert isinstance(output, PackedSequence)
    assert torch.equal(output.batch_sizes, expected.batch_sizes)
    for one, other in ((output.data, expected.data), (h_n, h), (c_n, c)):
        assert torch.allclose(one.flatten(), other.flatten(), rtol=1e-10, atol=1e-10)
    for one, other in zip(nn.utils.rnn.unpack_sequence(output), nn.utils.rnn.unpack_sequence(expected)):
        assert torch.allclose(one.flatten(), other.flatten(), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="PackedSequence has its own lengths"):
        layer(packed, None, torch.tensor(LENGTHS))


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_list_of_clips_goes_in_and_out(batch_first: bool) -> None:
    layer, _ = twins(num_layers=2, bidirectional=True, batch_first=batch_first)
    clips = [torch.randn(length, C, *SIZE, dtype=torch.float64).requires_grad_() for length in LENGTHS]
    hx = tuple(torch.randn(4, N, HIDDEN, *SIZE, dtype=torch.float64) for _ in range(2))
    outputs, (h_n, c_n) = layer(clips, hx)
    assert [len(output) for output in outputs] == LENGTHS
    for n, clip in enumerate(clips):
        alone, (h, c) = layer(clip, (hx[0][:, n], hx[1][:, n]))
        for one, other in ((outputs[n], alone), (h_n[:, n], h), (c_n[:, n], c)):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)
        (grad,) = torch.autograd.grad(outputs[n].square().sum(), clip, retain_graph=True)
        assert torch.allclose(grad, torch.autograd.grad(alone.square().sum(), clip)[0], rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="a list of clips has its own lengths"):
        layer(clips, None, LENGTHS)
    layer.return_sequences = False
    last, (h_n, _) = layer(clips)
    assert torch.equal(last, torch.cat([*h_n[-2:]], dim=1))


def test_a_packed_sequence_takes_states_in_the_order_of_the_clips() -> None:
    layer, _ = twins(bidirectional=True)
    x = torch.randn(N, T, C, *SIZE, dtype=torch.float64)
    hx = tuple(torch.randn(2, N, HIDDEN, *SIZE, dtype=torch.float64) for _ in range(2))
    packed = pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
    output, states = layer(packed, hx)
    expected, expected_states = layer(x, hx, LENGTHS)  # lengths may be a list
    for one, other in zip((pad_packed_sequence(output, batch_first=True)[0], *states), (expected, *expected_states)):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def test_time_first() -> None:
    layer, lstm = twins(batch_first=False, num_layers=2)
    x = torch.randn(T, N, C, 1, 1, dtype=torch.float64)
    output, (h_n, _) = layer(x)
    assert torch.allclose(output.flatten(2), lstm(x.flatten(2))[0], rtol=1e-10, atol=1e-10)
    assert h_n.shape == (2, N, HIDDEN, 1, 1), "states keep their order"
    packed = nn.utils.rnn.pack_sequence([x[:k, n] for n, k in enumerate(LENGTHS)], enforce_sorted=False)
    masked, _ = layer(x, None, torch.tensor(LENGTHS))
    assert torch.allclose(layer(packed)[0].data.sum(), masked.sum())


def test_one_clip_without_a_batch() -> None:
    layer = ConvLSTM(C, HIDDEN, 3, 2, bidirectional=True)
    x = torch.randn(1, T, C, *SIZE)
    hx = (torch.randn(4, 1, HIDDEN, *SIZE), torch.randn(4, 1, HIDDEN, *SIZE))
    output, (h_n, c_n) = layer(x[0], (hx[0][:, 0], hx[1][:, 0]))
    expected, (h, c) = layer(x, hx)
    for one, other in ((output, expected[0]), (h_n, h[:, 0]), (c_n, c[:, 0])):
        assert torch.equal(one, other)
    layer.return_sequences = False
    assert torch.equal(layer(x[0])[0], layer(x)[0][0])
    layer.batch_first = False
    assert torch.equal(layer(x[0])[0], layer(x.transpose(0, 1))[0][0])
    with pytest.raises(ValueError, match="lengths needs a batch"):
        layer(x[0], None, torch.tensor([2]))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_without_sequences_the_output_is_the_last_state(bidirectional: bool) -> None:
    layer = ConvLSTM(C, HIDDEN, 3, 2, bidirectional=bidirectional, return_sequences=False)
    x, lengths = torch.randn(N, T, C, *SIZE), torch.tensor(LENGTHS)
    output, (h_n, _) = layer(x, None, lengths)
    assert output.shape == (N, HIDDEN * (1 + bidirectional), *SIZE)
    assert torch.equal(output, torch.cat([*h_n[-1 - bidirectional :]], dim=1))
    layer.return_sequences = True
    sequence, _ = layer(x, None, lengths)
    last = sequence[torch.arange(N), lengths - 1, :HIDDEN]
    assert torch.equal(output[:, :HIDDEN], last), "forwards: the last valid step"
    if bidirectional:
        assert torch.equal(output[:, HIDDEN:], sequence[:, 0, HIDDEN:]), "backwards: the first step"


@pytest.mark.parametrize(("kernel", "size"), [((3,), (7,)), ((3, 2), (4, 5)), ((1, 3, 2), (3, 4, 2))])
def test_one_two_and_three_dimensions(kernel: tuple[int, ...], size: tuple[int, ...]) -> None:
    layer = ConvLSTM(C, HIDDEN, kernel, bidirectional=True, peephole=size)
    output, (h_n, c_n) = layer(torch.randn(N, T, C, *size), None, torch.tensor(LENGTHS))
    assert output.shape == (N, T, 2 * HIDDEN, *size)
    assert h_n.shape == c_n.shape == (2, N, HIDDEN, *size)
    same = ConvLSTM(C, HIDDEN, 3, spatial_dims=len(size))
    assert same.cells[0].kernel_size == (3,) * len(size)
    assert same(torch.randn(N, T, C, *size))[0].shape == (N, T, HIDDEN, *size)


def test_a_clip_in_pieces_is_the_whole_clip() -> None:
    layer = ConvLSTM(C, HIDDEN, 3, 2, peephole="channel", dtype=torch.float64)
    x = torch.randn(N, T, C, *SIZE, dtype=torch.float64)
    whole, states = layer(x)
    carried, outputs = None, []
    for piece in x.split([1, 3, 2], dim=1):
        output, carried = layer(piece, carried)
        outputs.append(output)
    for one, other in zip((torch.cat(outputs, 1), *carried), (whole, *states)):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_dropout_has_one_mask_per_clip_shared_by_all_steps() -> None:
    torch.manual_seed(0)
    rate = 0.3
    layer = ConvLSTM(4, 2, 1, dropout=rate)
    seen: list[Tensor] = []
    real = layer.cells[0].sequence

    def spy(x: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(x)
        return real(x, *args, **options)

    layer.cells[0].sequence = spy  # type: ignore[method-assign]
    layer(torch.ones(50, 5, 4, 6, 7))
    dropped = seen[0]
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped)), "all steps share the mask"
    values = dropped[:, 0]
    assert set(values.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - rate)))}
    assert abs(values.eq(0).double().mean().item() - rate) < 0.02
    assert abs(values.mean().item() - 1.0) < 0.03, "scaled so that the mean stays"
    assert not torch.equal(values[0], values[1]), "each clip has its own"
    layer(torch.ones(50, 5, 4, 6, 7))
    assert not torch.equal(seen[0], seen[1]), "each call has its own"
    layer.eval()
    layer(torch.ones(2, 5, 4, 6, 7))
    assert seen[2].eq(1).all()


def test_recurrent_dropout_masks_h_alike_at_all_steps() -> None:
    """Nothing but the mask of h separates the clips: with identity kernels it shows in z of every later step."""
    torch.manual_seed(0)
    layer = ConvLSTM(1, 4, 1, recurrent_dropout=0.5, dtype=torch.float64)
    masks: list[Tensor] = []
    real = layer.cells[0].sequence

    def spy(x: Tensor, *args: Any, **options: Any) -> Any:
        masks.append(options["recurrent_mask"])
        return real(x, *args, **options)

    layer.cells[0].sequence = spy  # type: ignore[method-assign]
    x = torch.randn(40, 5, 1, 6, 7, dtype=torch.float64)
    output, _ = layer(x)
    mask = masks[0]
    assert mask.shape == (40, 4, 6, 7)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert abs(mask.mean().item() - 1.0) < 0.05
    h = torch.zeros(40, 4, 6, 7, dtype=torch.float64)
    c = h
    cell = layer.cells[0]
    for t in range(5):
        made = cell.gates(x[:, t], (h * mask, c))
        h, c = made["h"], made["c"]
        assert torch.allclose(output[:, t], h, rtol=1e-10, atol=1e-12)
    layer.eval()
    layer(x)
    assert masks[1] is None


def test_every_layer_and_direction_draws_its_own_input_mask() -> None:
    torch.manual_seed(0)
    layer = ConvLSTM(3, 3, 1, 2, dropout=0.5, bidirectional=True)
    seen: list[Tensor] = []
    for cell in layer.cells:

        def spy(x: Tensor, *args: Any, real: Any = cell.sequence, **options: Any) -> Any:
            seen.append(x[:, 0] == 0)
            return real(x, *args, **options)

        cell.sequence = spy  # type: ignore[method-assign]
    layer(torch.ones(2, 3, 3, 8, 8))
    assert [0.3 < dropped.double().mean() < 0.7 for dropped in seen] == [True] * 4
    assert not torch.equal(seen[0], seen[1])


def test_state_dict_is_flat_and_complete() -> None:
    layer = ConvLSTM(C, HIDDEN, 3, 2, bidirectional=True, peephole=SIZE, norm="layer")
    names = [
        "bias",
        "norm_c",
        "norm_c_bias",
        "norm_hh",
        "norm_ih",
        "weight_cf",
        "weight_ci",
        "weight_co",
        "weight_hh",
        "weight_ih",
    ]
    assert sorted(layer.state_dict()) == [f"cells.{k}.{name}" for k in range(4) for name in names]
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = ConvLSTM(C, HIDDEN, 3, 2, bidirectional=True, peephole=SIZE, norm="layer", backend="reference")
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(N, T, C, *SIZE)
    assert torch.equal(layer(x)[0], other(x)[0])


def test_peepholes_are_trained_moved_and_saved() -> None:
    layer = ConvLSTM(C, HIDDEN, 3, peephole="channel")
    before = copy.deepcopy(layer.state_dict())
    optimiser = torch.optim.SGD(layer.parameters(), 0.1)
    layer(torch.randn(N, T, C, *SIZE))[0].square().sum().backward()
    optimiser.step()
    for name in ("weight_ci", "weight_cf", "weight_co"):
        assert not torch.equal(layer.state_dict()[f"cells.0.{name}"], before[f"cells.0.{name}"])
    layer.double()
    assert layer.cells[0].weight_ci.dtype == torch.float64
    layer.to("meta")
    assert layer.cells[0].weight_co.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"recurrent_dropout": -0.1}, r"recurrent_dropout must lie in \[0, 1\), got -0.1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1 step, got 0"),
        ({"detach_every": 0}, "detach_every must be at least 1 step, got 0"),
        ({"num_layers": 2, "padding": "valid"}, "num_layers=2 needs layers that keep the image size"),
        ({"num_layers": 2, "stride": 2}, r"stride=2, padding='same' does not"),
        ({"kernel_size": (3, 3, 3, 3)}, "1, 2 or 3 spatial dimensions, got 4"),
        ({"backend": "gpu"}, "backend must be one of .* got 'gpu'"),
        ({"norm": "batch"}, 'norm must be None, "layer" or "group", got \'batch\''),
        ({"norm": "group", "norm_groups": 2}, "norm_groups must divide hidden_channels=5"),
        ({"norm": "layer", "norm_groups": 5}, 'needs norm="group", got 5'),
        ({"peephole": "pixel"}, "peephole must be None, \"channel\" or an image size, got 'pixel'"),
        ({"peephole": (4,)}, r"peephole must be an int >= 1 or 2 of them, got \(4,\)"),
    ],
    ids=str,
)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvLSTM(**{"in_channels": C, "hidden_channels": HIDDEN, "kernel_size": 3} | options)


def test_refuses_inputs() -> None:
    layer = ConvLSTM(C, HIDDEN, 3, 2)
    with pytest.raises(ValueError, match=r"input must be \(N, T, 3, \*spatial\) .* got \(2, 3, 4\)"):
        layer(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"hx must be .* each \(2, N, 5, \*out\) for num_layers=2"):
        layer(torch.zeros(N, T, C, *SIZE), (torch.zeros(1, N, HIDDEN, *SIZE), torch.zeros(1, N, HIDDEN, *SIZE)))
    with pytest.raises(ValueError, match=r"in_channels=3 channels in dimension 2 .* got \(4, 6, 4, 2, 3\)"):
        layer(torch.zeros(N, T, C + 1, *SIZE))
    with pytest.raises(ValueError, match=r"in_channels=3 channels in dimension 2 and 2 spatial .* got \(1, 2, 3, 4\)"):
        layer([torch.zeros(2, 3, 4)])
    with pytest.raises(ValueError, match=r"lengths must be a whole-number tensor"):
        layer(torch.zeros(N, T, C, *SIZE), None, [1.5, 2.0, 3.0, 4.0])


def test_says_what_it_is() -> None:
    layer = ConvLSTM(3, 8, 5, 2, bidirectional=True, peephole="channel", dropout=0.1, bias=False, checkpoint_every=4)
    text = repr(layer)
    for part in ("3, 8, num_layers=2", "bidirectional=True", "dropout=0.1", "checkpoint_every=4", "peephole='channel'"):
        assert part in text
    assert "kernel_size=(5, 5)" in text
    assert "bias=False" in text


def test_layers_have_one_width() -> None:
    with pytest.raises(TypeError, match=r"hidden_channels must be one int, the same for every layer, got \[8, 16\]"):
        ConvLSTM(3, [8, 16], 3, num_layers=2)  # type: ignore[arg-type]
