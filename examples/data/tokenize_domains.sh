#!/usr/bin/env bash
# Tokenize folders of text, one pair of token files each.
#
#     tokenize_domains.sh SOURCE TARGET TOKENIZER DOMAINS [options of megapoly preprocess]
#
# SOURCE/DOMAIN becomes TARGET/DOMAIN_text_document.bin for each of DOMAINS, a list in quotes. A domain without a folder
# is an error, before anything is done. WORKERS: processes (one for each core). PYTHON: interpreter (that of the
# repository's .venv, else python3).
set -euo pipefail
source_folder=$1 target=$2 tokenizer=$3
read -r -a domains <<<"$4"
shift 4

root="$(dirname "$0")/../.."
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
python=${PYTHON:-$python}

missing=()
for domain in "${domains[@]}"; do
    [ -d "$source_folder/$domain" ] || missing+=("$source_folder/$domain")
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "Every domain must have its folder; missing: ${missing[*]}. See docs/how-to/paper_data.md." >&2
    exit 2
fi
for domain in "${domains[@]}"; do
    echo "$source_folder/$domain"
    "$python" -m megapoly preprocess --input "$source_folder/$domain" --output-prefix "$target/$domain" \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$tokenizer" --append-eod \
        --workers "${WORKERS:-$(nproc)}" "$@"
done
