"""Built-in recipes, recipes from TOML, and the way to a run's folder and back."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest

from dsv4.config.fit import check_against_model
from dsv4.config.presets import PRESETS, preset
from dsv4.config.recipes import RECIPES, demo, flash, load_recipe, load_run_config, pro, smoke
from dsv4.config.toml import from_dict, to_dict

MILLION, BILLION, TRILLION = 10**6, 10**9, 10**12


@pytest.fixture
def toml(tmp_path):
    """A function that writes a recipe file and returns its path."""

    def write(text: str):
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(call, *arguments) -> list[str]:
    """The lines of the ValueError that a call raises, without its title."""
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]


# Built-in recipes


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_suits_its_model(name):
    config = load_recipe(name)
    assert config.model in PRESETS
    check_against_model(config, preset(config.model))


@pytest.mark.parametrize("name", [name for name in RECIPES if not load_recipe(name).init])
def test_every_recipe_from_the_start_is_the_whole_schedule(name):
    phases = load_recipe(name).phases
    kinds = [(phase.attention, phase.train) for phase in phases]
    assert list(dict.fromkeys(kinds)) == [("dense", "all"), ("dense", "indexer"), ("sparse", "all")]
    assert kinds == sorted(kinds, key=[("dense", "all"), ("dense", "indexer"), ("sparse", "all")].index)
    lengths = [phase.sequence for phase in phases]
    assert lengths == sorted(lengths)
    assert lengths[-1] > lengths[0]


@pytest.mark.parametrize(
    ("make", "tokens", "dense", "batch", "peak"),
    [(flash, 32 * TRILLION, TRILLION, 75.5, 2.7e-4), (pro, 33 * TRILLION, 2 * TRILLION, 94.4, 2.0e-4)],
)
def test_what_the_report_states(make, tokens, dense, batch, peak):
    config = make()
    assert sum(phase.tokens for phase in config.phases) == tokens
    stages = [phase.tokens for phase in config.phases if phase.attention == "dense" and phase.train == "all"]
    assert sum(stages) == dense
    assert list(dict.fromkeys(phase.sequence for phase in config.phases)) == [4096, 16384, 65536, 1048576]
    assert next(phase.sequence for phase in config.phases if phase.attention == "sparse") == 65536
    assert round(config.batch.tokens / MILLION, 1) == batch
    optimizer = config.optimizer
    assert (optimizer.peak_lr, optimizer.end_lr * 10, optimizer.warmup_steps) == (peak, pytest.approx(peak), 2000)
    assert (optimizer.muon_momentum, optimizer.muon_update_rms, optimizer.weight_decay) == (0.95, 0.18, 0.1)
    assert (optimizer.adam_betas, optimizer.adam_eps) == ((0.9, 0.95), 1e-20)
    loss = config.loss
    assert (loss.mtp_weight, loss.mtp_weight_decay, loss.balance_weight, loss.bias_speed) == (0.3, 0.1, 1e-4, 0.001)


def test_the_indexers_warm_up_is_that_of_v32():
    (phase,) = (phase for phase in flash().phases if phase.train == "indexer")
    assert round(phase.tokens / BILLION, 1) == round(1000 * 16 * 128 * 1024 / BILLION, 1) == 2.1
    assert flash().loss.indexer_lr == 1e-3


def test_smoke_meets_every_change():
    config = smoke()
    assert sum(phase.tokens for phase in config.phases) < 50_000
    assert config.batch.start_tokens < config.batch.tokens
    assert config.batch.micro_tokens < config.batch.tokens  # steps of more than one pass
    assert config.batch.ramp_tokens < config.phases[0].tokens
    assert any(before.sequence < after.sequence for before, after in pairwise(config.phases))
    assert config.phases[-1].sequence > 128 + preset("smoke").attention.window  # an HCA entry beyond the window


# Names


def test_a_recipe_is_found_by_name_only():
    assert load_recipe("demo") == demo()
    with pytest.raises(ValueError, match=r"^recipe is 'dmeo'; expected one of smoke, demo, .*; did you mean demo\?$"):
        load_recipe("dmeo")
    with pytest.raises(ValueError, match=r"^recipe is 'a/demo'; expected one of .* or a \.toml file$"):
        load_recipe("a/demo")
    with pytest.raises(ValueError, match=r"^recipe file is /nowhere/a\.toml; expected a file that exists$"):
        load_recipe("/nowhere/a.toml")


# TOML


def test_a_file_overrides_its_base_field_by_field(toml):
    path = toml('base = "demo"\nseed = 7\n[optimizer]\npeak_lr = 1\nadam_eps = 1e-20\n[data]\nsource = "texts"\n')
    base = demo()
    config = load_recipe(path)
    assert config == dataclasses.replace(
        base,
        seed=7,
        optimizer=dataclasses.replace(base.optimizer, peak_lr=1.0),
        data=dataclasses.replace(base.data, source="texts"),
    )
    assert (type(config.optimizer.peak_lr), config.optimizer.adam_eps) == (float, 1e-20)
    assert load_recipe(str(path)) == config


def test_phases_replace_the_whole_schedule(toml):
    text = '[[phases]]\nname = "all"\ntokens = 5000\nsequence = 256\nattention = "dense"\n'
    (phase,) = load_recipe(toml('base = "demo"\n' + text)).phases
    assert (phase.name, phase.tokens, phase.sequence, phase.train, phase.precision) == (
        "all", 5000, 256, "all", "plain",
    )  # fmt: skip


def test_a_file_can_be_a_whole_recipe(toml):
    def table(values):
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())

    data = json.loads(json.dumps(to_dict(smoke())))
    phases = data.pop("phases")
    rooms = {name: data.pop(name) for name in list(data) if isinstance(data[name], dict)}
    text = table(data) + "".join(f"[{name}]\n{table(values)}" for name, values in rooms.items())
    assert load_recipe(toml(text + "".join(f"[[phases]]\n{table(phase)}" for phase in phases))) == smoke()


def test_everything_wrong_is_reported_at_once(toml):
    path = toml("""
