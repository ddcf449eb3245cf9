#!/usr/bin/env bash
# From nothing to images: tokenizer, token cache, transformer, its refiner, samples, report, in runs/quickstart.
# Resumable: rerunning continues; finished stages are not repeated.
#   SEED=1 RUN=runs/seed1 bash launch/quickstart.sh    another seed, in a folder of its own, relative to where you are
#   EXTRAS=cuda12 bash launch/quickstart.sh            on CUDA cards; cuda13 and tpu likewise
# It runs on the accelerator that jax finds, else on the CPU. JAX_PLATFORMS=cpu forces the CPU.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
if [ -z "${RUN:-}" ]; then
  RUN=runs/quickstart
elif [[ $RUN != /* && $here != "$PWD" ]]; then
  RUN=$here/$RUN
fi
SEED=${SEED:-0}

unset PYTHONDONTWRITEBYTECODE # packages are installed uncompiled: each stage would compile what it imports
source launch/environment.sh
choose_environment
stage() { # NAME OUTPUT... -- COMMAND...
  local name=$1
  shift
  "$PYTHON" launch/stage.py --log "$RUN/stages.json" --name "$name" --makes "$@"
}
mvar=("$VENV/bin/python" -m mvar_jax)
seeded=("--config.seed=$SEED")
cached=("${seeded[@]}" "--config.data.cache=$RUN/tokens")

mkdir -p "$RUN"
setup=(env "PYTHON=$PYTHON" "VENV=$VENV" bash launch/setup.sh)
stage install "$VENV/.ready" -- "${setup[@]}"
"${setup[@]}" # does nothing unless the requirements have changed since

platform=$("$VENV/bin/python" -c 'import jax; print(jax.default_backend())')
if [ "$platform" = cpu ]; then
  export JAX_PLATFORMS=cpu
  # Two host devices share the batch: a quarter faster on two cores. LLVM's first level compiles a fifth faster, and the
  # steps are no slower. Huge pages spare most of the page faults.
  export XLA_FLAGS="${XLA_FLAGS:---xla_force_host_platform_device_count=2 --xla_backend_optimization_level=1}"
  export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
fi

stage tokenizer "$RUN/tokenizer/model.json" -- \
  "${mvar[@]}" train --config configs/digits_tokenizer.py --workdir "$RUN/tokenizer" "${seeded[@]}"
stage tokens "$RUN/tokens/cache.json" -- \
  "${mvar[@]}" cache_tokens --config configs/digits.py --tokenizer "$RUN/tokenizer" --out "$RUN/tokens" "${cached[@]}"
stage transformer "$RUN/transformer/model.json" -- \
  "${mvar[@]}" train --config configs/digits.py --workdir "$RUN/transformer" "${cached[@]}"
stage refiner "$RUN/refiner/model.json" -- \
  "${mvar[@]}" train --config configs/digits_refiner.py --workdir "$RUN/refiner" "${cached[@]}" \
  "--config.init_from=$RUN/transformer"
# the model is too sure of itself; the temperature restores some of the variety that this costs
drawn=(--labels 0-9 --num 200 --cfg 0 --temperature 1.15 --seed "$SEED" --batch_size 100 --save_tokens)
stage base_samples "$RUN/base_samples/samples.npz" -- \
  "${mvar[@]}" sample --checkpoint "$RUN/transformer" "${drawn[@]}" --out "$RUN/base_samples"
stage samples "$RUN/samples/samples.npz" -- \
  "${mvar[@]}" sample --checkpoint "$RUN/refiner" "${drawn[@]}" --out "$RUN/samples"
stage report "$RUN/report.json" "$RUN/samples.png" "$RUN/samples.npz" -- \
  "${mvar[@]}" report --tokenizer "$RUN/tokenizer" --transformer "$RUN/transformer" --samples "$RUN/base_samples" \
  --refiner "$RUN/refiner" --refined_samples "$RUN/samples" --stages "$RUN/stages.json" --out "$RUN"
echo "images: $RUN/samples.png, $RUN/reconstructions.png, $RUN/curves.png; figures: $RUN/report.md"
