# make demo     sets up the environment; then, in seconds: a dialogue, a robot, a table, pictures in demo/
# make test     sets up the environment, then runs the whole suite
# make quick    train your own policy in ten minutes: data, stages, heads, evaluation (runs/quick)
# make short    the same for all categories, in half an hour; SEED=1, ARCHETYPES=strict or a number
# make train    the shipped checkpoint from scratch (hours on two cores); make ship, make evaluate: install and score it
# make results  regenerates RESULTS.md and the tables of README and model card from the committed JSON
#
# Steps and rates are the defaults of the scripts. DATA_FLAGS, TRAIN_FLAGS and EVAL_FLAGS are added to every command of
# that kind: make train DATA_FLAGS="--scenes 2000" TRAIN_FLAGS="--max-steps 100"

NEW = import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c "$(NEW)" 2>/dev/null && { echo "$$p"; break; }; done)
PY = .venv/bin/python
PROCESSES ?= 2
RGBD = data/pretrained/robomamba-tiny-rgbd
# One thread per process: on few cores several one-thread processes are faster than one process with several threads.
ONE = OMP_NUM_THREADS=1 $(PY)
RUN = $(if $(GPU),$(PY),$(ONE) -m torch.distributed.run --standalone --nproc-per-node $(PROCESSES))
READ = $(if $(GPU),--workers $(PROCESSES))
BUILD = $(PY) -m data.build --workers $(PROCESSES)
, := ,

.PHONY: simulator demo test lint quick short train ship evaluate questions targets ablations results clean

# ---- environment: an existing .venv is used as it is; PyBullet has wheels for Python 3.11 on Linux only

