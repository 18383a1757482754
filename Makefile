# make demo    a fresh machine: environment, the shipped checkpoint, a dialogue, a robot, a table, pictures
# make test    the environment and the whole test suite
# make train   the shipped checkpoint from nothing on two CPU cores (about an hour); OUT=runs/tiny
PYTHON ?= python3.11
PY := .venv/bin/python
OUT ?= runs/tiny
DATA ?= data/cache
PROCESSES ?= 2
SCENES ?= 20000
VISION_STEPS ?= 4200
ALIGN_STEPS ?= 100
COTRAIN_STEPS ?= 2000

.PHONY: demo test train ship evaluate lint clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,dev,parity]"
	touch $@

demo: .venv/ready
	$(PY) sim_eval.py --demo --out demo

test: .venv/ready
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(PY) -m pytest

lint: .venv/ready
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .

# One thread a process: on few cores several one-thread processes are faster than one process of several threads.
RUN = OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc-per-node $(PROCESSES)
SPLITS = --data $(DATA)/train --val $(DATA)/val
TINY = data/pretrained/robomamba-tiny

train: .venv/ready
	$(PY) -m data.build --scenes $(SCENES) --workers $(PROCESSES) --out $(DATA)/train
	$(PY) -m data.build --scenes 600 --split val --workers $(PROCESSES) --out $(DATA)/val
	$(RUN) train.py --stage vision $(SPLITS) --out $(OUT)/vision --max-steps $(VISION_STEPS) --resume
	$(RUN) train.py --stage align $(SPLITS) --init $(OUT)/vision --out $(OUT)/align --max-steps $(ALIGN_STEPS) --resume
	$(RUN) train.py --stage cotrain $(SPLITS) --init $(OUT)/align --out $(OUT)/cotrain --max-steps $(COTRAIN_STEPS) --resume
	$(PY) finetune_policy.py --checkpoint $(OUT)/cotrain $(SPLITS) --out $(OUT)/policy --half

# What is committed of a training: weights, curves, and the scores of `make evaluate`.
ship:
	mkdir -p $(TINY)
	cp $(OUT)/policy/model.safetensors $(OUT)/policy/config.json $(OUT)/policy/vocab.tiktoken $(OUT)/policy/policy.json $(TINY)/
	cp $(DATA)/train/manifest.json $(TINY)/data.json
	cp $(DATA)/train/vocab.tiktoken data/vocab.tiktoken
	echo stage,step,seconds,name,value > $(TINY)/metrics.csv
	for s in vision align cotrain policy; do tail -n +2 $(OUT)/$$s/metrics.csv | sed "s/^/$$s,/"; done >> $(TINY)/metrics.csv
	$(PY) sim_eval.py --make-blind-table $(DATA)/train/manipulation.jsonl

# The results table: 550 + 550 test scenes, about ten minutes. The random backbone is the floor of what training brings.
evaluate: .venv/ready
	test -f $(OUT)/random/model.safetensors || $(PY) finetune_policy.py --checkpoint $(OUT)/cotrain $(SPLITS) --out $(OUT)/random --random-backbone
	$(PY) sim_eval.py --policy model,model-text,random-backbone,blind,mean-action,part-pixel-normal,random-normal,random,expert \
	  --checkpoint $(TINY) --random-checkpoint $(OUT)/random --split both --episodes 550 --workers 2 --strips 8 --out $(OUT)/eval
	cp $(OUT)/eval/results.json $(TINY)/results.json

clean:
	rm -rf .venv data/cache runs demo