base = "demo"
sed = 3
model = 5
run = "often"
[optimizer]
peak_lr = "1e-3"
warmup_steps = 2.5
adam_betas = [0.9]
muon_per_head = 1
[loss]
mtp_weight = nan
[batch]
start_tokens = 4096
tokens = 0
[data]
fim_rate = 2
bad_files = "ignore"
[[phases]]
name = "first"
tokens = 100
sequense = 512
attention = "dense"
[[phases]]
name = "second"
tokens = 100
sequence = 512
attention = "thin"
precision = "fp6"
""")
    with pytest.raises(ValueError, match=r"mine\.toml: recipe has 16 problems:"):
        load_recipe(path)
    assert set(problems(load_recipe, path)) == {
        "unknown field sed; did you mean seed?",
        "model is 5; expected a string",
        "run is 'often'; expected an object",
        "optimizer.peak_lr is '1e-3'; expected a finite number, 0 or more",
        "optimizer.warmup_steps is 2.5; expected an integer, 0 or more",
        "optimizer.adam_betas is [0.9]; expected a list of 2",
        "optimizer.muon_per_head is 1; expected true or false",
        "loss.mtp_weight is nan; expected a finite number, 0 or more",
        "batch.tokens is 0; expected at least 1",
        "batch.start_tokens is 4096; expected at most batch.tokens = 0",
        "data.fim_rate is 2.0; expected 0 to 1",
        "data.bad_files is 'ignore'; expected one of error, skip",
        "unknown field phases[0].sequense; did you mean sequence?",
        "missing field phases[0].sequence",
        "phase second: attention is 'thin'; expected one of dense, sparse",
        "phase second: precision is 'fp6'; expected one of plain, fp8, fp4",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base = 3", r"mine\.toml: base is 3; expected one of smoke, demo, chat, mini, mini-demo, flash, pro$"),
        ('base = "flsh"', r"mine\.toml: base is 'flsh'; expected one of .*; did you mean flash\?$"),
        ("seed = ", r"mine\.toml: expected TOML: "),
        ("seed = 1\nseed = 2", r"mine\.toml: expected TOML: "),
        ('base = "demo"\nphases = []', "phases is empty; expected at least one"),
        ('base = "demo"\nphases = [1]', r"phases\[0\] is 1; expected an object"),
        ('base = "demo"\nphases = 1', r"phases is 1; expected a list"),
        ("", r"recipe has 10 problems:\n  - missing field model\n"),
    ],
)
def test_what_is_no_recipe_is_refused(toml, text, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(toml(text))


# The run's folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json(name, tmp_path):
    config = RECIPES[name]()
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config), allow_nan=False), encoding="utf-8")
    assert load_run_config(tmp_path) == config


def test_a_dict_is_read_strictly():
    data = to_dict(demo())
    optional = {"train", "precision"}
    assert from_dict(data | {"phases": [{k: v for k, v in demo().phases[0].__dict__.items() if k not in optional}]})
    assert problems(from_dict, data | {"base": "demo"}) == ["unknown field base; did you mean phases?"]
    assert problems(from_dict, {k: v for k, v in data.items() if k != "seed"}) == ["missing field seed"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"run is .*, which has no config\.json; expected the folder of a run"),
        ("{", r"config\.json: expected JSON: "),
        ("[]", r"config\.json: the file holds a list; expected a JSON object"),
        ("{}", r"config\.json: recipe has 10 problems:"),
    ],
)
def test_a_folder_without_a_recipe_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_run_config(tmp_path)
