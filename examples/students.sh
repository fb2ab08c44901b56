#!/usr/bin/env bash
# From photographs without labels to better students, on drawn ears: a teacher is trained, exported, and two small models
# learn with and without it.
#
#   examples/students.sh [FOLDER]       (make students: FOLDER is students/, and earteach is on the PATH)
#
# START: pretrained weights of BACKBONE to start the teacher from (default: timm's hub, and random weights where that
# cannot be reached; `none`: random weights).
# PEOPLE, EPOCHS, SIZE and SEEDS change the size; OPTIONS goes to both students (--steps 100, say).
set -euo pipefail

examples=$(cd "$(dirname "$0")" && pwd)
people=${PEOPLE:-190}
start=${START:-}
backbone=${BACKBONE:-tf_efficientnet_lite0}
random_backbone=${BACKBONE:-resnet18} # learns faster from random weights
epochs=${EPOCHS:-2}
size=${SIZE:-96}
seeds=${SEEDS:-0 1 2}

step() { printf '\n== %s\n' "$1" >&2; }
run() {
    printf '$ %s\n' "$*" >&2
    "$@"
}
if [ -n "$start" ] && [ "$start" != none ]; then start=$(realpath "$start"); fi

mkdir "${1:-students}"
cd "${1:-students}"

step "Draw ears with boxes and landmarks. No person was photographed."
run python "$examples/make_sample_ears.py" ears --people "$people" --val-people 12 --eval-people 24 --seed 11

teacher=(--train-metadata ears/train_teacher.npy --val-metadata ears/val_teacher.npy
    --image-size "$size" --output-dir outputs --experiment-name teacher)
random=(--backbone "$random_backbone" --no-pretrained --freeze-stride 0 --keep-start 0 --learning-rate 1e-3 --head-rate 1)
step "Train the teacher on the drawn ears; it is told neither who they are nor where their parts are."
if [ "$start" = none ]; then
    run earteach train "${teacher[@]}" "${random[@]}" --max-epochs "$((4 * epochs))"
elif [ -n "$start" ]; then
    run earteach train "${teacher[@]}" --backbone "$backbone" --pretrained-path "$start" --max-epochs "$epochs"
else
    run earteach train "${teacher[@]}" --backbone "$backbone" --max-epochs "$epochs" 2> >(tee train.log >&2) || {
        code=$?
        wait $! || true # for tee
        grep -q "timm's hub gave none" train.log || exit "$code"
        step "NO PRETRAINED WEIGHTS: the teacher starts from random ones, and will be of little use (START=weights.safetensors)."
        run earteach train "${teacher[@]}" "${random[@]}" --max-epochs "$((4 * epochs))"
    }
fi

step "Hand it over."
run earteach export-backbone outputs/teacher teacher --consent "drawn ears: nobody was photographed" --license "as this project"
run earteach verify teacher

step "A landmarker, with and without it."
# shellcheck disable=SC2086  (several words)
run python "$examples/students/landmarker.py" ears teacher --seeds $seeds --draw landmarks.png --json landmarks.json ${OPTIONS:-} | tee landmarks.md

step "A detector, with and without it."
# shellcheck disable=SC2086
run python "$examples/students/detector.py" ears teacher --seeds $seeds --draw detections.png --json detections.json ${OPTIONS:-} | tee detections.md
