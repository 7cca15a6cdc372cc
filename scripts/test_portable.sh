#!/usr/bin/env bash
# The tests under the kernels of older processors and under other numbers of threads, one line each.
#
#   scripts/test_portable.sh                 # three levels with one thread; 2 and 4 threads at this machine's level
#   FULL=1 scripts/test_portable.sh          # every level with every number of threads
#   scripts/test_portable.sh tests/test_optim.py -k bf16     # arguments go to pytest
#
# From the environment: PYTHON=.venv/bin/python, CORES=2 (workers x threads), LOGS=folder for the full output.
# Levels: `default` is SSE alone, `avx2`, and `unset` is whatever the machine has. MKL_CBWR is set beside
# MKL_ENABLE_INSTRUCTIONS because MKL heeds the latter on Intel processors only.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
CORES=${CORES:-$(nproc)}
LOGS=${LOGS:-$(mktemp -d)}
FULL=${FULL:-}
mkdir -p "$LOGS"

combinations="default:1 avx2:1 unset:1 unset:2 unset:4"
if [ -n "$FULL" ]; then
  combinations=
  for level in default avx2 unset; do for threads in 1 2 4; do combinations+=" $level:$threads"; done; done
fi

settings() { # level threads: what the environment of this combination holds
  case $1 in
    default) echo ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 ;;
    avx2) echo ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ;;
  esac
  # MKL_DYNAMIC: MKL would take no more threads than cores. passive: threads that wait leave the core to others.
  echo "OMP_NUM_THREADS=$2 MKL_NUM_THREADS=$2 OPENBLAS_NUM_THREADS=$2 MKL_DYNAMIC=FALSE OMP_WAIT_POLICY=passive"
}

# The level must have been taken: a processor without AVX2 stays at DEFAULT, and nothing would be tested.
expect() { case $1 in default) echo DEFAULT ;; avx2) echo AVX2 ;; *) echo '.*' ;; esac; }

failed=0
printf '%-8s %-7s %-10s %s\n' level threads capability result
for combination in $combinations; do
  level=${combination%:*} threads=${combination#*:}
  log="$LOGS/$level-$threads.log"
  workers=$((CORES / threads > 1 ? CORES / threads : 1))
  run=(env -u ATEN_CPU_CAPABILITY -u MKL_ENABLE_INSTRUCTIONS -u MKL_CBWR -u ONEDNN_MAX_CPU_ISA
       $(settings "$level" "$threads"))
  found=$("${run[@]}" "$PYTHON" -c \
    'import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), sep=":")')
  if ! [[ $found =~ ^$(expect "$level"):$threads$ ]]; then
    result="not run: torch has $found"
    failed=1
  elif "${run[@]}" "$PYTHON" -m pytest -n "$workers" "$@" > "$log" 2>&1; then
    result=$(tail -n 1 "$log")
  else
    result="FAILED: $(tail -n 1 "$log"), see $log"
    failed=1
  fi
  printf '%-8s %-7s %-10s %s\n' "$level" "$threads" "${found%:*}" "$result"
  if [[ $result == FAILED* ]]; then grep -E '^(FAILED|ERROR) ' "$log" | sed 's/^/    /'; fi
done
exit "$failed"
