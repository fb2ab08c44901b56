#!/usr/bin/env bash
# The whole life of a teacher, on drawn ears: every command of the README's walk-through, in order.
#
#   examples/demo.sh [FOLDER]        (make demo: FOLDER is demo/, and earteach is on the PATH)
#
# PEOPLE, EPOCHS, BACKBONE, SIZE and INTERRUPT_AFTER (seconds) change its size; the tests run a small one.
set -euo pipefail

examples=$(cd "$(dirname "$0")" && pwd)
people=${PEOPLE:-60}
epochs=${EPOCHS:-20}
backbone=${BACKBONE:-convnext_atto}
size=${SIZE:-64}
interrupt_after=${INTERRUPT_AFTER:-40}

step() { printf '\n== %s\n' "$1" >&2; }
run() {
    printf '$ %s\n' "$*" >&2
    "$@"
}

mkdir "${1:-demo}"
cd "${1:-demo}"

step "Draw ears: people, photos of each ear, boxes. No person was photographed."
run python "$examples/make_sample_ears.py" ears --people "$people"

step "Look at every picture and every box."
run earteach validate-data ears/train_teacher.npy ears/val_teacher.npy --contact-sheet worst.png

step "The untrained start, as a file, so that it can be measured too."
run python "$examples/random_start.py" "$backbone" start.safetensors

step "Train without labels; Ctrl-C after $interrupt_after seconds."
run timeout --foreground --preserve-status -s INT "$interrupt_after" earteach train \
    --train-metadata ears/train_teacher.npy --val-metadata ears/val_teacher.npy \
    --backbone "$backbone" --pretrained-path start.safetensors --freeze-stride 0 --keep-start 0 --image-size "$size" \
    --batch-size 16 --learning-rate 1e-3 --max-epochs "$epochs" --warmup-epochs 3 --output-dir outputs --experiment-name first ||
    echo "(stopped: exit code $?)" >&2

step "Go on; nothing is typed again."
run earteach resume outputs/first

step "How it went, on one page: open outputs/first/report.html in a browser."
run earteach report outputs/first

step "See what it remembers."
run earteach collage outputs/first -o collage.png

step "Hand the backbone on; open it with nothing but timm."
run earteach export-backbone outputs/first teacher.safetensors
run python -c "
import timm, torch
model = timm.create_model('$backbone', num_classes=0, checkpoint_path='teacher.safetensors').eval()
print('timm alone:', tuple(model(torch.zeros(1, 3, $size, $size)).shape))"

step "Embed people that training never saw, before and after."
run earteach embed ears/eval.csv start.npy --weights start.safetensors --backbone "$backbone" --image-size "$size"
run earteach embed ears/eval.csv teacher.npy --weights teacher.safetensors

step "Who is who? The teacher alone, with curves and the pairs that confuse it; then against the untrained start."
run earteach evaluate teacher.npy ears/eval.csv --plots plots --sheet look-alikes.png
run earteach evaluate --compare start.npy teacher.npy ears/eval.csv --plots comparison
