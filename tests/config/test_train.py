"""What a recipe may not be, by itself and for its model."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from dsv4.config.fit import check_against_model
from dsv4.config.presets import nano
from dsv4.config.recipes import demo
from dsv4.config.train import BatchConfig, DistillConfig, Phase, TrainConfig

DENSE = Phase(name="dense", tokens=1000, sequence=512, attention="dense")
WARM_UP = Phase(name="warm-up", tokens=1000, sequence=512, attention="dense", train="indexer")
SPARSE = Phase(name="sparse", tokens=1000, sequence=512, attention="sparse")
# What the messages below name stands here, so that tuning the demo changes none of them.
RECIPE = replace(
    demo(),
    optimizer=replace(demo().optimizer, peak_lr=3e-3, end_lr=3e-4),
    batch=BatchConfig(start_tokens=4096, tokens=16384, ramp_tokens=300_000, micro_tokens=8192),
    loss=replace(demo().loss, mtp_weight=0.3, mtp_weight_decay=0.1),
    phases=(DENSE, WARM_UP, SPARSE),
)


def problems(call, *arguments, **fields) -> list[str]:
    with pytest.raises(ValueError) as caught:
        call(*arguments, **fields)
    return str(caught.value).splitlines()


# By itself


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("data", {"validation_fraction": 0.6}, "data.validation_fraction is 0.6; expected 0 to 0.5"),
        ("data", {"fim_rate": 1.1}, "data.fim_rate is 1.1; expected 0 to 1"),
        ("data", {"split_rate": -0.1}, "data.split_rate is -0.1; expected 0 to 1"),
        ("data", {"pack_buffer": 0}, "data.pack_buffer is 0; expected at least 1"),
        ("data", {"bad_files": "warn"}, "data.bad_files is 'warn'; expected one of error, skip"),
        ("optimizer", {"peak_lr": 0.0, "end_lr": 0.0}, "optimizer.peak_lr is 0.0; expected a positive number"),
        ("optimizer", {"end_lr": 0.1}, "optimizer.end_lr is 0.1; expected at most peak_lr = 0.003"),
        ("optimizer", {"warmup_steps": -1}, "optimizer.warmup_steps is -1; expected at least 0"),
        ("optimizer", {"decay_fraction": 1.5}, "optimizer.decay_fraction is 1.5; expected 0 to 1"),
        ("optimizer", {"muon_momentum": 1.0}, "optimizer.muon_momentum is 1.0; expected 0 <= value < 1"),
        ("optimizer", {"adam_betas": (0.9, 1.0)}, "optimizer.adam_betas[1] is 1.0; expected 0 <= value < 1"),
        ("optimizer", {"adam_eps": 0.0}, "optimizer.adam_eps is 0.0; expected a positive number"),
        ("optimizer", {"weight_decay": 2.0}, "optimizer.weight_decay is 2.0; expected 0 to 1"),
        ("optimizer", {"muon_dtype": "fp8"}, "optimizer.muon_dtype is 'fp8'; expected one of bfloat16, float32"),
        ("batch", {"start_tokens": 0}, "batch.start_tokens is 0; expected at least 1"),
        ("batch", {"start_tokens": 40000}, "batch.start_tokens is 40000; expected at most batch.tokens = 16384"),
        ("batch", {"ramp_tokens": -1}, "batch.ramp_tokens is -1; expected at least 0"),
        ("loss", {"mtp_weight": -0.3}, "loss.mtp_weight is -0.3; expected 0 or more"),
        ("loss", {"indexer_lr": 0.0}, "loss.indexer_lr is 0.0; expected a positive number"),
        ("stability", {"anticipatory": "on"}, "stability.anticipatory is 'on'; expected one of off, auto, always"),
        ("stability", {"spike_memory": 0}, "stability.spike_memory is 0; expected at least 1"),
        ("stability", {"spike_deviations": 0.0}, "stability.spike_deviations is 0.0; expected a positive number"),
        ("run", {"keep_checkpoints": 1}, "run.keep_checkpoints is 1; expected at least 2"),
        ("run", {"validation_tokens": 0}, "run.validation_tokens is 0; expected at least 1"),
    ],
)
def test_a_value_out_of_range_is_named(part, changes, message):
    assert message in problems(replace, getattr(RECIPE, part), **changes)


def test_conversations_are_counted_and_trained_on_as_they_are():
    lines = problems(replace, RECIPE.data, source="conversations", split_rate=0.0)
    assert lines == [
        "data.num_conversations is 0; expected at least 1",
        "data.tokenizer is 'train'; expected one that is there: conversations train none",
        "data.fim_rate is 0.1; expected 0: a conversation is trained on as it is asked",
    ]
    lines = problems(replace, RECIPE.data, num_conversations=5)
    assert lines == ["data.num_conversations is 5; expected 0: data.source is 'stdlib'"]


def test_a_model_to_start_from_comes_with_its_tokenizer():
    with_tokenizer = replace(RECIPE.data, tokenizer="init")
    for changes in ({"init": "runs/demo/model"}, {"data": with_tokenizer}):
        (line,) = problems(replace, RECIPE, **changes)
        assert line.endswith("expected a model's folder and 'init', or neither: weights know one tokenizer's ids")
    made = replace(RECIPE, init="runs/demo/model", data=with_tokenizer, phases=(SPARSE,))
    assert made.phases == (SPARSE,)  # its indexer has been warmed up


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher": "big"}, "distill.weight is 0 with distill.teacher = 'big'; expected more than 0, up to 1"),
        ({"weight": 0.5}, "distill.weight is 0.5 without distill.teacher; expected a model's folder, or 0"),
        ({"teacher": "big", "weight": 1.5}, "distill.weight is 1.5; expected 0 to 1"),
        ({"teacher": "big", "weight": -0.5}, "distill.weight is -0.5; expected 0 to 1"),
    ],
)
def test_a_teacher_and_its_share_come_together(given, message):
    assert problems(DistillConfig, **given) == [message]


def test_a_teacher_comes_with_its_tokenizer_and_teaches_more_than_indexers():
    distill = DistillConfig(teacher="big/", weight=1.0)
    assert problems(replace, RECIPE, distill=distill, phases=(WARM_UP,)) == [
        "data.tokenizer is 'train' with distill.teacher = 'big/'; expected the teacher's, big/tokenizer.json",
        "distill.teacher is 'big/'; expected none: only indexers are trained",
    ]
    data = replace(RECIPE.data, tokenizer="big/tokenizer.json")
    assert replace(RECIPE, distill=distill, data=data).distill == distill


def test_conversations_have_no_byte_baseline():
    data = replace(
        RECIPE.data, source="conversations", num_conversations=5, tokenizer="init", fim_rate=0.0, split_rate=0.0
    )
    run = replace(RECIPE.run, baseline_order=3)
    (line,) = problems(replace, RECIPE, init="base", data=data, run=run)
    assert line == "run.baseline_order is 3; expected 0: of conversations a part is predicted"


def test_a_backend_that_is_none_is_named():
    (line,) = problems(replace, RECIPE, backend="fast")
    assert line.startswith("backend is 'fast'; expected one of auto, reference, portable, native, compiled")


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_a_generator_would_not_take_is_named(seed):
    assert problems(replace, RECIPE, seed=seed) == [f"seed is {seed}; expected 0 <= seed < 2**63"]


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_the_outermost_seeds_pass(seed):
    assert replace(RECIPE, seed=seed).seed == seed


def test_problems_of_a_part_come_together():
    lines = problems(replace, RECIPE.optimizer, peak_lr=-1.0, end_lr=-2.0, clip_norm=0.0)
    assert [line.split()[0] for line in lines] == ["optimizer.peak_lr", "optimizer.end_lr", "optimizer.clip_norm"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "phase dense: tokens is 0; expected at least 1"),
        ({"sequence": 1}, "phase dense: sequence is 1; expected at least 2"),
        ({"attention": "thin"}, "phase dense: attention is 'thin'; expected one of dense, sparse"),
        ({"train": "none"}, "phase dense: train is 'none'; expected one of all, indexer"),
        ({"precision": "fp6"}, "phase dense: precision is 'fp6'; expected one of plain, fp8, fp4"),
    ],
)
def test_a_phase_out_of_range_is_named(changes, message):
    assert problems(replace, DENSE, **changes) == [message]


def test_the_indexer_warms_up_on_dense_attention():
    (line,) = problems(replace, WARM_UP, attention="sparse")
    assert line.startswith("phase warm-up: attention is 'sparse' with train = 'indexer'; expected 'dense'")


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((), "phases is empty; expected at least one"),
        ((DENSE, DENSE), "phase dense is given twice; expected a name of its own for each"),
        ((DENSE, SPARSE, WARM_UP), "phase sparse: attention is 'sparse' before any phase has train = 'indexer'"),
        ((replace(DENSE, sequence=8193),), "phase dense: sequence is 8193; expected at most batch.micro_tokens = 8192"),
    ],
)
def test_a_schedule_that_cannot_be_is_named(phases, message):
    (line,) = problems(replace, RECIPE, phases=phases)
    assert line.startswith(message)


# For its model


def with_phases(*phases: Phase) -> TrainConfig:
    return replace(RECIPE, phases=phases)


def longer(phase: Phase, sequence: int) -> Phase:
    return replace(phase, sequence=sequence)


def test_a_recipe_that_suits_its_model_passes():
    check_against_model(with_phases(DENSE, WARM_UP, SPARSE), nano())
    check_against_model(with_phases(DENSE), replace(nano(), layer_kinds=("window", "window", "hca")))


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (
            (DENSE, longer(WARM_UP, 8192)),
            "phase warm-up: sequence is 8192; expected at most the model's max_context = 4096",
        ),
        ((longer(DENSE, 128),), "phase dense: sequence is 128; expected more than the model's window = 128"),
        (
            (WARM_UP, longer(SPARSE, 256)),
            "phase sparse: sequence is 256; expected more than 4 x 64 = 256 in a sparse phase",
        ),
    ],
)
def test_a_length_that_teaches_nothing_is_refused(phases, message):
    (line,) = problems(check_against_model, with_phases(*phases), nano())
    assert line.startswith(message)


def test_one_token_more_is_enough():
    batch = replace(RECIPE.batch, start_tokens=129 * 257, tokens=129 * 257, micro_tokens=129 * 257)
    phases = (longer(DENSE, 129), longer(WARM_UP, 129), longer(SPARSE, 257))
    check_against_model(replace(with_phases(*phases), batch=batch), nano())


def test_what_needs_an_indexer_needs_a_csa_layer():
    model = replace(nano(), layer_kinds=("window", "window", "hca"))
    assert problems(check_against_model, with_phases(DENSE, WARM_UP, SPARSE), model) == [
        "phase warm-up: train is 'indexer'; expected neither: the model has no CSA layer, so no indexer",
        "phase sparse: attention is 'sparse'; expected neither: the model has no CSA layer, so no indexer",
    ]


def test_mtp_weights_need_an_mtp_block():
    config, model = RECIPE, replace(nano(), mtp_kinds=())
    assert problems(check_against_model, config, model) == [
        "loss.mtp_weight is 0.3; expected 0: the model has no MTP block",
        "loss.mtp_weight_decay is 0.1; expected 0: the model has no MTP block",
    ]
    check_against_model(replace(config, loss=replace(config.loss, mtp_weight=0, mtp_weight_decay=0)), model)


@pytest.mark.parametrize("name", ["start_tokens", "tokens", "micro_tokens"])
def test_batches_are_whole_rows(name):
    batch = replace(RECIPE.batch, **{name: 9 * 512 - 1})
    (line,) = problems(check_against_model, replace(with_phases(DENSE), batch=batch), nano())
    assert line == f"batch.{name} is 4607; expected a multiple of the 512 tokens of a row of phase dense"


def test_the_first_batch_is_of_the_first_phase_alone():
    batch = replace(RECIPE.batch, start_tokens=512)
    check_against_model(replace(with_phases(DENSE, longer(WARM_UP, 1024)), batch=batch), nano())
    lines = problems(check_against_model, replace(with_phases(longer(DENSE, 1024)), batch=batch), nano())
    assert re.match(r"batch\.start_tokens is 512; expected a multiple of the 1024 tokens", lines[0])


def test_problems_with_the_model_come_together():
    phases = (longer(DENSE, 64), WARM_UP, longer(SPARSE, 200))
    model = replace(nano(), mtp_kinds=())
    assert len(problems(check_against_model, with_phases(*phases), model)) == 6
