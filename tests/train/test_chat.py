"""Training on conversations from a model that is there: what it starts from, what is predicted, and going on."""

import shutil
from dataclasses import replace

import pytest
import torch

import dsv4
from dsv4.checkpoint.training import list_checkpoints
from dsv4.config.train import Phase
from dsv4.data.conversations.answers import Answers
from dsv4.data.tokenizer import load_tokenizer
from dsv4.testing.tiny_run import contents, records_of, tiny, tiny_trainer

STEPS = 4


@pytest.fixture
def base(reference, tmp_path):
    """A copy of the finished model of the tiny recipe, with its tokenizer."""
    return shutil.copytree(reference / "model", tmp_path / "base")


@pytest.fixture
def config(base, corpus):
    small = tiny(corpus)
    return replace(
        small,
        init=str(base),
        data=replace(
            small.data, source="conversations", tokenizer="init", num_conversations=40, fim_rate=0.0, split_rate=0.0
        ),
        batch=replace(small.batch, start_tokens=192, tokens=192, ramp_tokens=0),
        run=replace(small.run, checkpoint_steps=2, validation_steps=2),
        phases=(Phase(name="chat", tokens=STEPS * 192, sequence=96, attention="sparse"),),
    )


def test_a_run_starts_from_the_weights_and_the_tokenizer_of_a_model(config, base, tmp_path):
    parts = tiny_trainer(config, tmp_path / "run").parts
    wanted = dsv4.load_model(base, "float32").state_dict()
    found = parts.model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert parts.model.training
    assert {parameter.dtype for parameter in parts.model.parameters() if parameter.is_floating_point()} == {
        torch.float32
    }
    assert (tmp_path / "run" / "data" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_answers_alone_are_predicted(config, tmp_path):
    """In rows of training and validation: every target is written by the assistant, as its whole piece tells."""
    parts = tiny_trainer(config, tmp_path / "run").parts
    answers = Answers.of(parts.tokenizer)
    predicted = 0
    for batch in [parts.loader.next_batch(4, 96) for _ in range(5)] + parts.validation(96):
        for tokens, segments, targets in zip(batch.token_ids, batch.segment_ids, batch.targets, strict=True):
            for segment in segments.unique().tolist():
                if segment < 0:
                    continue
                piece = tokens[segments == segment].numpy()
                written = torch.from_numpy(answers.written(piece))
                its_targets = targets[segments == segment]
                assert its_targets[-1] == -1
                assert torch.equal(its_targets[:-1] >= 0, written[1:])
                predicted += int(written[1:].sum())
        assert 0 < batch.num_targets < batch.num_real / 2 + 60
    assert predicted > 100


def test_a_run_that_was_stopped_goes_on_to_the_bit_without_the_model_it_started_from(config, base, tmp_path):
    whole = tmp_path / "whole"
    tiny_trainer(config, whole).train()
    assert [found.step for found in list_checkpoints(whole / "checkpoints")] == [0, 2, STEPS]
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(base)
    trainer = tiny_trainer(config, run)
    trainer.resume(run / "checkpoints" / "step-00000002")
    trainer.train()
    assert records_of(run) == records_of(whole)
    for found in list_checkpoints(whole / "checkpoints"):
        assert contents(run / "checkpoints" / found.path.name) == contents(found.path)
    assert records_of(whole, "step")[0]["loss"] != records_of(whole, "step")[-1]["loss"]


def test_a_model_of_another_shape_is_refused_before_anything_is_written(config, tmp_path):
    other = replace(config, model="nano")
    with pytest.raises(ValueError, match=r"phase chat: sequence is 96; expected"):
        tiny_trainer(other, tmp_path / "run")
    fitting = Phase(name="chat", tokens=600, sequence=512, attention="sparse")
    batch = replace(other.batch, start_tokens=512, tokens=512, micro_tokens=512)
    with pytest.raises(ValueError, match=r"init is .*base, a model that differs from the recipe's in vocab_size, "):
        tiny_trainer(replace(other, phases=(fitting,), batch=batch), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_tokenizer_is_refused(config, base, tmp_path):
    (base / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer is .*base/tokenizer\.json, which is no file"):
        tiny_trainer(config, tmp_path / "run")


def test_the_tokenizer_is_that_of_the_model(config, tmp_path):
    parts = tiny_trainer(config, tmp_path / "run").parts
    assert parts.tokenizer.to_str() == load_tokenizer(f"{config.init}/tokenizer.json").to_str()
