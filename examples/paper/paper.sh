#!/usr/bin/env bash
# The paper in miniature: data, comparisons, analyses of the models, theory, and a report page.
#
#     paper.sh OUTPUT one     one seed, one learning rate
#     paper.sh OUTPUT full    three or five seeds, a grid of learning rates
#
# The same command resumes where it was stopped. Environment variables: TEXT, a folder with a .jsonl file for each domain
# (default: the built-in text, by author); JOBS, runs at the same time (default: one for each core); NOTES, Markdown for
# the page; PYTHON, interpreter (default: that of the repository's .venv, else python3).
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 OUTPUT one|full" >&2 && exit 2; }
output=$1 extent=$2
root="$(cd "$(dirname "$0")/../.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
python=${PYTHON:-$python}

one=(--learning-rates 8e-3 --seeds 1)
case $extent in
    one) dense=("${one[@]}") moe=("${one[@]}") forms=("${one[@]}") ;;
    full) # Rates within 0.02 of an activation's best with the first seed are also trained with the others.
        dense=(--learning-rates 2e-3 4e-3 8e-3 1.6e-2 --margin 0.02 --seeds 1 2 3 4 5)
        moe=(--learning-rates 4e-3 8e-3 1.6e-2 --margin 0.02 --seeds 1 2 3)
        forms=(--learning-rates 8e-3 --seeds 1 2 3)
        ;;
    *) echo "The second argument must be one or full, not $extent." >&2 && exit 2 ;;
esac

compare() { # dense or moe, folder, options
    "$python" -m megapoly compare --config "$1_miniature" \
        --config "$output/data/data.yaml" --output "$output/$2" ${JOBS:+--jobs "$JOBS"} "${@:3}"
}

"$python" -m megapoly prepare-domains ${TEXT:+--input "$TEXT"} --output "$output/data"
compare dense dense "${dense[@]}" --activations swiglu gelu relu polyrelu polynorm
compare moe moe "${moe[@]}" --activations swiglu gelu relu polynorm
# Orders, compositions and variants of ReLU (Fig. 5), and a PolyNorm gate instead of SwiGLU's, at one rate.
compare dense forms "${forms[@]}" --activations \
    squared_relu polyrelu:2 polyrelu:4 polyprelu polyrelunorm gated_polynorm
folders=(dense moe forms)
if [ "$extent" = full ]; then # Change one thing at a time, to see what the ranking depends on.
    compare dense wide "${forms[@]}" --model.ffn_hidden_size 1056 --activations swiglu polyrelu polynorm
    compare dense long "${forms[@]}" --training.train_iters 8000 --training.eval_interval 400 \
        --activations swiglu polynorm
    compare dense warm_up "${forms[@]}" --optimizer.lr_warmup_iters 400 --activations swiglu polynorm
    compare dense norm "${forms[@]}" --model.activation_norm l2 --activations polynorm
    compare dense eps "${forms[@]}" --model.activation_eps 1e-3 --activations polynorm
    compare dense small_init "${one[@]}" --model.init_method_std 0.02 --activations swiglu gelu relu polynorm
    folders+=(wide long warm_up norm eps small_init)
fi
"$python" -m megapoly analyze --comparison "$output/dense" "$output/moe"
# The tensors are small: a second thread does not make it faster.
OMP_NUM_THREADS=1 "$python" -m megapoly theory --output "$output/theory"
"$python" -m megapoly report "${folders[@]/#/$output/}" --theory "$output/theory" \
    ${NOTES:+--notes "$NOTES"} --output "$output/report"
