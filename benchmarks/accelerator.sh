#!/usr/bin/env bash
# What a GPU is wanted for, each phase by itself: ablation, the recipe, and the tables of benchmarks/README.md.
#
#   python -m experiments.hold_out --objects OBJECTS --backgrounds PHOTOS --coco INSTANCES.json \
#       --output_dir MATERIAL --max_side 320 --subject "(mv_images_[0-9]+|multi_image_[a-z]+)_"
#   bash benchmarks/accelerator.sh sets ablation recipe tables
#
# MATERIAL, OUT (results), SETS (validation sets) and LPIPS (torchvision's AlexNet) may be set, OPTIONS for the
# ablation, RECIPE_OPTIONS for the recipe, and LIMIT, seconds after which the recipe saves and stops, to go on the next
# time: on a CPU, OPTIONS="--steps 2 --img_size 64" RECIPE_OPTIONS="--gpus 0 --batch_size 8 --img_size 64
# --scenes_per_epoch 32 --workers 1" shows in two minutes that all of it runs.
set -euo pipefail
cd "$(dirname "$0")/.."
MATERIAL=${MATERIAL:-MATERIAL} OUT=${OUT:-outputs} SETS=${SETS:-/tmp/sets} LPIPS=${LPIPS:-}
CORES=$(nproc)  # before the next line: nproc counts what OpenMP may have
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
TRAIN="--objects $MATERIAL/train/objects --backgrounds $MATERIAL/train/backgrounds --coco $MATERIAL/train/coco/instances.json"
HELD_OUT=${TRAIN//\/train\//\/val\/}

sets() {  # user style, all styles, and the validation set of the recipe; real completions where REAL has them
  python3 prepare_dataset.py synthesize $HELD_OUT --output_dir $SETS/user --n_scenes ${SCENES:-150} --img_size 256 \
      --style pix2gestalt --seed 11 --no-split --no-preview
  python3 prepare_dataset.py synthesize $HELD_OUT --output_dir $SETS/composed --n_scenes ${SCENES:-150} --img_size 256 \
      --seed 12 --no-split --no-preview
  python3 prepare_dataset.py synthesize $HELD_OUT --output_dir $SETS/validation --n_scenes ${SCENES:-96} --img_size 128 \
      --seed 13 --no-split --no-preview
  [ -z "${REAL:-}" ] || python3 -m experiments.real_holes --input_dir $REAL --output_dir $SETS/real --per_photo 30
}

ablation() {
  python3 -m experiments.ablation $TRAIN --eval_dirs $(ls -d $SETS/user $SETS/composed $SETS/real 2>/dev/null) \
      --processes $CORES ${LPIPS:+--lpips_weights $LPIPS} --json $OUT/ablation.json ${OPTIONS:-}
}

recipe() {
  timeout --signal TERM ${LIMIT:-0} python3 amodal_fusion_transformer.py --config pretrained/recipe.yaml $TRAIN \
      --val_dir $SETS/validation ${LPIPS:+--lpips_weights $LPIPS} --checkpoint_dir $OUT/recipe \
      --export $OUT/recipe.pth ${RECIPE_OPTIONS:-} || [ $? = 124 ]
}

tables() {
  python3 -m benchmarks.inference --sizes 256 512 --slots 5 --batch 8 --plain_limit 256 --runs 5 --no-memory \
      --json $OUT/inference.json
  python3 -m benchmarks.training --sizes 128 --batch 64 --lpips_net alex --runs 5 --json $OUT/training.json
  python3 -m benchmarks.training --sizes 128 --batch 32 --lpips_net alex --runs 5 --plain_limit 0 --json $OUT/training32.json
}

mkdir -p "$OUT" "$SETS"
for phase in "$@"; do
  echo "== $phase, $(date +%T)"
  $phase
done
