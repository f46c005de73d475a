#!/usr/bin/env bash
# Tokenize OLMoE-mix-0924 and the paper's validation sets for the mixture of experts; see docs/how-to/paper_data.md for the folders.
#
#     RAW=/data/raw TOKENS=data bash examples/data/olmoe_mix_0924.sh [options of megapoly preprocess]
set -euo pipefail
here="$(dirname "$0")"
raw=${RAW:?must be the folder with olmoe-mix and validation} tokens=${TOKENS:-data}
tokenizer="$tokens/tokenizers/olmo"

bash "$here/tokenize_domains.sh" "$raw/olmoe-mix" "$tokens/olmoe-mix" "$tokenizer" \
    "dclm starcoder pes2o arxiv open-web-math algebraic-stack wiki" "$@"
bash "$here/tokenize_domains.sh" "$raw/validation" "$tokens/validation-olmo" "$tokenizer" \
    "c4 books cc pes2o reddit stack wiki ice m2d2 pile wikitext" "$@"
