"""An engine whose process is killed, again and again, gives what one that runs through gives; nothing shown is lost."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dsv4
from dsv4 import native
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine
from dsv4.engine.log import recover

ROOT = Path(dsv4.__file__).parents[1]

needs_kernels = pytest.mark.skipif(not native.available(), reason="no C compiler here")

SERVE = '''
"""Serve requests in a process of its own, kill it at a random moment, and so on until one comes to its end."""
import json, os, random, signal, sys, time
from pathlib import Path
import dsv4
from dsv4.config.engine import Limits
from dsv4.config.sampling import Sampling
from dsv4.engine.engine import Engine
from dsv4.engine.log import recover

folder, model = Path(sys.argv[1]), dsv4.load_model(sys.argv[2])
requests, limits, chance = json.loads(sys.argv[3]), json.loads(sys.argv[4]), random.Random(int(sys.argv[5]))
shown, done = folder / "shown", folder / "done"


def lines(path):
    """Those that are whole."""
    return [json.loads(line) for line in path.read_bytes().split(b"\\n")[:-1]]


def keep(file, engine, id):
    """Store an answer as its user would, and only then let the engine forget it."""
    answer = engine.completion(id)
    file.write(json.dumps([id, answer.token_ids, answer.logprobs, answer.finish]).encode() + b"\\n")
    engine.take(id)


def serve():
    stored = {id for id, *_ in lines(done)}
    with shown.open("ab", 0) as shows, done.open("ab", 0) as stores:
        with Engine(model, Limits(cache_bytes=2**21, log=str(folder / "log"), **limits)) as engine:
            found = engine.resume()
            for id in found:
                if engine.completion(id).finish is not None:
                    keep(stores, engine, id)
            for id, prompt, sampling in requests:
                if id not in stored and id not in found:
                    engine.add(prompt, Sampling(**sampling), id=id)
            while not engine.is_idle:
                for piece in engine.step():
                    begin = len(engine.completion(piece.id).token_ids) - len(piece.token_ids)
                    shows.write(json.dumps([piece.id, begin, piece.token_ids]).encode() + b"\\n")
                    if piece.finish is not None:
                        keep(stores, engine, piece.id)


def check():
    """Whatever was shown is in the log, or was stored."""
    known = {one.id: one.output_ids for one in recover(folder / "log")} | {id: ids for id, ids, *_ in lines(done)}
    for id, begin, tokens in lines(shown):
        assert known[id][begin : begin + len(tokens)] == tokens, (id, begin)


shown.touch()
done.touch()
Engine(model, Limits(cache_bytes=2**21)).generate([[0, 3]], Sampling(max_tokens=3))  # loads what each would load anew
num_kills = num_unfinished = 0
while True:
    before, child = shown.stat().st_size, os.fork()
    if child == 0:
        serve()
        os._exit(0)
    while shown.stat().st_size == before and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
    if num_kills < 8:
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    check()
    if status == 0:
        break
    assert status == -9, status
    num_kills += 1
    num_unfinished += bool(recover(folder / "log"))
print(num_kills, num_unfinished)
'''

REQUESTS = [
    (f"r{i}", [0, *([10 - i, 5, 9] * (1 + 7 * i))], {"max_tokens": 4 + 9 * i, "seed": i, "ignore_eos": i % 2 == 0})
    for i in range(10)
]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*arguments):
    command = [sys.executable, "-c", SERVE, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [{"max_requests": 4, "step_tokens": 70}, {"max_requests": 3, "step_tokens": 40, "draft_tokens": 2}],
    ids=["plain", "drafts"],
)
def test_killed_at_any_moment(tiny, tiny_saved, small, tmp_path, options):
    requests = [(id, prompt, {**sampling, "logprobs": i % 3 or None}) for i, (id, prompt, sampling) in
                enumerate(REQUESTS)]  # fmt: skip
    options = {**options, "numerics": "invariant"}
    result = run(tmp_path, tiny_saved, json.dumps(requests), json.dumps(options), options.get("draft_tokens", 0))
    assert result.returncode == 0, result.stderr
    num_kills, num_unfinished = map(int, result.stdout.split())
    assert num_kills >= num_unfinished >= 3
    engine = Engine(tiny, small(numerics="invariant"))
    whole = engine.generate([prompt for _, prompt, _ in requests], [Sampling(**s) for *_, s in requests])
    found = {id: rest for id, *rest in map(json.loads, (tmp_path / "done").read_text().splitlines())}
    assert len({completion.finish for completion in whole}) == 2
    for (id, *_), completion in zip(requests, whole, strict=True):
        logprobs = json.loads(json.dumps(completion.logprobs))
        assert found[id] == [completion.token_ids, logprobs, completion.finish], id


@needs_kernels
def test_the_command(writer, tokenizer, small, tmp_path):
    """``dsv4 generate`` with a log and a file, killed and resumed: the file has what a quiet engine gives."""
    model, file, output, log = (tmp_path / name for name in ("model", "prompts.jsonl", "out.jsonl", "log"))
    dsv4.save_model(writer, model)
    tokenizer.save(str(model / "tokenizer.json"))
    prompts = ["for word"[: 1 + i] for i in range(6)]
    samplings = [Sampling(max_tokens=20 + 60 * i, seed=i) for i in range(6)]
    own = [{"prompt": p, "max_tokens": s.max_tokens, "seed": s.seed} for p, s in zip(prompts, samplings, strict=True)]
    file.write_text("".join(json.dumps(line) + "\n" for line in own))

    def generate(*arguments):
        mode = (
            "--numerics",
            "invariant",
            "--concurrency",
            "3",
            "--draft-tokens",
            "1",
            "--log",
            log,
            "--output",
            output,
        )
        command = [sys.executable, "-m", "dsv4", "generate", model, *mode, *arguments]
        return subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    with generate("--prompts", file, "--temperature", "1", "--top-p", "1") as killed:
        while not log.exists() or log.stat().st_size < 7000:
            assert killed.poll() is None, killed.communicate()
            time.sleep(0.001)
        killed.kill()
    assert killed.returncode == -9
    assert not output.exists()
    assert 0 < len(recover(log)) < 6
    with generate("--resume") as resumed:
        assert resumed.communicate()[0] == b""
    assert resumed.returncode == 0
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    whole = Engine(writer, small(numerics="invariant"), tokenizer=tokenizer).generate(prompts, samplings)
    assert [line["prompt"] for line in found] == prompts
    assert [(line["text"], line["token_ids"], line["finish"]) for line in found] == [
        (completion.text, completion.token_ids, completion.finish) for completion in whole
    ]
    assert recover(log) == []
