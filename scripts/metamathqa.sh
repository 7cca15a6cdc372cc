#!/usr/bin/env bash
# LoTA in PEFT's comparison of methods on MetaMathQA: calibrate, extract, train, measure; one JSON file per row.
#
#   scripts/metamathqa.sh                          # Llama-3.2-3B on one GPU of 24 to 48 GB
#   scripts/metamathqa.sh model=blank_model model.name_or_path=FOLDER data_dir=DATA n_examples=64    # any model, local rows
#     (weights in fp32: also model.policy_dtype=float32 stochastic_rounding=false optimizer_state=float32; a model of
#     512 positions: max_length=512 max_prompt_length=256; matrices with sides below 64: BLOCK=16; a GPU is not needed)
# Local rows: DATA/tasks/metamathqa/train.jsonl, gsm8k/train.jsonl and test.jsonl, finewiki/test.jsonl.
#
# Arguments are settings of train_single_gpu.py and go to every training run. From the environment:
#   OUT=metamathqa     results: OUT/results/*.json, OUT/runs, OUT/masks
#   SPARSITY=...       of the masks: 9.2M of the 2.8B entries of attention and MLP
#   BLOCK=64           side of the blocks of the second row
#   MEASURE="..."      further arguments of scripts/metamathqa.py, such as "--n_examples 100"
# Give the same command again after an interruption: what is finished is skipped, a started run goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

OUT=${OUT:-metamathqa}
SPARSITY=${SPARSITY:-0.99674479}
BLOCK=${BLOCK:-64}
MEASURE=${MEASURE:-}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}

for setting in "$@"; do
  case $setting in data_dir=*) MEASURE+=" --data_dir ${setting#data_dir=}" ;; esac
done

train() {  # experiment, name of the run, settings
  local experiment=$1 name=$2; shift 2
  "$PYTHON" -u train_single_gpu.py "+experiment=$experiment" "exp_name=$name" "local_dirs=[$OUT/runs]" "$@"
}

last() {  # name of a run: the folder of its checkpoint
  find "$OUT/runs/$1" -name policy.pt -printf '%T@ %h\n' | sort -n | tail -n 1 | cut -d ' ' -f 2-
}

train metamathqa_calibrate calibrate "$@"
base=$(sed -n 's/^  name_or_path: //p' "$OUT/runs/calibrate/config.yaml")
for row in entry block; do
  granularity=element
  if [ "$row" = block ]; then granularity="block --block $BLOCK"; fi
  if [ ! -f "$OUT/masks/$row/summary.json" ]; then
    "$PYTHON" extract_masks.py --base "$base" --tuned "$(last calibrate)" --sparsities "$SPARSITY" \
      --granularity $granularity --out "$OUT/masks" --name "$row"
  fi
  train metamathqa "$row" "mask_path=$OUT/masks/$row/${SPARSITY}_mask.pt" "$@"
  "$PYTHON" -m scripts.metamathqa "$(last "$row")" --name "$row" --out "$OUT/results" $MEASURE
done
