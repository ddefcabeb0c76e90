"""What a ClipClassifier cannot do the same way is refused with the layer's name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest

from convlstm_fish.errors import UserError
from convlstm_fish.interop.keras import import_keras

pytestmark = pytest.mark.usefixtures("hdf5_read_once")

Edit = Callable[..., Path]


def layer(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The entry of the layer of that name."""
    return next(entry for entry in config["config"]["layers"] if entry["config"]["name"] == name)


def setting(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a layer's, or of the wrapped layer's, options."""

    def change(config: dict[str, Any]) -> None:
        options = layer(config, name)["config"]
        options.get("layer", {"config": options})["config"].update(changes)

    return change


LAMBDA = {"class_name": "__lambda__", "config": {"value": "4wAAAAAAAAAAAA=="}}
CUSTOM = {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"}
REFUSED = [
    ("functional", setting("second", activation="relu"), "'second' .ConvLSTM2D. has activation='relu', only 'tanh'"),
    ("functional", setting("second", strides=[2, 2]), r"'second' .* has strides=\[2, 2\]"),
    ("functional", setting("second", dilation_rate=[2, 1]), r"'second' .* has dilation_rate=\[2, 1\]"),
    ("functional", setting("second", data_format="channels_first"), "'second' .* has data_format='channels_first'"),
    ("functional", setting("second", go_backwards=True), "'second' .* has go_backwards=True"),
    ("functional", setting("second", stateful=True), "'second' .* has stateful=True"),
    ("functional", setting("second", return_state=True), "'second' .* has return_state=True"),
    ("functional", setting("second", padding="causal"), "'second' .* has padding='causal'"),
    ("functional", setting("second", recurrent_activation="relu"), "'second' .*has another recurrent_activation"),
    (
        "functional",
        setting("second", recurrent_activation=LAMBDA),
        "'second' .*custom recurrent_activation '__lambda__'",
    ),
    ("functional", setting("second", activation=CUSTOM), "'second' .* has activation={'module': 'os'"),
    ("functional", setting("second", return_sequences=True), "'second' .* has return_sequences=True before"),
    ("functional", setting("second", filters=7), r"'second' .* has a kernel of shape .* needs \[3, 3, 2, 28\]"),
    ("functional", setting("second", kernel_size=[5, 3]), r"'second' .* has a kernel of shape \[3, 3, 2, 12\]"),
    ("functional", setting("second", kernel_size="big"), "'second' .* has kernel_size='big'"),
    ("functional", setting("conv_lstm2d", return_sequences=False), "'conv_lstm2d' .* has return_sequences=False, but"),
    ("functional", setting("time_distributed", strides=[1, 1]), r"'time_distributed' .*strides=\[1, 1\]"),
    ("functional", setting("time_distributed", pool_size=[2, 3]), r"'time_distributed' .*pool_size=\[2, 3\]"),
    (
        "functional",
        setting("time_distributed", padding="same"),
        "'time_distributed' .* padding='same' on .9, 10. images",
    ),
    ("functional", setting("time_distributed_1", axis=1), "'time_distributed_1' .BatchNormalization. has axis=1"),
    ("functional", setting("dense", activation="tanh"), "'dense' .* 1 outputs with activation 'tanh', only sigmoid"),
    (
        "functional",
        setting("dense", units=2),
        r"'dense' .* kernel of shape \[3, 1\], its place in the model needs \[3, 2\]",
    ),
    ("sequential", setting("max_pooling3d", pool_size=[2, 2, 2]), "'max_pooling3d' .* pools over time"),
    ("sequential", setting("batch_normalization_2", axis=1), "'batch_normalization_2' .* has axis=1"),
    ("sequential", setting("batch_normalization_2", epsilon=0.1), "'batch_normalization_2' .* another epsilon"),
    (
        "sequential",
        setting("dense_1", activation="elu"),
        "'dense_1' .* 'elu', hidden Dense layers can only have 'relu'",
    ),
    ("sequential", setting("activation", activation="sigmoid"), "'dense_2' .* 3 outputs with activation 'sigmoid'"),
    ("sequential", setting("activation", activation=LAMBDA), "'activation' .*custom activation '__lambda__'"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_layers_that_cannot_be_represented(edited: Edit, name: str, change: Any, message: str) -> None:
    import_keras(edited(name, lambda config: None))
    with pytest.raises(UserError, match=message) as refusal:
        import_keras(edited(name, change))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "kind", ["Lambda", "Bidirectional", "Functional", "Conv3D", "AveragePooling2D", "Rescaling", "set_head", "run"]
)
def test_unknown_layers(edited: Edit, kind: str) -> None:
    path = edited("functional", lambda config: layer(config, "global_max_pooling2d").update(class_name=kind))
    with pytest.raises(UserError, match=f"layer 'global_max_pooling2d' .{kind}. cannot be represented"):
        import_keras(path)


def test_layer_inside_time_distributed(edited: Edit) -> None:
    def wrap(config: dict[str, Any]) -> None:
        layer(config, "time_distributed")["config"]["layer"]["class_name"] = "Flatten"

    with pytest.raises(UserError, match=r"layer 'time_distributed' .Flatten. .*inside TimeDistributed"):
        import_keras(edited("functional", wrap))


def tensor(name: str) -> dict[str, Any]:
    return {
        "class_name": "__keras_tensor__",
        "config": {"shape": [], "dtype": "float32", "keras_history": [name, 0, 0]},
    }


def test_models_that_are_no_chain(edited: Edit) -> None:
    def skip(config: dict[str, Any]) -> None:
        layer(config, "second")["inbound_nodes"][0]["args"] = [tensor("input_layer")]

    def two(config: dict[str, Any]) -> None:
        layer(config, "second")["inbound_nodes"][0]["kwargs"]["initial_state"] = [tensor("conv_lstm2d")]

    def loop(config: dict[str, Any]) -> None:
        layer(config, "second")["inbound_nodes"][0]["args"] = [tensor("dense")]

    with pytest.raises(UserError, match="layers 'conv_lstm2d' and 'second' have the same input"):
        import_keras(edited("functional", skip))
    with pytest.raises(UserError, match=r"layer 'second' .* has 2 inputs"):
        import_keras(edited("functional", two))
    with pytest.raises(UserError, match="layer 'second' is not on the way"):
        import_keras(edited("functional", loop))


def test_subclassed_models(edited: Edit) -> None:
    with pytest.raises(UserError, match="the model is a 'Evil', only Sequential and functional"):
        import_keras(edited("functional", lambda config: config.update(class_name="Evil")))


def test_input_that_is_no_clip(edited: Edit) -> None:
    def flat(config: dict[str, Any]) -> None:
        layer(config, "input_layer")["config"]["batch_shape"] = [None, 9, 10, 2]

    with pytest.raises(UserError, match=r"input has shape \[None, 9, 10, 2\]"):
        import_keras(edited("functional", flat))


def test_hard_sigmoid_needs_a_keras_version(edited: Edit) -> None:
    path = edited("functional", lambda metadata: metadata.pop("keras_version"), "metadata.json")
    with pytest.raises(UserError, match="does not say whether Keras 2's or Keras 3's"):
        import_keras(path)
    path = edited("functional", lambda metadata: metadata.update(keras_version="2.14.0"), "metadata.json")
    assert import_keras(path).settings["recurrent_activation"] == "hard_sigmoid"
    path = edited("functional", lambda metadata: metadata.update(keras_version="4.0.0"), "metadata.json")
    with pytest.raises(UserError, match=r"Keras version '4\.0\.0' is not known"):
        import_keras(path)


def test_arrays_that_the_configuration_has_not(keras_models: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(keras_models / "2.15.0" / "functional.h5", tmp_path / "model.h5"))
    with h5py.File(path, "a") as file:
        config = json.loads(file.attrs["model_config"])
        layer(config, "second")["config"]["use_bias"] = False
        file.attrs["model_config"] = json.dumps(config)
    with pytest.raises(UserError, match=r"layer 'second' .ConvLSTM2D. has a bias in the file that its config"):
        import_keras(path)


def test_training_only_settings_come_along_or_are_told(edited: Edit) -> None:
    def everywhere(config: dict[str, Any], **options: Any) -> None:
        for name in ("conv_lstm2d", "second"):
            layer(config, name)["config"].update(options)

    penalty = {"module": "keras.regularizers", "class_name": "L1L2", "config": {"l1": 0.1, "l2": 0.2}}
    both = {"kernel_regularizer": penalty, "recurrent_regularizer": penalty, "dropout": 0.25, "recurrent_dropout": 0.5}
    imported = import_keras(edited("functional", lambda config: everywhere(config, **both)))
    assert (imported.l1, imported.l2) == (0.1, 0.2)
    assert (imported.settings["dropout"], imported.settings["recurrent_dropout"]) == (0.25, 0.5)
    imported = import_keras(edited("functional", lambda config: everywhere(config, kernel_regularizer=penalty)))
    assert (imported.l1, imported.l2) == (0.0, 0.0)
    assert any("regularizers that are not the same" in note for note in imported.notes)
    imported = import_keras(edited("functional", setting("second", dropout=0.5)))
    assert imported.settings["dropout"] == 0.0
    assert any("different dropout" in note for note in imported.notes)
    imported = import_keras(edited("functional", setting("second", trainable=False)))
    assert any("'second' (ConvLSTM2D) was frozen" in note for note in imported.notes)
