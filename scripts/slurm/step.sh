# Sourced by the batch scripts beside it: torchrun on every node of the job, a process for each GPU, stopped and
# requeued before the time limit.
#
# SLURM sends SIGUSR1 to the batch shell (--signal=B:USR1@...), srun passes it on to torchrun, and torchrun to its
# processes, since --signals-to-handle names it. They stop at the same step and save. torchrun kills what has not
# ended after --shutdown-timeout seconds, so give it the time that a checkpoint takes.

run_step() { # settings of train_single_gpu.py, resume=auto by default: a requeued job continues
  local head gpus
  head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  gpus=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((${SLURM_CPUS_PER_TASK:-1} / gpus > 0 ? SLURM_CPUS_PER_TASK / gpus : 1))}
  stopping=
  # a process that has stopped must not end those that still save
  srun --kill-on-bad-exit=0 --ntasks-per-node=1 --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$gpus" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 40000))" \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${SAVE_SECONDS:-240}" \
    train_single_gpu.py "$@" &
  step=$!
  trap 'stopping=1; kill -USR1 "$step"' USR1
  trap 'kill -TERM "$step"' TERM
  local code=0
  wait "$step" || code=$?
  while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
    code=0
    wait "$step" || code=$?
  done
  if [[ $code -ne 0 && -n $stopping ]]; then
    echo "stopped before the time limit; requeued"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$code"
}
