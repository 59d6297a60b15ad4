"""One line for an error of a user's code, and for what it has returned."""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from dtrain.cluster import workers
from dtrain.errors import UserError

_MAX_ERROR_LENGTH = 300
_ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Where the user's own code is not.
_PACKAGES = f"{os.sep}site-packages{os.sep}"
_HERE = os.path.dirname(__file__)


def describe(error: Exception, own: Callable[..., Any] | None) -> str:
    """Renders an error of a user's code as one line that says where.

    That is the innermost frame in the file of `own`, the user's function, or
    the innermost of all.
    """
    text, _, _ = _ANSI_COLOUR.sub("", str(error)).partition(
        # What Keras adds to an error in a call; the inputs are told anyway.
        "Arguments received by"
    )
    if text.startswith("in user code:"):
        # Of AutoGraph, which puts all frames before what was said.
        *_, text = text.rpartition(f"{type(error).__name__}: ")
    message = " ".join(text.split())
    if len(message) > _MAX_ERROR_LENGTH:
        message = message[:_MAX_ERROR_LENGTH] + "..."
    line = _line_of(error, own)
    return f"{type(error).__name__}: {message}" + (f" ({line})" if line else "")


def _line_of(error: Exception, own: Callable[..., Any] | None) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    # AutoGraph runs a copy, and knows which lines it was made of.
    metadata = getattr(error, "ag_error_metadata", None)
    translated = getattr(metadata, "translated_stack", ())
    frames = [
        frame
        for frame in (
            *traceback.extract_tb(error.__traceback__),
            # The innermost is its first.
            *reversed(translated),
        )
        if "__autograph_generated" not in frame.filename
        and not frame.filename.startswith("<")
        and os.path.dirname(frame.filename) != _HERE
    ]
    frames = [each for each in frames if _PACKAGES not in each.filename]
    code = getattr(own, "__code__", None)
    own_frames = [
        frame
        for frame in frames
        if code is not None and frame.filename == code.co_filename
    ]
    if not frames:
        return f"{code.co_filename}:{code.co_firstlineno}" if code else ""
    frame = (own_frames or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


@contextlib.contextmanager
def in_one_line(subject: str, own: Any) -> Iterator[None]:
    """Makes one line of what a user's code raises in this context.

    Args:
        subject: what is called, in the words of the line.
        own: the user's function.

    Raises:
        UserError: the line.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if workers.is_lost_worker(error):
            raise
        if isinstance(error, tf.errors.ResourceExhaustedError):
            raise UserError(
                f"{subject} needs more memory than the device has; lower "
                "--base_channels, --latent_size or --image_size"
            ) from error
        raise UserError(f"{subject} raised {describe(error, own)}") from error


def type_name(value: Any) -> str:
    """Says of which type a value is."""
    return "None" if value is None else f"of type {type(value).__name__}"


def render(tensor: tf.Tensor) -> str:
    """Says what a tensor is, as in float32 [2, 8]."""
    return f"{tensor.dtype.name} {list(tensor.shape)}"
