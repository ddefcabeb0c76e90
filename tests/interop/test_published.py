"""Both published networks come in from every kind of file, and give TensorFlow's probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convlstm_fish.interop.keras import KerasImport, import_keras
from convlstm_fish.models import upbeat_snowflake, visionary_serenity

# Keras's own, on its torch backend with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

NETWORKS = {"visionary-serenity": visionary_serenity, "upbeat-snowflake-91": upbeat_snowflake}
NOISE_FRAMES = 120


def clip(recipe: dict[str, Any], frames: list[np.ndarray]) -> torch.Tensor:
    """(30, 4, 120, 160) as reference_probabilities.json and make_tensorflow_probabilities.py describe it."""
    if "seed" in recipe:
        raw = np.random.PCG64(recipe["seed"]).random_raw(NOISE_FRAMES * 120 * 160).reshape(NOISE_FRAMES, 120, 160)
        video = np.where((raw >> 32 & 0xFF) < recipe["share"], raw >> 56, 0).astype(np.uint8)
    else:
        video = np.stack([frames[index] for index in recipe.get("indices", recipe.get("frame_indices"))])
        video = video[:, ::-1] if "H" in (recipe["flip"] or "") else video
        video = video[:, :, ::-1] if "W" in (recipe["flip"] or "") else video
    return torch.from_numpy(video.astype(np.float32) / 255).reshape(30, 4, 120, 160)


@pytest.fixture(scope="module")
def published(shared: Path) -> Path:
    return shared / "published"


@pytest.fixture(scope="module")
def savedmodels(published: Path) -> dict[str, KerasImport]:
    return {name: import_keras(published / "checkpoints" / name) for name in NETWORKS}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("clips", ["given", "ours"])
def test_probabilities_are_tensorflows(
    published: Path, savedmodels: dict[str, KerasImport], name: str, clips: str
) -> None:
    given = published / "reference_probabilities.json"
    path = given if clips == "given" else Path(__file__).with_name("tensorflow_probabilities.json")
    frames = [
        np.asarray(Image.open(published / f"frames/{i:05d}.png").convert("L").resize((160, 120), 0)) for i in range(11)
    ]
    recipes = [recipe for recipe in json.loads(path.read_text())["clips"] if name in recipe]
    assert len(recipes) >= 2
    network = savedmodels[name].network()
    for recipe in recipes:
        with torch.no_grad():
            probability = network(clip(recipe, frames)[None]).sigmoid().item()
        assert abs(probability - recipe[name]) < 1e-6, recipe


@pytest.mark.parametrize("name", NETWORKS)
def test_all_sources_agree(published: Path, savedmodels: dict[str, KerasImport], tmp_path: Path, name: str) -> None:
    from convlstm_fish.interop.keras_export import export_keras

    keras_file = export_keras(savedmodels[name].network(), tmp_path / "model.keras", (30, 120, 160))
    weights = export_keras(savedmodels[name].network(), tmp_path / "model.weights.h5")
    others = [
        import_keras(published / "weights" / f"{name}.npz"),
        import_keras(keras_file),
        import_keras(weights, recurrent_activation="hard_sigmoid"),
    ]
    for other in others:
        assert other.settings == savedmodels[name].settings
        for key, value in other.state_dict.items():
            if not key.endswith("num_batches_tracked"):
                assert torch.equal(value, savedmodels[name].state_dict[key]), key
    assert others[1].input_shape == savedmodels[name].input_shape == (30, 4, 120, 160)


@pytest.mark.parametrize("name", NETWORKS)
def test_settings_are_those_of_the_models_in_this_package(savedmodels: dict[str, KerasImport], name: str) -> None:
    ours = NETWORKS[name]()
    imported = savedmodels[name].network()
    assert str(imported) == str(ours.eval())
    assert [type(module) for module in imported.modules()] == [type(module) for module in ours.modules()]
    ours.load_state_dict(savedmodels[name].state_dict)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_training_comes_along(savedmodels: dict[str, KerasImport], name: str) -> None:
    imported = savedmodels[name]
    assert imported.keras_version == "2.4.0"
    assert imported.loss == "bce"
    assert (imported.l1, imported.l2) == (0.0, 0.0)
    assert imported.notes == []
    adam = imported.optimizer
    assert adam is not None
    # Four epochs of 44,788 batches of 4 flipped clips.
    assert (adam.lr, adam.betas, adam.eps, adam.step) == (8e-5, (0.9, 0.999), 1e-7, 4 * 44788)
    assert adam.moments.keys() == dict(imported.network().named_parameters()).keys()
