"""Folders of images: what can be read is read exactly, and every other file is named."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from convlstm_fish.data import labels
from convlstm_fish.data.images import ImageFrames, numbered_files
from convlstm_fish.data.recording import Recording
from convlstm_fish.errors import UserError

FRAMES = np.random.default_rng(0).integers(0, 256, (12, 5, 7), dtype=np.uint8)


def fill(folder: Path, frames: np.ndarray = FRAMES, name: str = "{:05d}.png") -> Path:
    folder.mkdir(parents=True)
    for k, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(k))
    return folder


def png(width: int, height: int, depth: int = 8, colour: int = 0, body: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def test_a_folder_of_images(tmp_path: Path) -> None:
    recording = Recording.open(fill(tmp_path / "tank", name="fish_{}.png"))
    assert (recording.name, recording.fps, len(recording), recording.size) == ("tank", 30, 12, (5, 7))
    frames = recording.frames
    np.testing.assert_array_equal(frames[3], FRAMES[3])
    np.testing.assert_array_equal(frames[-1], FRAMES[-1])
    np.testing.assert_array_equal(frames[2:9:3], FRAMES[2:9:3])
    np.testing.assert_array_equal(frames[np.array([4, 0, 11])], FRAMES[[4, 0, 11]])
    np.testing.assert_array_equal(recording.cut(slice(1, 4), slice(1, None, 2)), FRAMES[1:4, 1::2])
    with pytest.raises(IndexError):
        frames[12]
    np.testing.assert_array_equal(np.delete(recording.motion, [9, 10]), np.delete(labels.motion(FRAMES), [9, 10]))
    recording.verify()
    again = pickle.loads(pickle.dumps(recording))
    np.testing.assert_array_equal(again.frames[0:12], FRAMES)


def test_the_published_layout(tmp_path: Path) -> None:
    parts = {"train": (0, 6), "validation": (6, 8), "test": (8, 12)}
    for split, (start, stop) in parts.items():
        fill(tmp_path / "fish" / split, FRAMES[start:stop])
    motion = Recording.open(tmp_path / "fish").motion
    for split, (start, stop) in parts.items():
        np.testing.assert_array_equal(motion[start:stop], labels.motion(FRAMES[start:stop]))
        (tmp_path / "fish/targets" / split).mkdir(parents=True)
        np.save(tmp_path / "fish/targets" / split / "Y_tilde.npy", labels.motion(FRAMES[start:stop]))
    recording = Recording.open(tmp_path / "fish")
    assert recording.splits == parts
    np.testing.assert_array_equal(recording.frames[0:12], FRAMES)
    np.testing.assert_array_equal(recording.motion, motion)
    # The published files end each split with 0; the whole recording goes on there.
    np.testing.assert_array_equal(recording.with_splits((1, 0, 0)).motion, labels.motion(FRAMES))
    np.save(tmp_path / "fish/targets/test/Y_tilde.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"Y_tilde.npy: holds float64 \(3,\), expected a number for each of the 4"):
        Recording.open(tmp_path / "fish")
    (tmp_path / "fish/targets/test/Y_tilde.npy").write_text("x")
    with pytest.raises(UserError, match=r"Y_tilde.npy: is not a readable array"):
        Recording.open(tmp_path / "fish")


def test_the_published_frames_are_grey_images_of_their_size(shared: Path) -> None:
    recording = Recording.open(shared / "published/frames")
    assert recording.frames.shape == (11, 240, 320)
    targets = np.load(shared / "published/targets/train/Y_tilde.npy")
    np.testing.assert_allclose(recording.with_splits((1, 0, 0)).motion[:10], targets[:10], rtol=0, atol=1e-10)


def test_colour_palette_bits_and_jpeg_are_read_as_grey(tmp_path: Path) -> None:
    grey = FRAMES[0]
    colour = Image.fromarray(np.stack([grey] * 3, axis=2))
    palette = Image.fromarray(grey // 64, mode=None).convert("L")
    palette.putpalette([c for v in (0, 80, 160, 240) for c in (v, v, v)])
    bits = Image.fromarray(grey > 127)
    for k, image in enumerate((colour, palette, bits)):
        (tmp_path / str(k)).mkdir()
        image.save(tmp_path / str(k) / "0.png")
    np.testing.assert_array_equal(Recording.open(tmp_path / "0").frames[0], grey)
    np.testing.assert_array_equal(Recording.open(tmp_path / "1").frames[0], grey // 64 * 80)
    np.testing.assert_array_equal(Recording.open(tmp_path / "2").frames[0], (grey > 127) * np.uint8(255))
    smooth = cv2.resize(grey, (40, 30))
    (tmp_path / "jpeg").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me": ignored, so that all frames keep the size the camera stored
    Image.fromarray(smooth).save(tmp_path / "jpeg/0.jpg", quality=95, exif=exif)
    assert np.abs(Recording.open(tmp_path / "jpeg").frames[0].astype(int) - smooth).max() < 12


def rewrite(data: bytes, how: str) -> bytes:
    image = Image.open(io.BytesIO(data))
    out = io.BytesIO()
    if how == "jpeg":
        image.save(out, "JPEG")
    elif how == "alpha":
        image.convert("LA").save(out, "PNG")
    elif how == "transparent palette":
        image.convert("P").save(out, "PNG", transparency=0)
    else:
        Image.fromarray(np.asarray(image).astype(np.uint16) + 1000).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "frame 4, .*00004.png: cannot be decoded"),
        (lambda data: data[:-12], "frame 4, .*00004.png: cannot be decoded"),
        (lambda data: b"", r"00004.png: is not a PNG file"),
        (lambda data: b"<html>", r"00004.png: is not a PNG file"),
        (lambda data: rewrite(data, "jpeg"), r"00004.png: is not a PNG file, whatever its name says"),
        (lambda data: rewrite(data, "alpha"), r"00004.png: has an alpha channel"),
        (lambda data: rewrite(data, "transparent palette"), r"00004.png: has transparent pixels"),
        (lambda data: rewrite(data, "16 bit"), r"00004.png: has 16-bit samples"),
        (lambda data: png(7, 6, body=bytes(6 * 8)), r"frame 4, .*00004.png: is 6x7, the first image is 5x7"),
        (lambda data: png(100_000, 100_000), r"00004.png: is 100000x100000, the limit is"),
        (lambda data: png(0, 0), r"00004.png: is 0x0"),
    ],
)
def test_a_file_that_is_off_is_named(tmp_path: Path, damage: object, message: str) -> None:
    folder = fill(tmp_path / "tank")
    path = folder / "00004.png"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    recording = Recording.open(folder)
    np.testing.assert_array_equal(recording.frames[0:4], FRAMES[:4])
    with pytest.raises(UserError, match=message) as caught:
        recording.verify()
    assert "\n" not in str(caught.value)


def test_damaged_pixels_do_not_pass(tmp_path: Path) -> None:
    """PNG has CRCs: of bits flipped in the file, none gives other pixels."""
    folder = fill(tmp_path / "tank", FRAMES[:1])
    good = (folder / "00000.png").read_bytes()
    frames = ImageFrames(numbered_files(folder), folder)
    rng = np.random.default_rng(1)
    refused = 0
    for at, bit in zip(rng.integers(0, len(good), 60), rng.integers(0, 8, 60)):
        data = bytearray(good)
        data[at] ^= 1 << int(bit)
        (folder / "00000.png").write_bytes(data)
        try:
            np.testing.assert_array_equal(frames[0], FRAMES[0])
        except UserError:
            refused += 1
    assert refused > 40


def test_a_jpeg_that_is_cut_off_or_something_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    out = io.BytesIO()
    Image.fromarray(cv2.resize(FRAMES[0], (40, 30))).save(out, "JPEG")
    data = out.getvalue()
    path = tmp_path / "a/0.jpg"
    for bad, message in [
        (data[:-20], r"0.jpg: is cut off"),
        (b"GIF89a" + bytes(99), "is not a JPEG file"),
        (b"\xff\xd8\xff\xe0\x00\x04ab\xff\xd9", "no frame header"),
        (b"\xff\xd8\xff\xc0\x00\x0b\x08\xff\xff\xff\xff" + bytes(9) + b"\xff\xd9", "is 65535x65535"),
    ]:
        path.write_bytes(bad)
        with pytest.raises(UserError, match=message):
            Recording.open(tmp_path / "a")


def test_links_fifos_and_folders_in_the_place_of_an_image(tmp_path: Path) -> None:
    folder = fill(tmp_path / "tank", FRAMES[:3])
    outside = tmp_path / "secret.png"
    (folder / "00001.png").rename(outside)
    (folder / "00001.png").symlink_to(outside)
    with pytest.raises(UserError, match=r"00001.png: leads out of the folder"):
        Recording.open(folder).verify()
    (folder / "00001.png").unlink()
    (folder / "00001.png").symlink_to(folder / "00002.png")  # inside is fine
    Recording.open(folder).verify()
    (folder / "00001.png").unlink()
    os.mkfifo(folder / "00001.png")
    with pytest.raises(UserError, match="is not a regular file"):
        Recording.open(folder).verify()
    (folder / "00001.png").unlink()
    (folder / "00001.png").mkdir()
    with pytest.raises(UserError, match="is not a regular file"):
        Recording.open(folder).verify()
    (folder / "00001.png").rmdir()
    (folder / "00001.png").symlink_to(folder / "gone.png")
    with pytest.raises(UserError, match="no such file"):
        Recording.open(folder).verify()


def test_the_numbers_of_the_images(tmp_path: Path) -> None:
    folder = fill(tmp_path / "tank", FRAMES[:6], "a_{}.png")
    for name in ("Thumbs.db", "notes.txt", ".hidden.png"):
        (folder / name).touch()
    assert [p.name for p in numbered_files(folder)] == [f"a_{k}.png" for k in range(6)]
    # The order is that of the numbers, not of the names, and may start anywhere.
    (folder / "a_0.png").unlink()
    for k in range(6, 12):
        (folder / f"a_{k}.png").write_bytes((folder / "a_1.png").read_bytes())
    assert [p.name for p in numbered_files(folder)] == [f"a_{k}.png" for k in range(1, 12)]

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            numbered_files(folder)

    (folder / "a_01.png").touch()
    refused("are both number 1")
    (folder / "a_01.png").unlink()
    (folder / "a_5.png").unlink()
    refused(r"image number 5 is missing \(between a_4.png and a_6.png\)")
    (folder / "a_5.jpg").touch()
    refused(r"several series of images: a_\* \(JPEG\), a_\* \(PNG\)")
    (folder / "a_5.jpg").unlink()
    (folder / "b_5.png").touch()
    refused(r"several series of images: a_\* \(PNG\), b_\* \(PNG\)")
    (folder / "cover.png").touch()
    refused(r"cover.png: its name does not end with a number")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images named by number"):
        Recording.open(tmp_path / "empty")
    (folder / os.fsdecode(b"\xff9.png")).touch()
    (folder / "cover.png").unlink()
    refused("is not valid UTF-8")


@pytest.mark.parametrize("name", ["fische_ü_{}.png", "zwei\nzeilen{}.png", "100%d_{}.png"])
def test_unusual_names_are_fine(tmp_path: Path, name: str) -> None:
    np.testing.assert_array_equal(Recording.open(fill(tmp_path / "tänk", name=name)).frames[0:12], FRAMES)
