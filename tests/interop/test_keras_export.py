"""A ClipClassifier goes out to Keras and comes back bit by bit, and Keras computes what it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convlstm_fish.errors import UserError
from convlstm_fish.interop.keras import import_keras
from convlstm_fish.models import ClipClassifier

keras = pytest.importorskip("keras")

# Keras's own, on its torch backend with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CLIP = (3, 11, 12)
NETWORKS: dict[str, dict[str, Any]] = {
    "plain": {"hidden_channels": [3], "batch_norm": False, "bias": False, "padding": "valid"},
    "published kind": {
        "hidden_channels": [3, 4],
        "bias": False,
        "padding": "valid",
        "recurrent_activation": "hard_sigmoid",
    },
    "everything": {
        "hidden_channels": [3, 4, 2],
        "kernel_size": [3, 2, 3],
        "padding": ["same", "same", "valid"],
        "recurrent_activation": "hard_sigmoid_v3",
        "pool_size": [2, 0, 2],
        "batch_norm": [False, True, True],
        "batch_norm_affine": True,
        "batch_norm_eps": 1e-4,
        "batch_norm_momentum": 0.1,
        "head": "flatten",
        "image_size": [11, 12],
        "dense_features": [5, 4],
        "num_classes": 3,
    },
    "average": {"hidden_channels": [2, 2], "pool_size": 0, "head": "avg", "num_classes": 2},
}


def network(name: str) -> ClipClassifier:
    torch.manual_seed(0)
    made = ClipClassifier(2, **NETWORKS[name], backend="reference").eval()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                torch.nn.init.normal_(module.weight)
                torch.nn.init.normal_(module.bias)
    return made


def both(classifier: ClipClassifier, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the network and of the Keras model for the same clips."""
    clips = torch.rand(2, CLIP[0], 2, *CLIP[1:])
    with torch.no_grad():
        logits = classifier(clips)
    ours = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
    return ours.numpy(), model.predict(clips.permute(0, 1, 3, 4, 2).numpy(), verbose=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip(tmp_path: Path, name: str) -> None:
    from convlstm_fish.interop.keras_export import build_keras_model, export_keras

    classifier = network(name)
    path = export_keras(classifier, tmp_path / "model.keras", CLIP)
    np.testing.assert_allclose(*both(classifier, keras.saving.load_model(path)), rtol=0, atol=1e-6)

    weights = export_keras(classifier, tmp_path / "model.weights.h5", CLIP)
    fresh = build_keras_model(ClipClassifier(2, **NETWORKS[name]), CLIP)
    fresh.load_weights(weights)
    np.testing.assert_allclose(*both(classifier, fresh), rtol=0, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.keras", "model.weights.h5"]

    imported = import_keras(path)
    back = imported.network("reference")
    assert str(back) == str(classifier)
    for key, value in classifier.state_dict().items():
        assert torch.equal(value, back.state_dict()[key]), key
    if name != "everything":  # whose pooling weights alone cannot tell
        defaults = {"padding": "same", "pool_size": None, "head": None, "recurrent_activation": "sigmoid"}
        again = import_keras(weights, **{key: NETWORKS[name].get(key, value) for key, value in defaults.items()})
        assert again.settings == imported.settings
        for key, value in imported.state_dict.items():
            assert torch.equal(value, again.state_dict[key]), key


def test_logits(tmp_path: Path) -> None:
    from convlstm_fish.interop.keras_export import build_keras_model

    classifier = network("plain")
    probabilities, logits = both(classifier, build_keras_model(classifier, CLIP, probabilities=False))
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_what_keras_does_not_have(tmp_path: Path) -> None:
    from convlstm_fish.interop.keras_export import build_keras_model, export_keras

    with pytest.raises(UserError, match="peepholes"):
        build_keras_model(ClipClassifier(1, (2,), peephole="channel"))
    with pytest.raises(UserError, match="stem"):
        build_keras_model(ClipClassifier(1, (2,), stem_channels=(3,)))
    with pytest.raises(UserError, match=r"padding=\(2, 2\)"):
        build_keras_model(ClipClassifier(1, (2,), padding=2))
    with pytest.raises(UserError, match="not that of the network with the head 'flatten'"):
        build_keras_model(network("everything"), (3, 30, 30))
    with pytest.raises(UserError, match="H and W known"):
        build_keras_model(network("plain"), (3, None, None))
    with pytest.raises(UserError, match=r"must end in \.weights\.h5 or \.keras"):
        export_keras(network("plain"), tmp_path / "model.h5")
    with pytest.raises(UserError, match="there is no folder"):
        export_keras(network("plain"), tmp_path / "absent" / "model.keras")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convlstm_fish.interop.keras_export import export_keras

    path = export_keras(network("plain"), tmp_path / "model.keras", CLIP)
    before = path.read_bytes()

    def full(self: Any, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(keras.Model, "save", full)
    with pytest.raises(OSError, match="No space left"):
        export_keras(network("published kind"), path, CLIP)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.keras"]