.venv/ready: pyproject.toml constraints.txt
	@test -x $(PY) || "$(PYTHON)" -c "$(NEW)" 2> /dev/null || { echo "No Python >= 3.11 here. Install 3.11, or run \
	'uv venv --seed --python 3.11' (uv fetches one), or name yours: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(PY) || "$(PYTHON)" -m venv .venv
	@$(PY) -c "import pip; $(NEW)" 2> /dev/null || { echo "The Python of .venv is too old or has no pip (uv venv needs \
	--seed, Debian the package python3.11-venv). Remove .venv and run make again." >&2; exit 1; }
	@echo "Installing into .venv: minutes; gigabytes where pip takes a torch with CUDA (README, troubleshooting)."
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt ".[test,dev,plots,parity,gym]"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --only-binary pybullet ".[sim]" \
	  2> .venv/sim.log || echo "The simulator is left out: PyBullet has no wheel for this machine and Python."
	@touch $@

simulator: .venv/ready
	@$(PY) -c "import pybullet" > /dev/null 2>&1 || { echo "This needs the simulator, and PyBullet has wheels for Linux \
	x86_64 with Python 3.11 only. What works without it: README.md, quick start." >&2; exit 1; }

# ---- try it

demo: simulator
	$(PY) sim_eval.py --demo --out demo

test: .venv/ready
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(PY) -m pytest

lint: .venv/ready
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .

# ---- ten minutes: drawers and doors only, every stage short

QUICK = runs/quick
QUICK_CATEGORIES ?= drawer-door
QUICK_SCENES ?= 2000
QUICK_VAL_SCENES ?= 100
QUICK_VISION_STEPS ?= 400
QUICK_COTRAIN_STEPS ?= 150
QUICK_EPISODES ?= 100
QUICK_DATA = --data $(QUICK)/data --val $(QUICK)/val $(READ)
quick: simulator
	$(BUILD) --categories $(QUICK_CATEGORIES) --scenes $(QUICK_SCENES) --out $(QUICK)/data
	$(BUILD) --categories $(QUICK_CATEGORIES) --split val --scenes $(QUICK_VAL_SCENES) --out $(QUICK)/val
	$(RUN) train.py --stage vision $(QUICK_DATA) --max-steps $(QUICK_VISION_STEPS) --out $(QUICK)/vision --resume
	$(RUN) train.py --stage cotrain $(QUICK_DATA) --init $(QUICK)/vision \
	  --max-steps $(QUICK_COTRAIN_STEPS) --out $(QUICK)/cotrain --resume
	$(PY) finetune_policy.py --checkpoint $(QUICK)/cotrain $(QUICK_DATA) --out $(QUICK)/policy
	$(PY) finetune_policy.py --checkpoint $(QUICK)/cotrain $(QUICK_DATA) --out $(QUICK)/random --random-backbone
	$(PY) -m sim.policies --make-blind-table $(QUICK)/data/manipulation.jsonl --out $(QUICK)/blind_table.json
	$(PY) sim_eval.py --policy model,model-depth,random-backbone-depth=$(QUICK)/random,blind,random-normal,expert \
	  --checkpoint $(QUICK)/policy --blind-table $(QUICK)/blind_table.json --split drawer-door \
	  --episodes $(QUICK_EPISODES) --workers $(PROCESSES) --strips 6 --out $(QUICK)/eval

# ---- all stages in half an hour on two quiet cores: for seeds, the strict variant, ablations and the variety curve
# (make short ARCHETYPES=6 SHORT=runs/variety-6 SHORT_SCENES=3500 SHORT_STEPS="800 40 350")

SEED ?= 0
ARCHETYPES ?= all
SHORT ?= runs/short-$(ARCHETYPES)-$(SEED)
SHORT_DATA = --data $(SHORT)/data --val $(SHORT)/val --seed $(SEED) --resume $(READ)
SHORT_SCENES ?= 8000
SHORT_STEPS ?= 1800 60 800
short: simulator
	$(BUILD) --scenes $(SHORT_SCENES) --archetypes $(ARCHETYPES) --out $(SHORT)/data $(DATA_FLAGS)
	$(BUILD) --scenes 200 --split val --out $(SHORT)/val
	$(RUN) train.py --stage vision $(SHORT_DATA) $(TRAIN_FLAGS) --max-steps $(word 1,$(SHORT_STEPS)) --out $(SHORT)/vision
	$(RUN) train.py --stage align $(SHORT_DATA) $(TRAIN_FLAGS) --max-steps $(word 2,$(SHORT_STEPS)) \
	  --init $(SHORT)/vision --out $(SHORT)/align
	$(RUN) train.py --stage cotrain $(SHORT_DATA) $(TRAIN_FLAGS) --max-steps $(word 3,$(SHORT_STEPS)) \
	  --init $(SHORT)/align --out $(SHORT)/cotrain
	$(PY) finetune_policy.py $(SHORT_DATA) --epochs 20 --half --checkpoint $(SHORT)/cotrain --out $(SHORT)/policy

# ---- the shipped checkpoint from scratch; every stage resumes where it was interrupted

train: simulator
	$(BUILD) --scenes 30000 --out data/cache/train $(DATA_FLAGS)
	$(BUILD) --scenes 600 --split val --out data/cache/val $(DATA_FLAGS)
	$(RUN) train.py --stage vision --resume $(READ) $(TRAIN_FLAGS)
	$(RUN) train.py --stage align --resume $(READ) $(TRAIN_FLAGS)
	$(RUN) train.py --stage cotrain --resume $(READ) $(TRAIN_FLAGS)
	$(PY) finetune_policy.py --half --resume $(READ)

# What is committed of a training: weights, curves, the manifest of the data.
ship: .venv/ready
	mkdir -p $(RGBD)
	cp $(addprefix runs/policy/,model.safetensors config.json vocab.tiktoken policy.json) $(RGBD)/
	cp data/cache/train/manifest.json $(RGBD)/data.json
	echo stage,step,seconds,name,value > $(RGBD)/metrics.csv
	for s in vision align cotrain policy; do tail -n +2 runs/$$s/metrics.csv | sed "s/^/$$s,/"; done >> $(RGBD)/metrics.csv

# The tables: manipulation on test scenes next to the baselines, then test questions in words.
OURS = model,model-point,model-text,model-depth,model-depth-raw,model-depth-head,model-depth-head-raw
BASELINES = random-backbone-depth=runs/random,random-depth,blind,part-pixel-normal,random-normal,random
EVALUATE = $(PY) sim_eval.py --checkpoint $(RGBD) --split both --episodes 550 --workers $(PROCESSES) $(EVAL_FLAGS)
runs/random/model.safetensors:
	$(PY) finetune_policy.py --random-backbone --out runs/random
evaluate: simulator runs/random/model.safetensors
	$(EVALUATE) --policy $(OURS),$(BASELINES),expert --seed 11 --out runs/eval
	$(PY) -m common.report runs/eval/results.json --out $(RGBD)/results.json
	$(BUILD) --scenes 300 --split test-seen --out data/cache/test-seen $(DATA_FLAGS)
	$(BUILD) --scenes 300 --split test-unseen --out data/cache/test-unseen $(DATA_FLAGS)
	$(ONE) -m extras.reasoning_eval --checkpoint $(RGBD) --train data/cache/train \
	  --data data/cache/test-seen,data/cache/test-unseen --out runs/reasoning
	cp runs/reasoning/reasoning.json $(RGBD)/
	$(PY) -m extras.results

# Ablation of the robot questions: short co-trainings after the first two stages of make short, and heads on each.
BASE = presence=3,count=2,parts=2,state=3
PLANS = plan=0,possible=0,success=0,past=0,future=0,movable=0
WITH = $(RUN) train.py --stage cotrain $(SHORT_DATA) $(TRAIN_FLAGS) --init $(SHORT)/align --max-steps 400
WITH_HEADS = $(PY) finetune_policy.py $(SHORT_DATA) --epochs 20
questions: .venv/ready
	$(WITH) --out $(SHORT)/with-all
	$(WITH) --more $(BASE),$(PLANS) --out $(SHORT)/with-contacts
	$(WITH) --more $(BASE),possible=4,success=4,past=4,contact=0 --out $(SHORT)/with-plans
	$(WITH) --more $(BASE),$(PLANS),contact=0 --out $(SHORT)/with-neither
	$(WITH_HEADS) --checkpoint $(SHORT)/with-all --out $(SHORT)/with-all-policy
	$(WITH_HEADS) --checkpoint $(SHORT)/with-contacts --out $(SHORT)/with-contacts-policy
	$(WITH_HEADS) --checkpoint $(SHORT)/with-plans --out $(SHORT)/with-plans-policy
	$(WITH_HEADS) --checkpoint $(SHORT)/with-neither --out $(SHORT)/with-neither-policy

# Ablation of the targets of stage vision and of the grammar's share of the pictures, scored on categories that were shown
# without labels and archetypes that were never shown. A row is named after the terms left out of the loss.
TARGETS = runs/targets
HELD = --hold-out Display,Toaster,KitchenPot,FoldingChair,trays,latch
TARGET_ROWS = nothing arm motion part named kinds geometry words encoder grammar-20 grammar-60
HELD_SCENES = --split val --categories Display,Toaster,KitchenPot,FoldingChair,grammar:trays,grammar:latch
# $(1): row; $(2): stage cotrain's --init, stage vision's --more; $(3): data
TARGET_DATA = --data $(TARGETS)/$(3) --val $(TARGETS)/val --resume $(READ)
define cotrained
	$(RUN) train.py --stage cotrain $(TARGET_DATA) --init "$(2)" --max-steps 350 --out $(TARGETS)/$(1)/cotrain
	$(PY) finetune_policy.py $(TARGET_DATA) --checkpoint $(TARGETS)/$(1)/cotrain --epochs 20 --out $(TARGETS)/$(1)/policy
endef
define without
	$(RUN) train.py --stage vision $(TARGET_DATA) --more "$(2)" --max-steps 800 --out $(TARGETS)/$(1)/vision
	$(call cotrained,$(1),$(TARGETS)/$(1)/vision,$(3))
endef
targets: simulator
	$(BUILD) $(HELD) --scenes 3500 --out $(TARGETS)/data
	$(BUILD) $(HELD) --scenes 3500 --grammar 0.2 --out $(TARGETS)/data-20
	$(BUILD) $(HELD) --scenes 3500 --grammar 0.6 --out $(TARGETS)/data-60
	$(BUILD) $(HELD) --scenes 600 --split transfer --out $(TARGETS)/val
	$(call without,nothing,,data)
	$(call without,arm,arm=0,data)
	$(call without,motion,motion=0,data)
	$(call without,part,part=0$(,)dice=0,data)
	$(call without,named,contact=0$(,)aim=0$(,)motion=0$(,)part=0$(,)dice=0$(,)arm=0,data)
	$(call without,kinds,movable=0$(,)kinds=0$(,)openness=0,data)
	$(call without,geometry,geometry=0$(,)mask=0,data)
	$(call without,words,words=0,data)
	$(call cotrained,encoder,,data)
	$(call without,grammar-20,,data-20)
	$(call without,grammar-60,,data-60)
	@# the policies: ROW=FOLDER,ROW-depth=FOLDER of every row
	$(PY) sim_eval.py $(HELD_SCENES) --episodes 600 --workers $(PROCESSES) --out $(TARGETS)/eval --policy \
	  $(subst $(eval ) ,$(,),$(foreach r,$(TARGET_ROWS),$(r)=$(TARGETS)/$(r)/policy $(r)-depth=$(TARGETS)/$(r)/policy))
	$(PY) -m common.report $(TARGETS)/eval/results.json --out data/results/targets.json

# Other heads on the shipped backbone, all weights fine-tuned, and half of the action from the oracle.
HEAD = $(PY) finetune_policy.py --resume
HALVES = model,model-pixel,model-direction,model-depth
HEADS = seed-1=runs/head-seed-1,mean-pool=runs/head-mean,one-mlp=runs/head-one,hidden-48=runs/head-48,seed-1-depth=runs/head-seed-1
ablations: simulator
	$(HEAD) --out runs/head-seed-1 --seed 1
	$(HEAD) --out runs/head-mean --pool mean
	$(HEAD) --out runs/head-one --head one_mlp
	$(HEAD) --out runs/head-48 --hidden 48
	$(HEAD) --out runs/full --checkpoint runs/policy --unfreeze --keep-head --epochs 3 --lr 3e-4
	$(EVALUATE) --policy $(HALVES),$(HEADS),all-fine-tuned=runs/full --seed 11 --out runs/ablations
	$(PY) -m common.report runs/ablations/results.json --out data/results/ablations.json

results: .venv/ready
	$(PY) -m extras.results

clean:
	rm -rf .venv data/cache runs demo build *.egg-info
