#!/usr/bin/env bash
# Tokenize RedPajama-1T and the paper's validation sets for the dense model; see docs/how-to/paper_data.md for the folders.
#
#     RAW=/data/raw TOKENS=data bash examples/data/redpajama_1t.sh [options of megapoly preprocess]
set -euo pipefail
here="$(dirname "$0")"
raw=${RAW:?must be the folder with redpajama and validation} tokens=${TOKENS:-data}
tokenizer="$tokens/tokenizers/llama"

bash "$here/tokenize_domains.sh" "$raw/redpajama" "$tokens/redpajama" "$tokenizer" \
    "common_crawl c4 github arxiv books wikipedia stackexchange" "$@"
bash "$here/tokenize_domains.sh" "$raw/validation" "$tokens/validation-llama" "$tokenizer" \
    "c4 books cc pes2o reddit stack wiki ice m2d2 pile wikitext" "$@"
