#!/usr/bin/env bash
# The paper in miniature: data, comparisons, looks into the models, theory, and the page of all.
#
#     paper.sh OUTPUT one     one seed, one learning rate
#     paper.sh OUTPUT full    three seeds, a grid of learning rates
#
# Started again it goes on where it was stopped. TEXT: a folder with a .jsonl for each domain (the built-in text, by
# author). JOBS: runs at a time (one a core). NOTES: Markdown for the page. PYTHON: interpreter (that of the
# repository's .venv, else python3).
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: $0 OUTPUT one|full" >&2 && exit 2; }
output=$1 extent=$2
root="$(cd "$(dirname "$0")/../.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
python=${PYTHON:-$python}

dense=$root/examples/configs/dense_miniature.yaml
moe=$root/examples/configs/moe_miniature.yaml
baselines=(swiglu gelu relu)
case $extent in
    one) dense_rates=(8e-3) moe_rates=(8e-3) seeds=(1) ;;
    full)
        # Rates that the first seed puts within 0.02 of the best get the other seeds, too.
        dense_rates=(2e-3 4e-3 8e-3 1.6e-2 --margin 0.02) moe_rates=(4e-3 8e-3 1.6e-2 --margin 0.02) seeds=(1 2 3)
        ;;
    *) echo "The second word must be one or full, not $extent." >&2 && exit 2 ;;
esac

compare() { # recipe, folder, options
    "$python" "$root/tools/compare_activations.py" --config "$1" --config "$output/data/data.yaml" \
        --output "$output/$2" ${JOBS:+--jobs "$JOBS"} "${@:3}" --seeds "${seeds[@]}"
}

"$python" "$root/tools/prepare_domains.py" ${TEXT:+--input "$TEXT"} --output "$output/data"
compare "$dense" dense --activations "${baselines[@]}" polyrelu polynorm --learning-rates "${dense_rates[@]}"
compare "$moe" moe --activations "${baselines[@]}" polynorm --learning-rates "${moe_rates[@]}"
# Orders, compositions and variants of ReLU (Fig. 5) and what takes the place of SwiGLU's gate, at one rate.
compare "$dense" forms --learning-rates 8e-3 --activations \
    squared_relu polyrelu:2 polyrelu:4 polyprelu polyrelunorm gated_polynorm
folders=(dense moe forms)
if [ "$extent" = full ]; then # What the ranking depends on: width of the FFN, tokens, initial weights.
    compare "$dense" wide --model.ffn_hidden_size 1056 --learning-rates 8e-3 --activations swiglu polyrelu polynorm
    compare "$dense" long --training.train_iters 8000 --training.eval_interval 400 --learning-rates 8e-3 \
        --activations swiglu polynorm
    seeds=(1)
    compare "$dense" small_init --model.init_method_std 0.02 --learning-rates 8e-3 \
        --activations "${baselines[@]}" polynorm
    folders+=(wide long small_init)
fi
"$python" "$root/tools/analyze.py" --comparison "$output/dense" "$output/moe"
OMP_NUM_THREADS=1 "$python" -m megapoly.theory --output "$output/theory"
"$python" "$root/tools/report.py" "${folders[@]/#/$output/}" --theory "$output/theory" \
    ${NOTES:+--notes "$NOTES"} --output "$output/report"
