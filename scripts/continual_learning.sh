#!/usr/bin/env bash
# Three tasks one after the other, by every method of lotto.py, over several seeds; one table, and plots.
#
#   scripts/continual_learning.sh                             # the embedded tiny model
#   scripts/continual_learning.sh model=llama3 'tasks=[gsm8k,sql,samsum]' lr=1e-4
#
# Arguments are settings of lotto.py and go to every sequence. From the environment:
#   SEEDS="0 1 2"      a whole repetition each: data order, calibration, masks
#   METHODS="..."      of lotto, lota, random, lora, fft
#   OUT=continual      results: OUT/comparison.{txt,json}, OUT/{final,first}.png, OUT/runs/<method>_<seed>/
#   JOBS=2             sequences at a time, each on one core
# Give the same command again after an interruption: what is finished is skipped, a started sequence goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

SEEDS=${SEEDS:-0 1 2}
METHODS=${METHODS:-lotto lota random lora fft}
OUT=${OUT:-continual}
JOBS=${JOBS:-2}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

# The embedded model's recipe. Learning rates come from toy_sort alone, with another seed, by the loss on test rows;
# forgetting was not looked at: full fine-tuning's best, the masks' rate of the same loss, LoRA's below its edge.
toy=(model=tiny 'tasks=[toy_shift,toy_sort,toy_reverse]' sparsity=0.9 n_examples=3200 batch_size=16
     lr_scheduler=linear warmup_steps=20 calibrate.n_steps=100 calibrate.lr=1e-3 do_first_eval=false
     eval_every=100000 n_eval_examples=200 eval_batch_size=100)
declare -A toy_lr=([lotto]=3e-3 [lota]=3e-3 [random]=1e-2 [lora]=3e-3 [fft]=3e-3)

is_toy=true
for setting in "$@"; do
  case $setting in model=tiny) ;; model=*) is_toy=false ;; esac
done

sequence() { # method seed settings...
  local method=$1 seed=$2 name=$1_$2 recipe=()
  shift 2
  if $is_toy; then recipe=("${toy[@]}" "lr=${toy_lr[$method]}"); fi
  echo "$name"
  "$PYTHON" lotto.py "exp_name=$name" "method=$method" "seed=$seed" "local_dirs=[$OUT/runs]" \
    "${recipe[@]}" "$@" > "$OUT/runs/$name.log" 2>&1 || { tail -5 "$OUT/runs/$name.log" >&2; return 1; }
}

mkdir -p "$OUT/runs"
running=0 runs=()
for seed in $SEEDS; do
  for method in $METHODS; do
    runs+=("$OUT/runs/${method}_$seed")
    if ((running == JOBS)); then wait -n; running=$((running - 1)); fi
    sequence "$method" "$seed" "$@" &
    running=$((running + 1))
  done
done
while ((running > 0)); do wait -n; running=$((running - 1)); done
"$PYTHON" -m lota.report.sequence_table "${runs[@]}" --out "$OUT"
