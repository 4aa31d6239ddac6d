"""A teacher beside the text: shares of the loss, what it teaches and when, what it may be, and going on to the bit."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv4.checkpoint.convert import convert
from dsv4.checkpoint.training import list_checkpoints
from dsv4.config.load import load_config as load
from dsv4.config.recipes import load_run_config, smoke
from dsv4.config.train import DistillConfig, Phase
from dsv4.model.linear import Linear, PackedLinear
from dsv4.optim import Optimizer
from dsv4.optim.groups import is_indexer
from dsv4.testing.batches import packed_batch, split, work_of
from dsv4.testing.compare import relative_distance
from dsv4.testing.runs import write_run
from dsv4.testing.tiny_run import contents, records_of, tiny, tiny_trainer
from dsv4.testing.toys import flash_like, toy_model
from dsv4.train import findings, plots
from dsv4.train.history import read_history
from dsv4.train.nonfinite import NonFiniteError
from dsv4.train.step import train_step
from dsv4.train.teacher import load_teacher

V, T = 101, 67
BATCH = packed_batch(V, [[5, 37, 1, 3, 21], [50, 4, 6], [2, 60]], T)  # rows 2 and 3 end in padding
DENSE = Phase(name="dense", tokens=10**6, sequence=T, attention="dense")
WARM_UP = replace(DENSE, name="warm-up", train="indexer")
SPARSE = replace(DENSE, name="sparse", attention="sparse")


def exact(seed, **changes):
    model = toy_model(replace(flash_like(), mtp_kinds=(), **changes), seed=seed).double()
    model.activation_dtype = torch.float64
    return model


def recipe(weight, **loss):
    small = smoke()
    return replace(
        small,
        data=replace(small.data, tokenizer="deepseek-v4"),
        loss=replace(small.loss, **loss),
        optimizer=replace(small.optimizer, clip_norm=1e9),
        distill=DistillConfig(teacher="teacher", weight=weight) if weight else DistillConfig(),
    )


def form(model, weight, teacher, phase=SPARSE, batches=(BATCH,)):
    """What a step reports and its gradients, with no loss but the next token's and the teacher's."""
    config = recipe(weight, balance_weight=0.0, indexer_weight=0.0)
    result = train_step(model, Optimizer(model, config.optimizer), config, work_of(phase, batches), teacher)
    return result.numbers, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# The step


def test_the_kl_is_a_mean_over_targets_of_whole_distributions_and_shares_add_up():
    """Against logits of whole models, the teacher another model, of another width, read sparse in a dense phase too."""
    model, teacher = exact(1), exact(2, hidden_size=44).requires_grad_(False).eval()
    has_target = BATCH.targets >= 0
    logits = model(BATCH.token_ids, segment_ids=BATCH.segment_ids, dense=True).logits[has_target].double()
    student = logits.log_softmax(dim=-1)
    taught = teacher(BATCH.token_ids, segment_ids=BATCH.segment_ids).logits[has_target].double().log_softmax(dim=-1)
    kl = (student.exp() * (student - taught)).sum(dim=-1).mean()
    nll = -student.gather(-1, BATCH.targets[has_target, None]).mean()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and not is_indexer(name)}
    alone, text = form(model, 0.0, None, DENSE)
    numbers, grads = form(model, 0.3, teacher, DENSE, split(BATCH, [1, 2]))
    assert numbers["distill_kl"] == pytest.approx(kl.item(), rel=1e-6)
    assert numbers["loss"] == pytest.approx(nll.item(), rel=1e-6) == pytest.approx(alone["loss"], rel=1e-6)
    assert "distill_kl" not in alone
    names = [name for name in grads if name in parameters]
    of_kl = torch.autograd.grad(kl, [parameters[name] for name in names], materialize_grads=True)
    for name, grad in zip(names, of_kl, strict=True):
        assert relative_distance(grads[name], 0.7 * text[name] + 0.3 * grad) < 1e-5, name
    assert len(names) > 50


def test_a_student_that_is_its_teacher_learns_from_the_text_alone():
    model = toy_model(replace(flash_like(), mtp_kinds=()))
    teacher = deepcopy(model).requires_grad_(False).eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    numbers, grads = form(model, 1.0, teacher)
    assert numbers["distill_kl"] == 0
    assert numbers["loss"] > 1
    assert all(grad.norm() == 0 for grad in grads.values())
    _, text = form(model, 0.0, None)
    _, half = form(model, 0.5, teacher)
    assert all(torch.allclose(half[name], grad / 2, rtol=1e-5, atol=1e-9) for name, grad in text.items())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_student_moves_towards_its_teacher_and_its_mtp_block_learns_from_the_text():
    model, teacher = toy_model(flash_like(), seed=1), toy_model(flash_like(), seed=2).requires_grad_(False).eval()
    config = recipe(1.0, balance_weight=0.0)
    optimizer = Optimizer(model, config.optimizer)
    found = []
    for step in range(1, 6):
        result = train_step(
            model, optimizer, config, work_of(DENSE, split(BATCH, [1, 2])[:1], step=step, lr=0.03), teacher
        )
        assert model.mtp[0].e_proj.weight.grad.norm() > 0
        result.apply()
        found.append(result.numbers["distill_kl"])
    assert found[-1] < 0.6 * found[0]
    assert found == sorted(found, reverse=True)


def test_the_indexers_warm_up_asks_no_teacher():
    model = toy_model(flash_like())
    teacher = deepcopy(model)
    teacher.run = None
    numbers, grads = form(model, 0.5, teacher, WARM_UP)
    assert numbers["distill_kl"] is None
    assert all(is_indexer(name) for name in grads)


def test_a_teacher_that_is_not_finite_is_named():
    model = toy_model(flash_like())
    teacher = deepcopy(model).requires_grad_(False).eval()
    teacher.head.weight[3, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="It began in the teacher"):
        form(model, 0.5, teacher)


# A run


def taught(corpus, teacher, **changes):
    """Six steps, two of each kind of phase, of a student with another seed than its teacher."""
    small = tiny(corpus)
    return replace(
        small,
        seed=5,
        data=replace(small.data, tokenizer=str(teacher / "tokenizer.json")),
        distill=DistillConfig(teacher=str(teacher), weight=0.5),
        batch=replace(small.batch, start_tokens=192, tokens=192, ramp_tokens=0),
        run=replace(small.run, checkpoint_steps=3, validation_steps=50, validation_tokens=100),
        phases=(
            Phase(name="dense-48", tokens=384, sequence=48, attention="dense"),
            Phase(name="indexer-64", tokens=384, sequence=64, attention="dense", train="indexer"),
            Phase(name="sparse-96", tokens=384, sequence=96, attention="sparse"),
        ),
    )  # fmt: skip


def test_a_run_with_a_teacher_is_told_and_goes_on_to_the_bit(corpus, reference, tmp_path):
    """Without the file that its tokenizer came from, but not without its teacher."""
    config, whole = taught(corpus, reference / "model"), tmp_path / "whole"
    source = Path(shutil.copy(reference / "model" / "tokenizer.json", tmp_path))
    config = replace(config, data=replace(config.data, tokenizer=str(source)))
    tiny_trainer(config, whole).train()
    steps = records_of(whole, "step")
    assert [step["distill_kl"] is None for step in steps] == [False, False, True, True, False, False]
    assert 0 < steps[-1]["distill_kl"] < steps[0]["distill_kl"]
    assert "distill_kl" not in records_of(reference, "step")[0]
    assert load_run_config(whole) == config
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    source.unlink()
    trainer = tiny_trainer(config, run)
    trainer.resume(run / "checkpoints" / "step-00000003")
    trainer.train()
    assert records_of(run) == records_of(whole)
    for found in list_checkpoints(whole / "checkpoints"):
        assert contents(run / "checkpoints" / found.path.name) == contents(found.path)
    with pytest.raises(ValueError, match=r"distill\.teacher is .*gone, which is no folder"):
        tiny_trainer(replace(config, distill=replace(config.distill, teacher=str(tmp_path / "gone"))), run)


def test_a_run_from_before_there_were_teachers_is_read_as_one_without(reference, tmp_path):
    config = json.loads((reference / "config.json").read_text())
    assert config.pop("distill") == {"teacher": "", "weight": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_run_config(tmp_path) == load_run_config(reference)


def test_a_teacher_is_held_as_it_is_stored(corpus, reference, tmp_path):
    """Numbers in the student's dtype, codes as codes; no MTP block, and nothing that learns."""
    convert(reference / "model", tmp_path / "codes", "base")
    config = taught(corpus, reference / "model")
    numbers = load_teacher(replace(config, activations="bfloat16"))
    codes = load_teacher(replace(config, distill=replace(config.distill, teacher=str(tmp_path / "codes"))))
    assert (numbers.activation_dtype, codes.activation_dtype) == (torch.bfloat16, torch.bfloat16)
    assert load_teacher(config).activation_dtype == torch.float32
    assert isinstance(codes.layers[0].attn.wkv, PackedLinear)
    assert isinstance(numbers.layers[0].attn.wkv, Linear)
    for teacher in (numbers, codes):
        assert not teacher.training
        assert len(teacher.mtp) == 0
        assert not any(p.requires_grad for p in teacher.parameters())


