"""What the documentation shows, runs."""

from __future__ import annotations

import pathlib
import re

from dtrain import errors
from tests import runs

TRAIN = """
from dtrain import registry
from my_model import make as make_networks

{objective}

def make(config, image_shape, num_classes):
    generator, discriminator = make_networks(config, image_shape, num_classes)
    phases = (
        registry.Phase("discriminator", critic_loss),
        registry.adversarial_phases(config)[-1],
    )
    return generator, discriminator, phases
"""


def code_blocks(name: str) -> list[str]:
    text = (runs.ROOT / "docs" / name).read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_model_of_the_documentation(tmp_path: pathlib.Path) -> None:
    model, objective = code_blocks("models.md")
    (tmp_path / "my_model.py").write_text(model)
    (tmp_path / "my_step.py").write_text(TRAIN.format(objective=objective))
    path = f"{tmp_path}:{runs.ROOT}"
    for spec in ("my_model:make", "my_step:make"):
        code, output = runs.run(
            "dtrain.main",
            *runs.SMALL,
            f"--model={spec}",
            f"--run_dir={tmp_path / spec.partition(':')[0]}",
            "--num_steps=3",
            PYTHONPATH=path,
        )
        assert code == errors.FINISHED, output


def test_links_of_the_documentation_lead_somewhere() -> None:
    for page in (runs.ROOT / "README.md", *(runs.ROOT / "docs").glob("*.md")):
        for target in re.findall(
            r"\]\((?!https?:)([^)#]+)\)", page.read_text()
        ):
            assert (page.parent / target).exists(), (page.name, target)
