# make demo    a fresh machine: environment, the shipped checkpoint, a dialogue, a robot, a table, pictures
# make test    the environment and the whole test suite
# make train   the shipped checkpoint from nothing on two CPU cores (about an hour); OUT=runs/tiny
PYTHON ?= python3.11
PY := .venv/bin/python
OUT ?= runs/tiny
DATA ?= data/cache
PROCESSES ?= 2
SCENES ?= 22000

.PHONY: demo test train lint clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	touch $@

demo: .venv/ready
	$(PY) sim_eval.py --demo --out demo

test: .venv/ready
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(PY) -m pytest

lint: .venv/ready
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .

RUN = $(PY) -m torch.distributed.run --standalone --nproc-per-node $(PROCESSES)

train: .venv/ready
	$(PY) -m data.build --scenes $(SCENES) --workers $(PROCESSES) --out $(DATA)/train
	$(PY) -m data.build --scenes 600 --split val --workers $(PROCESSES) --out $(DATA)/val
	$(RUN) train.py --stage vision --data $(DATA)/train --val $(DATA)/val --out $(OUT)/vision --resume
	$(RUN) train.py --stage align --data $(DATA)/train --val $(DATA)/val --init $(OUT)/vision --out $(OUT)/align --resume
	$(RUN) train.py --stage cotrain --data $(DATA)/train --val $(DATA)/val --init $(OUT)/align --out $(OUT)/cotrain --resume
	$(PY) finetune_policy.py --checkpoint $(OUT)/cotrain --data $(DATA)/train --val $(DATA)/val --out $(OUT)/policy --half

clean:
	rm -rf .venv data/cache runs demo