@pytest.fixture
def other(reference, tmp_path):
    """A copy of the teacher to spoil."""
    return Path(shutil.copytree(reference / "model", tmp_path / "other" / "model"))


def rewritten(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def swap(tokenizer):
    """Give two ids each other's tokens."""
    vocab = tokenizer["model"]["vocab"]
    a, b = (next(token for token, index in vocab.items() if index == i) for i in (300, 301))
    vocab[a], vocab[b] = 301, 300


BAD = {
    "the folder of a run": (lambda model: model.parent, r"which holds no model; .*; did you mean .*other/model\?$"),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), r"which has no tokenizer\.json; expected"),
    "a config that is not its own": (
        lambda model: rewritten(model / "config.json", lambda config: config.update(vocab_size=600)),
        r"does not fit its config\.json",
    ),
    "short rows": (
        lambda model: rewritten(model / "config.json", lambda config: config.update(max_position_embeddings=80)),
        r"with a max_context of 80; expected at least the 96 tokens of the longest row",
    ),
    "other tokens": (
        lambda model: rewritten(model / "tokenizer.json", swap),
        r"whose tokenizer\.json has '.*' at id 300; expected the student's",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_teach_is_refused_before_anything_is_written(name, corpus, reference, other, tmp_path):
    spoil, message = BAD[name]
    path = spoil(other) if name == "the folder of a run" else (spoil(other), other)[1]
    config = taught(corpus, reference / "model")
    with pytest.raises(ValueError, match=message):
        tiny_trainer(replace(config, distill=replace(config.distill, teacher=str(path))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_vocabulary_is_refused(corpus, reference, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv4.train.setup.load_config", lambda name: replace(load(name), vocab_size=640))
    with pytest.raises(ValueError, match=r"with a vocabulary of 512; expected the student's 640$"):
        tiny_trainer(taught(corpus, reference / "model"), tmp_path / "run")


# What is shown


def test_the_report_draws_the_kl_where_there_is_one(tmp_path):
    for name, config in (("taught", recipe(0.5)), ("alone", smoke())):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, config, max_steps=30)
    known = [step["distill_kl"] for step in records_of(tmp_path / "taught", "step")]
    known = [kl for kl in known if kl is not None]
    sentence = f"The KL to the teacher went from {known[0]:.3f} to {known[-1]:.3f} nats."
    assert sentence in findings.loss(read_history(tmp_path / "taught"))
    assert "teacher" not in findings.loss(read_history(tmp_path / "alone"))
    title = "KL to the teacher, nats per token"
    assert title in plots.svg(plots.loss, read_history(tmp_path / "taught"))
    assert title not in plots.svg(plots.loss, read_history(tmp_path / "alone"))
