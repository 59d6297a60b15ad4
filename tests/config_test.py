"""Flags become a Config, and a wrong one becomes one line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain import config
from dtrain.config import Config, further, presets
from dtrain.errors import UserError

# Later work builds on these names; removing one breaks somebody's scripts.
NAMES_THAT_STAY = [
    "run_dir",
    "resume",
    "num_steps",
    "batch_size",
    "seed",
    "deterministic",
    "strategy",
    "num_devices",
    "dataset",
    "data_dir",
    "model",
    "loss",
    "steps_per_loop",
    "checkpoint_every_steps",
    "checkpoint_every_secs",
    "max_to_keep",
    "backup_every_secs",
    "precision",
    "jit_compile",
]


def value_of(field: dataclasses.Field) -> st.SearchStrategy:
    """Values that a field allows by itself."""
    rule = field.metadata
    if rule["choices"]:
        return st.sampled_from(rule["choices"])
    low, below = rule["minimum"], rule["below"]
    if isinstance(field.default, tuple):
        return st.sampled_from(((), ("a=digits",), ("a=digits", "b=map:x#y")))
    if isinstance(field.default, bool):
        return st.booleans()
    if isinstance(field.default, int):
        return st.integers(low, below - 1 if below else 10**6)
    if isinstance(field.default, float):
        return st.floats(
            low, below or 1e6, exclude_max=bool(below), allow_nan=False
        )
    return st.just(field.default)


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


# A preset on a command line is more than its name.
@given(st.data(), st.sampled_from(sorted(FIELDS.keys() - {"preset"})))
def test_flag_and_json_give_the_same(data: st.DataObject, name: str) -> None:
    value = data.draw(value_of(FIELDS[name]))
    texts = value if isinstance(value, tuple) else (value,)
    arguments = [
        f"--{name}={json.dumps(each) if isinstance(each, bool) else each}"
        for each in texts
    ]
    try:
        expected = Config(**{name: value})
    except UserError:
        with pytest.raises(UserError):
            config.parse(["main", *arguments])
        return
    assert config.parse(["main", *arguments]) == expected
    saved = json.loads(json.dumps(expected.to_dict()))
    assert config.from_dict(saved) == expected


@given(st.lists(st.text(max_size=20), max_size=4))
def test_any_command_line_is_parsed_or_refused_in_one_line(
    arguments: list[str],
) -> None:
    with contextlib.suppress(UserError):
        config.parse(["main", *arguments])


@pytest.mark.parametrize("name", NAMES_THAT_STAY)
def test_names_that_stay(name: str) -> None:
    assert name in FIELDS


def test_flagfile(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "flags"
    path.write_text("--num_steps=7\n--loss=hinge\n")
    parsed = config.parse(["main", f"--flagfile={path}", "--seed=3"])
    assert (parsed.num_steps, parsed.loss, parsed.seed) == (7, "hinge", 3)


def test_differences_leaves_out_what_may_change() -> None:
    before = Config()
    now = dataclasses.replace(
        before, num_steps=9000, max_to_keep=9, strategy="mirrored", seed=4
    )
    assert before.differences(now) == {"seed": (0, 4)}


def test_num_steps_is_part_of_a_cosine_schedule() -> None:
    before = Config(learning_rate_schedule="cosine")
    now = dataclasses.replace(before, num_steps=9000)
    assert before.differences(now) == {"num_steps": (6000, 9000)}


def test_micro_batches_are_part_of_an_ordered_sum() -> None:
    before = Config(reduction="ordered")
    assert before.micro_batches == 8
    now = dataclasses.replace(before, micro_batches=4)
    assert before.differences(now) == {"micro_batches": (8, 4)}
    fast = Config(micro_batches=8)
    assert fast.differences(Config(micro_batches=4)) == {}
    assert set(fast.differences(before)) == {"reduction"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nonsense": 1}, "nonsense is not a setting"),
        ({"seed": "1"}, "seed ('1') must be of type int"),
        ({"seed": True}, "seed (True) must be of type int"),
        ({"paired": "a=b"}, "paired ('a=b') must be of type tuple"),
        ({"paired": [1]}, "paired ([1]) must be of type tuple"),
        ({"beta_1": math.inf}, "beta_1 (inf) must be a finite number"),
    ],
)
def test_saved_values_are_checked(values: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config.from_dict(values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--paired=a"], "paired (a) must be NAME=DATASET, such as"),
        (["--paired=a="], "paired (a=) must be NAME=DATASET"),
        (["--paired=a=map:"], "paired (a=map:) must be NAME=DATASET"),
        (["--unpaired=folder:/x"], "unpaired (folder:/x) must be NAME="),
        (["--paired=a b=digits"], "'a b' must be a name of Python"),
        (["--paired=if=digits"], "'if' must be a name of Python"),
        (["--paired=labels=digits"], "labels is taken, as are real_images"),
        (["--paired=a=x", "--unpaired=a=y"], "name a twice; give each"),
        (["--paired=a_labels=x", "--unpaired=a=y"], "name a_labels twice"),
        (["--paired=a=x", "--array_layout=chw"], "is an option of --dataset"),
    ],
)
def test_data_sets_beside_the_images_that_are_wrong(
    flags: list[str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        config.parse(["main", *flags])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_of_a_kind_are_those_of_any_data_set() -> None:
    parsed = config.parse(
        ["main", "--paired=a=map:npz:/a.npz#b", "--array_layout=chw"]
    )
    assert further.of(parsed) == (
        further.Named("a", "npz:/a.npz#b", is_paired=True, is_map=True),
    )


@pytest.mark.parametrize(
    ("dataset", "part"),
    [
        ("npz:/a.npz#b", further.Part("npz:/a.npz", array="b")),
        ("npz:/a#1.npz", further.Part("npz:/a#1.npz")),
        ("npz:/a#1.npz#b", further.Part("npz:/a#1.npz", array="b")),
        ("folder:/a#b@c", further.Part("folder:/a#b@c")),
        ("pets", further.Part("pets")),
        ("pets:small@test#mask", further.Part("pets:small", "test", "mask")),
        ("pets@train[:80%]", further.Part("pets", "train[:80%]")),
    ],
)
def test_a_part_of_a_data_set(dataset: str, part: further.Part) -> None:
    assert further.part_of(dataset) == part


def test_flags_that_are_given_several_times_are_told() -> None:
    before = Config(paired=("a=x", "b=y"))
    differences = before.differences(Config())
    assert config.describe(differences) == (
        "paired was a=x b=y and is now nothing"
    )


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_puts_other_defaults(name: str) -> None:
    parsed = config.parse(["main", f"--preset={name}"])
    preset = presets.of(name)
    values = {each: getattr(parsed, each) for each in preset.settings}
    assert values == preset.settings
    assert config.undecided(parsed) == list(preset.decided)
    assert all((preset.paper, preset.purpose, preset.cost, preset.reaches))
    # What a run is told is written down, and read again without the preset.
    decided = presets.decide(64, 1)
    told = dataclasses.replace(
        parsed, **{each: decided[each] for each in preset.decided}
    )
    again = config.from_dict(told.to_dict() | {"preset": ""})
    assert again.differences(told) == {}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_flag_wins_over_a_preset_if_it_is_the_default(name: str) -> None:
    preset = presets.of(name)
    of_flags = Config()
    told = {
        each: getattr(of_flags, each)
        for each in (*preset.settings, *preset.decided)
        # What it is of may be gone then.
        if each not in ("model", "model_flag", "loss", "burn_in_images")
    }
    flags = [f"--{each}={value}" for each, value in told.items()]
    parsed = config.parse(["main", *flags, f"--preset={name}"])
    assert {each: getattr(parsed, each) for each in told} == told


def test_model_flags_join_those_of_a_preset() -> None:
    def flags(*given: str) -> tuple[str, ...]:
        told = [f"--model_flag={each}" for each in given]
        return config.parse(["main", "--preset=auto", *told]).model_flag

    assert flags() == ("mapping_layers=2",)
    assert flags("group_size=2") == ("group_size=2", "mapping_layers=2")
    assert flags("mapping_layers=4") == ("mapping_layers=4",)
    # They are of its model.
    other = config.parse(["main", "--preset=auto", "--model=a:b"])
    assert (other.model, other.model_flag) == ("a:b", ())


@given(st.integers(1, 4096), st.integers(1, 1024))
def test_what_auto_decides_fits_any_devices(
    image_size: int, num_devices: int
) -> None:
    values = presets.decide(image_size, num_devices)
    decided = Config(**values)
    assert decided.batch_size % num_devices == 0
    # R1 over a batch is of the pixels alone.
    weight = decided.r1_gamma * decided.batch_size
    assert weight == pytest.approx(0.0002 * image_size**2)
    assert 1 <= decided.base_channels <= 512


@pytest.mark.parametrize(
    ("image_size", "num_devices", "expected"),
    # Of stylegan2-ada-pytorch, as its training logs have them.
    [
        (128, 1, (32, 0.1024, 0.0025, 128)),
        (256, 1, (16, 0.8192, 0.0025, 64)),
        (256, 8, (64, 0.2048, 0.0025, 64)),
        (512, 2, (16, 3.2768, 0.0025, 64)),
        (1024, 8, (32, 6.5536, 0.002, 32)),
    ],
)
def test_auto_is_that_of_stylegan2_ada(
    image_size: int, num_devices: int, expected: tuple[float, ...]
) -> None:
    values = presets.decide(image_size, num_devices)
    names = "batch_size", "r1_gamma", "generator_learning_rate", "base_channels"
    assert [values[name] for name in names] == pytest.approx(expected)


@pytest.mark.parametrize(
    "flag", ["end_gamma_factor=0.1", "end_beta_2=0.99"], ids=str
)
def test_an_end_needs_a_burn_in(flag: str) -> None:
    with pytest.raises(UserError, match="needs --burn_in_images"):
        config.parse(["main", f"--{flag}"])


def test_directories_may_begin_with_the_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No shell replaces the ~ behind a `=`."""
    monkeypatch.setenv("HOME", "/home/me")
    names = ("run_dir", "checkpoint_dir", "backup_dir", "xla_cache_dir")
    parsed = config.parse(["main", *(f"--{name}=~/{name}" for name in names)])
    for name in names:
        assert getattr(parsed, name) == f"/home/me/{name}"
