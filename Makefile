# make demo    a fresh machine: environment, the shipped checkpoint, a dialogue, a robot, a table, pictures
# make test    the environment and the whole test suite
# make train   the shipped checkpoint from nothing on two CPU cores (one to two hours); OUT=runs/tiny
PYTHON ?= python3.11
PY := .venv/bin/python
OUT ?= runs/tiny
DATA ?= data/cache
PROCESSES ?= 2
SCENES ?= 30000
VAL_SCENES ?= 600
TEST_SCENES ?= 300
EPISODES ?= 550
# The recipe of each stage is train.py's; these add flags to it, such as COTRAIN_FLAGS=--max-steps=100.
VISION_FLAGS ?=
ALIGN_FLAGS ?=
COTRAIN_FLAGS ?=

.PHONY: demo test train ship evaluate ablations encoders lint clean

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
	$(RUN) train.py --stage vision $(SPLITS) --out $(OUT)/vision --resume $(VISION_FLAGS)
	$(RUN) train.py --stage align $(SPLITS) --init $(OUT)/vision --out $(OUT)/align --resume $(ALIGN_FLAGS)
	$(RUN) train.py --stage cotrain $(SPLITS) --init $(OUT)/align --out $(OUT)/cotrain --resume $(COTRAIN_FLAGS)
	$(PY) finetune_policy.py --checkpoint $(OUT)/cotrain $(SPLITS) --out $(OUT)/policy --half --resume

# What is committed of a training: weights, curves, and the scores of `make evaluate`.
ship:
	mkdir -p $(TINY)
	cp $(OUT)/policy/model.safetensors $(OUT)/policy/config.json $(OUT)/policy/vocab.tiktoken $(OUT)/policy/policy.json $(TINY)/
	cp $(DATA)/train/manifest.json $(TINY)/data.json
	cp $(DATA)/train/vocab.tiktoken data/vocab.tiktoken
	echo stage,step,seconds,name,value > $(TINY)/metrics.csv
	for s in vision align cotrain policy; do tail -n +2 $(OUT)/$$s/metrics.csv | sed "s/^/$$s,/"; done >> $(TINY)/metrics.csv
	$(PY) sim_eval.py --make-blind-table $(DATA)/train/manipulation.jsonl

# The tables: 550 + 550 test scenes of the robot, and about 10,000 test questions. Ten minutes.
# The random backbone is the floor of what training brings.
evaluate: .venv/ready
	test -f $(OUT)/random/model.safetensors || $(PY) finetune_policy.py --checkpoint $(OUT)/cotrain $(SPLITS) --out $(OUT)/random --random-backbone
	$(PY) sim_eval.py --policy model,model-text,random-backbone=$(OUT)/random,blind,mean-action,part-pixel-normal,random-normal,random,expert \
	  --checkpoint $(TINY) --split both --episodes $(EPISODES) --workers 2 --strips 9 --out $(OUT)/eval
	$(PY) -m data.build --scenes $(TEST_SCENES) --split test-seen --workers $(PROCESSES) --out $(DATA)/test-seen
	$(PY) -m data.build --scenes $(TEST_SCENES) --split test-unseen --workers $(PROCESSES) --out $(DATA)/test-unseen
	OMP_NUM_THREADS=1 $(PY) -m extras.reasoning_eval --checkpoint $(TINY) --train $(DATA)/train --data $(DATA)/test-seen,$(DATA)/test-unseen --out $(OUT)/reasoning
	cp $(OUT)/eval/results.json $(OUT)/eval/categories.md $(OUT)/reasoning/reasoning.json $(TINY)/
	cp $(OUT)/eval/strips.png $(OUT)/eval/episode.gif data/figures/

# What carries the skill: short co-trainings with one thing changed each, a head on each; the shipped head on other seeds;
# everything fine-tuned; and which half of the action fails. About an hour, one run after the other. Its first row must
# be that of `make evaluate`: run both after every `make ship`.
ABLATION_STEPS ?= 400
GENERAL = --more presence=3,count=2,parts=2,state=3,plan=0,possible=0,success=0,past=0,future=0,contact=0
SHORT = OMP_NUM_THREADS=1 $(PY) train.py --stage cotrain $(SPLITS) --max-steps $(ABLATION_STEPS) --resume
HEAD = $(PY) finetune_policy.py $(SPLITS)
ablations: .venv/ready
	$(SHORT) --init $(OUT)/align --out $(OUT)/short
	$(SHORT) --init $(OUT)/align $(GENERAL) --out $(OUT)/general
	$(SHORT) --init "" --out $(OUT)/no-vision
	for run in short general no-vision; do $(HEAD) --checkpoint $(OUT)/$$run --out $(OUT)/$$run-policy || exit 1; done
	$(HEAD) --checkpoint $(OUT)/cotrain --out $(OUT)/policy-1 --seed 1
	$(HEAD) --checkpoint $(OUT)/cotrain --out $(OUT)/policy-2 --seed 2
	$(HEAD) --checkpoint $(OUT)/policy --out $(OUT)/full --unfreeze --keep-head --epochs 3 --lr 3e-4
	$(PY) sim_eval.py --policy model,model-pixel,model-direction,head-seed-1=$(OUT)/policy-1,head-seed-2=$(OUT)/policy-2,all-fine-tuned=$(OUT)/full,all-questions=$(OUT)/short-policy,general-only=$(OUT)/general-policy,untrained-encoder=$(OUT)/no-vision-policy,random-normal \
	  --checkpoint $(TINY) --split both --episodes $(EPISODES) --workers 2 --out $(OUT)/ablations
	$(PY) -m common.report $(OUT)/ablations/results.json --out data/results/ablations.json

# What teaches the encoder: the simulator's dense targets, captions (CLIP's contrast), both, or nothing; then the same
# short probe, linear layers on the frozen tokens. Twenty minutes.
ENCODER_STEPS ?= 300
PROBE_STEPS ?= 100
VISION = OMP_NUM_THREADS=1 $(PY) train.py --stage vision $(SPLITS) --resume
encoders: .venv/ready
	$(VISION) --max-steps $(ENCODER_STEPS) --out $(OUT)/encoder-dense
	$(VISION) --max-steps $(ENCODER_STEPS) --teacher captions --out $(OUT)/encoder-contrast
	$(VISION) --max-steps $(ENCODER_STEPS) --teacher both --out $(OUT)/encoder-both
	$(VISION) --max-steps $(PROBE_STEPS) --probe --lr 3e-3 --out $(OUT)/probe-nothing
	for run in dense contrast both; do $(VISION) --max-steps $(PROBE_STEPS) --probe --lr 3e-3 --init $(OUT)/encoder-$$run --out $(OUT)/probe-$$run || exit 1; done

clean:
	rm -rf .venv data/cache runs demo
