"""The settings of a run, for the HParams view of TensorBoard.

TensorBoard reads them from an event whose content is a `HParamsPluginData` of
tensorboard/plugins/hparams/plugin_data.proto. That has three fields that count
here, so they are encoded by hand: TensorBoard need not be installed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

_TAG = "_hparams_/session_start_info"
# Numbers of fields, by message.
_START_INFO = 3
_HPARAMS, _START_SECS = 1, 5
_KEY, _VALUE = 1, 2
_NUMBER, _TEXT, _BOOL = 2, 3, 4


def summary(
    settings: Mapping[str, Any], started_secs: float
) -> tf.compat.v1.Summary:
    """Returns what an event file holds of the settings of a run.

    Args:
        settings: by name; lists become texts.
        started_secs: since 1970.
    """
    entries = [
        _inside(_KEY, name.encode()) + _inside(_VALUE, _value(value))
        for name, value in settings.items()
    ]
    info = b"".join(_inside(_HPARAMS, entry) for entry in entries)
    info += _double(_START_SECS, started_secs)
    made = tf.compat.v1.Summary()
    added = made.value.add(tag=_TAG)
    added.metadata.plugin_data.plugin_name = "hparams"
    added.metadata.plugin_data.content = _inside(_START_INFO, info)
    added.tensor.CopyFrom(tf.make_tensor_proto(0.0, tf.float32, shape=(1,)))
    return made


def _value(value: Any) -> bytes:
    """Encodes a `google.protobuf.Value`."""
    if isinstance(value, bool):
        return bytes((_BOOL << 3, value))
    if isinstance(value, (int, float)):
        return _double(_NUMBER, float(value))
    if isinstance(value, (list, tuple)):
        value = " ".join(map(str, value))
    return _inside(_TEXT, str(value).encode())


def _inside(number: int, content: bytes) -> bytes:
    """Encodes a field of bytes, of text or of a message."""
    return bytes((number << 3 | 2,)) + _varint(len(content)) + content


def _double(number: int, value: float) -> bytes:
    return bytes((number << 3 | 1,)) + struct.pack("<d", value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes((*encoded, value))
