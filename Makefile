# make demo    a fresh machine: environment, the shipped checkpoint, a dialogue, a robot, a table, pictures
# make test    the environment and the whole test suite
# make train   the shipped checkpoint from nothing on two CPU cores (about an hour); OUT=runs/tiny
PYTHON ?= python3.11
PY := .venv/bin/python
OUT ?= runs/tiny
DATA ?= data/cache
PROCESSES ?= 2
SCENES ?= 30000
VAL_SCENES ?= 600
TEST_SCENES ?= 300
EPISODES ?= 550
VISION_STEPS ?= 4200
VISION2_STEPS ?= 3000
ALIGN_STEPS ?= 100
COTRAIN_STEPS ?= 2000

.PHONY: demo test train ship evaluate ablations lint clean

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
	$(PY) -m data.build --scenes $(VAL_SCENES) --split val --workers $(PROCESSES) --out $(DATA)/val
	$(RUN) train.py --stage vision $(SPLITS) --out $(OUT)/vision --max-steps $(VISION_STEPS) --resume
	$(RUN) train.py --stage vision $(SPLITS) --init $(OUT)/vision --out $(OUT)/vision2 --max-steps $(VISION2_STEPS) --lr 7e-4 --resume
	$(RUN) train.py --stage align $(SPLITS) --init $(OUT)/vision2 --out $(OUT)/align --max-steps $(ALIGN_STEPS) --resume
	$(RUN) train.py --stage cotrain $(SPLITS) --init $(OUT)/align --out $(OUT)/cotrain --max-steps $(COTRAIN_STEPS) --resume
	$(PY) finetune_policy.py --checkpoint $(OUT)/cotrain $(SPLITS) --out $(OUT)/policy --half

# What is committed of a training: weights, curves, and the scores of `make evaluate`.
ship:
	mkdir -p $(TINY)
	cp $(OUT)/policy/model.safetensors $(OUT)/policy/config.json $(OUT)/policy/vocab.tiktoken $(OUT)/policy/policy.json $(TINY)/
	cp $(DATA)/train/manifest.json $(TINY)/data.json
	cp $(DATA)/train/vocab.tiktoken data/vocab.tiktoken
	echo stage,step,seconds,name,value > $(TINY)/metrics.csv
	for s in vision vision2 align cotrain policy; do tail -n +2 $(OUT)/$$s/metrics.csv | sed "s/^/$$s,/"; done >> $(TINY)/metrics.csv
	$(PY) sim_eval.py --make-blind-table $(DATA)/train/manipulation.jsonl

# The tables: 550 + 550 test scenes of the robot, and about 10,000 test questions. Ten minutes.
# The random backbone is the floor of what training brings.
evaluate: .venv/ready
	test -f $(OUT)/random/model.safetensors || $(PY) finetune_policy.py --checkpoint $(OUT)/cotrain $(SPLITS) --out $(OUT)/random --random-backbone
	$(PY) sim_eval.py --policy model,model-text,random-backbone=$(OUT)/random,blind,mean-action,part-pixel-normal,random-normal,random,expert \
	  --checkpoint $(TINY) --split both --episodes $(EPISODES) --workers 2 --strips 8 --out $(OUT)/eval
	$(PY) -m data.build --scenes $(TEST_SCENES) --split test-seen --workers $(PROCESSES) --out $(DATA)/test-seen
	$(PY) -m data.build --scenes $(TEST_SCENES) --split test-unseen --workers $(PROCESSES) --out $(DATA)/test-unseen
	OMP_NUM_THREADS=1 $(PY) -m data.benchmark --checkpoint $(TINY) --train $(DATA)/train --data $(DATA)/test-seen,$(DATA)/test-unseen --out $(OUT)/reasoning
	cp $(OUT)/eval/results.json $(OUT)/reasoning/reasoning.json $(TINY)/

# Which stage and which questions carry the skill: the same short co-training with all questions and with the general ones
# only, then a head on each; the same head on another seed; and everything fine-tuned. About an hour.
ABLATION_STEPS ?= 700
ROBOT = plan,possible,success,past,future,contact
ablations: .venv/ready
	OMP_NUM_THREADS=1 $(PY) train.py --stage cotrain $(SPLITS) --init $(OUT)/align --out $(OUT)/short --max-steps $(ABLATION_STEPS) --resume
	OMP_NUM_THREADS=1 $(PY) train.py --stage cotrain $(SPLITS) --init $(OUT)/align --out $(OUT)/general --max-steps $(ABLATION_STEPS) --skip $(ROBOT) --resume
	$(PY) finetune_policy.py --checkpoint $(OUT)/short $(SPLITS) --out $(OUT)/short-policy
	$(PY) finetune_policy.py --checkpoint $(OUT)/general $(SPLITS) --out $(OUT)/general-policy
	$(PY) finetune_policy.py --checkpoint $(OUT)/cotrain $(SPLITS) --out $(OUT)/policy-1 --seed 1
	$(PY) finetune_policy.py --checkpoint $(OUT)/cotrain $(SPLITS) --out $(OUT)/policy-2 --seed 2
	$(PY) finetune_policy.py --checkpoint $(OUT)/cotrain $(SPLITS) --out $(OUT)/full --unfreeze --epochs 3 --lr 3e-4
	$(PY) sim_eval.py --policy model,head-seed-1=$(OUT)/policy-1,head-seed-2=$(OUT)/policy-2,all-questions=$(OUT)/short-policy,general-only=$(OUT)/general-policy,all-fine-tuned=$(OUT)/full,random-normal \
	  --checkpoint $(TINY) --split both --episodes $(EPISODES) --workers 2 --out $(OUT)/ablations

clean:
	rm -rf .venv data/cache runs demo
