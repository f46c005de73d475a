#!/usr/bin/env bash
# The paper in miniature: data, comparisons, looks into the models, theory, and the page of all.
#
#     paper.sh OUTPUT one     one seed, one learning rate
#     paper.sh OUTPUT full    three of each
#
# Started again it goes on where it was stopped. TEXT: a folder with a .jsonl for each domain (the built-in text, by
# author). JOBS: runs at a time (one a core). NOTES: Markdown for the page. PYTHON: interpreter (that of the
# repository's .venv, else python3).
set -euo pipefail
output=$1 extent=$2
root="$(cd "$(dirname "$0")/../.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
python=${PYTHON:-$python}

dense=$root/examples/configs/dense_miniature.yaml
moe=$root/examples/configs/moe_miniature.yaml
baselines=(swiglu gelu relu)
case $extent in
    one) rates=() seeds=(--seeds 1) ;;
    full) rates=(--learning-rates 2e-3 4e-3 8e-3) seeds=(--seeds 1 2 3) ;;
    *) echo "The second word must be one or full, not $extent." >&2 && exit 2 ;;
esac

compare() { # recipe, folder, options
    "$python" "$root/tools/compare_activations.py" --config "$1" --config "$output/data/data.yaml" \
        --output "$output/$2" ${JOBS:+--jobs "$JOBS"} "${@:3}"
}

"$python" "$root/tools/prepare_domains.py" ${TEXT:+--input "$TEXT"} --output "$output/data"
compare "$dense" dense --activations "${baselines[@]}" polyrelu polynorm "${rates[@]}" "${seeds[@]}"
compare "$moe" moe --activations "${baselines[@]}" polynorm "${rates[@]}" "${seeds[@]}"
# Orders, compositions and variants of ReLU, Fig. 5: at the recipe's learning rate.
compare "$dense" forms "${seeds[@]}" \
    --activations squared_relu polyrelu:2 polyrelu:4 polynorm:2 polyprelu polyrelunorm
"$python" "$root/tools/analyze.py" --comparison "$output/dense" "$output/moe"
"$python" -m megapoly.theory --output "$output/theory"
"$python" "$root/tools/report.py" "$output/dense" "$output/moe" "$output/forms" --theory "$output/theory" \
    ${NOTES:+--notes "$NOTES"} --output "$output/report"
