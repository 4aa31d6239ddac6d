"""Steps on an accelerator are captured and replayed. A tape of the CPU stands in for a graph: it, too, holds the work
and the memory of a run, and knows nothing of Python's numbers."""

import pytest
import torch

from dsv4 import native
from dsv4.config.engine import Limits
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine
from dsv4.engine.replay import Replayer, _Captured
from dsv4.native.tape import Tape
from dsv4.ops.places import arrange

SAMPLED = Sampling(max_tokens=40, temperature=1, seed=3, ignore_eos=True, logprobs=2)
CPU = torch.device("cpu")


class TapeGraph:
    """Captures by running: nothing of a step may hang on being run once, where an accelerator would not run it yet."""

    def __init__(self, run):
        with Tape() as self.tape:
            self.result = run()
        assert self.tape.unplayable is None
        self.num_replays = 0

    def replay(self):
        self.num_replays += 1
        self.tape.play()


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are captured, on what passes for an accelerator."""
    made = []

    def capture(run, device):
        made.append(TapeGraph(run))
        return made[-1], made[-1].result

    monkeypatch.setattr("dsv4.device.capture", capture)
    monkeypatch.setattr("dsv4.engine.runner.has_graphs", lambda device: True)
    return made


@pytest.mark.skipif(not native.available(), reason="no C compiler here")
@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_replayed_steps_give_the_same(model, prompts, graphs, monkeypatch, draft_tokens):
    limits = Limits(max_requests=3, step_tokens=128, draft_tokens=draft_tokens)
    replayed = Engine(model, limits)
    monkeypatch.setattr(replayed.runner, "_most", 9)  # prompts run: a tape would write their rings twice
    with_graphs = replayed.generate(prompts, SAMPLED)
    assert len(graphs) > 3
    assert sum(graph.num_replays for graph in graphs) > 40
    monkeypatch.undo()
    without = Engine(model, limits).generate(prompts, SAMPLED)
    assert [c.token_ids for c in with_graphs] == [c.token_ids for c in without]
    assert [c.logprobs for c in with_graphs] == [c.logprobs for c in without]


def test_what_waits_for_the_device_is_run_every_time(model, prompts, graphs, monkeypatch):
    """As the portable operations do, which read numbers of places."""
    monkeypatch.setattr(model, "backend", "portable")
    engine = Engine(model, Limits(max_requests=3, step_tokens=128))
    answers = engine.generate(prompts, SAMPLED)
    kept = engine.runner._play._kept.values()
    assert len(kept) > 1
    assert not any(isinstance(one, _Captured) for one in kept)
    assert all(one.waits for one in kept)
    assert [len(one.token_ids) for one in answers] == [40] * len(prompts)


def test_the_second_call_captures_and_inputs_are_copied(graphs):
    calls = []

    def double(key, x):
        calls.append(key)
        return x * 2

    replayer = Replayer(double, 2, CPU)
    x = torch.arange(3)
    assert replayer("a", x).tolist() == [0, 2, 4]
    assert not graphs
    assert replayer("a", x + 1).tolist() == [2, 4, 6]
    assert (len(graphs), graphs[0].num_replays) == (1, 1)
    assert replayer("a", x + 2).tolist() == [4, 6, 8]
    assert x.tolist() == [0, 1, 2]
    assert calls == ["a", "a"]
    replayer("b", x), replayer("c", x)  # "a", used longest ago, is forgotten
    assert list(replayer._kept) == ["b", "c"]


def test_a_step_with_blocks_that_close_has_as_many_as_tokens():
    sequences = [(2, 3, 1, 0), (0, 6, 1, 0), (1, 127, 1, 0)]
    shape, numbers = arrange(sequences, (4, 128), fills=True)
    assert shape.num_closing == ((4, 3), (128, 3))
    assert numbers[9:] == [0, 2, 2, 0, 124, 124, 2, 2, 2, 0, 0, 0]
    shape, _ = arrange(sequences[1:2], (4, 128), fills=True)
    assert shape.num_closing == ((4, 0), (128, 0))
