# Every target sets itself up: .venv is made once and remade when the dependencies change.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test check browser demo demo-chat mini gpu bench-gpu ablations recall qat-study bench-cpu bench-train \
	bench-compiled bench-engine bench-context bench-released bench-serve soak numbers golden clean

test: .venv/ready  ## the whole test suite
	$(BIN)/python -m pytest -n 2

check: .venv/ready  ## format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

browser:  ## Chromium, with which the tests of the chat page run; where it cannot be had they are skipped, and say so
	command -v chromium || (apt-get update && apt-get install -y --no-install-recommends chromium)

RUN ?= runs/demo
DATA ?= stdlib
demo: .venv/ready  ## train nano through the whole schedule in about five minutes, then let it write
	$(BIN)/dsv4 train demo --run $(RUN) --data.source $(DATA)
	$(BIN)/dsv4 report $(RUN)
	$(BIN)/dsv4 generate $(RUN) --prompt 'def '

demo-chat: .venv/ready  ## teach the demo's model to talk, call tools and write JSON; then ask it what it was not taught
	$(BIN)/dsv4 train chat --run runs/chat --init $(RUN)/model
	$(BIN)/dsv4 eval chat runs/chat

mini: .venv/ready  ## on a GPU: train mini through the whole schedule in about twenty minutes
	$(BIN)/dsv4 train mini-demo --run runs/mini
	$(BIN)/dsv4 report runs/mini

gpu: .venv/ready  ## on a GPU: prove the Triton kernels; dsv4/ops/proved.json then names those that held
	$(BIN)/python -m bench.gpu.prove

bench-gpu: .venv/ready  ## on a GPU: kernels and whole layers against what it can do and against their twins
	$(BIN)/python -m bench.gpu
	$(BIN)/python -m bench.gpu.layers

numbers: .venv/ready  ## docs/numbers.md, from the configs
	$(BIN)/python bench/model_numbers.py > docs/numbers.md.new
	mv docs/numbers.md.new docs/numbers.md

golden: .venv/ready  ## the golden curve of losses, after a change that is meant to move it
	OMP_NUM_THREADS=1 $(BIN)/python bench/golden_curve.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade -c constraints.txt pip setuptools
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test,check]'
	touch $@

bench-cpu: .venv/ready  ## speed and memory beside transformers; about a quarter of an hour on two cores
	$(BIN)/python bench/model_cpu.py --json bench/results/model_cpu.json

ablations: .venv/ready  ## seven variants of a tiny model, three seeds each; about half an hour on two cores
	$(BIN)/python bench/ablations.py --json bench/results/ablations.json

recall: .venv/ready  ## does the sparse model find what it was told 8192 tokens ago, and a windowed one not? six minutes
	$(BIN)/python bench/recall.py --json bench/results/recall.json --plot docs/recall.svg

qat-study: .venv/ready  ## what rounding to FP4 costs nano and what training with it wins back; under half an hour
	$(BIN)/python bench/qat_study.py --json bench/results/qat_study.json --plot docs/qat.svg

bench-train: .venv/ready  ## a whole training step of nano, beside transformers with torch's Muon
	$(BIN)/python bench/train_cpu.py --json bench/results/train_cpu.json

bench-compiled: .venv/ready  ## what torch.compile makes of the portable path; about ten minutes, most of them compiling
	$(BIN)/python bench/compiled_cpu.py --step --json bench/results/compiled_cpu.json

bench-engine: .venv/ready  ## the engine on 246M parameters: prefill, decode, times, memory; two minutes
	$(BIN)/dsv4 bench engine --prompt-tokens 512 4096 16384 --concurrency 1 8 --json bench/results/engine_cpu.json

bench-released: .venv/ready  ## decoding from FP4 and FP8 codes against bfloat16; one minute
	$(BIN)/python bench/released_cpu.py

bench-serve: .venv/ready  ## what the server adds to the engine's times, at 1, 8 and 64 streams; five minutes
	$(BIN)/dsv4 bench serve --json bench/results/serve_cpu.json

soak: .venv/ready  ## 200 streams at once with random cancellations for ten minutes: does anything leak?
	$(BIN)/python bench/serve_soak.py --minutes 10 --json bench/results/serve_soak.json

bench-context: .venv/ready  ## a sequence from 4K to a million tokens, beside dense attention; five minutes
	$(BIN)/dsv4 bench context --cache-format packed --decode-tokens 256 --json bench/results/context_cpu.json \
		--plot docs/context.svg

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache
