#!/bin/bash
# Score the parts of a large table by a look, a task for each part:
#   sbatch --array=0-99 examples/slurm_array.sh LOOK PARTS OUT
#   tsqlora select OUT --fraction 0.3 --data PARTS --out subset.jsonl
# A finished part is its own marker: after a failure the same command does the rest.
set -eu
look=$1 parts=$2 out=$3
part=$(ls "$parts"/*.jsonl | sed -n "$((SLURM_ARRAY_TASK_ID + 1))p")
scores=$out/$(basename "$part" .jsonl).parquet
if [ -f "$scores" ]; then
    echo "$scores is there"
else
    ${TSQLORA:-tsqlora} score "$part" --look "$look" --out "$scores"
fi
