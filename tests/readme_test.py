"""What the README shows, works: here the way to a run's weights."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

from dtrain import checkpoint_tool, errors, sample
from dtrain import main as dtrain_main
from dtrain.bundle import tensors
from dtrain.config import Config
from dtrain.record import drawing, images
from tests import runs


def code_block(first_line: str) -> str:
    """Returns the fenced block of README.md that starts with a line."""
    text = (runs.ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)
    [block] = [block for block in blocks if block.startswith(first_line)]
    return block


def test_weights_with_tensorflow_and_keras_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = code_block("# weights.py")
    imports = re.findall(r"^(?:import|from) (\w+)", script, re.MULTILINE)
    assert set(imports) <= {"sys", "keras", "tensorflow"}
    # Relative, as the README's own: both programs start in one directory.
    monkeypatch.chdir(tmp_path)
    run_dir = pathlib.Path("run")
    code = dtrain_main.run(
        ["main", f"--run_dir={run_dir}", "--num_steps=2", "--batch_size=8"]
    )
    assert code == errors.FINISHED
    (tmp_path / "weights.py").write_text(script)
    environment = runs.environment()
    del environment["PYTHONPATH"]
    finished = subprocess.run(
        [sys.executable, "weights.py", "run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr
    check_generator(run_dir, tmp_path / "generator.keras")


def test_pictures_with_tensorflow_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # As `make train` does.
    flags = ("--conditional", "--num_steps=1", "--batch_size=8")
    run_dir = "--run_dir=runs/default"
    assert dtrain_main.run(["main", run_dir, *flags]) == errors.FINISHED
    words = ("export", "runs/default", "--output=drawing/")
    assert checkpoint_tool.run(words) == errors.FINISHED
    names: dict[str, Any] = {}
    exec(code_block("# draw.py"), names)
    assert names["images"].shape == (10, 8, 8, 1)


def check_generator(run_dir: pathlib.Path, saved: pathlib.Path) -> None:
    """Checks that a saved model holds and draws what the run does."""
    generator = keras.models.load_model(saved)
    stored = dict(tensors.variables(f"{run_dir}/checkpoints/ckpt-2"))
    averages = {
        value.tobytes()
        for name, value in stored.items()
        if name.startswith("ema_generator/")
    }
    for weight in generator.get_weights():
        assert np.asarray(weight).tobytes() in averages
    drawn = run_dir.parent / "drawn"
    paths = sample.draw(
        sample.Request(
            str(run_dir),
            seeds="0-1",
            grid=False,
            interpolation_frames=0,
            output_dir=str(drawn),
        )
    )
    made = images.to_uint8(generator(drawing.of_seeds(Config(), [0, 1])))
    for path, image in zip(paths, made, strict=True):
        shown = np.asarray(Image.open(path))
        np.testing.assert_array_equal(shown, image[..., 0])
