import argparse
import json
import math
from collections import Counter

import numpy as np
import pytest
from token_data import read_documents, write_jsonl

from megapoly.data.preprocess import stats
from megapoly.data.tokenizer import load_tokenizer


def run_command(capsys, *args) -> str:
    parser = argparse.ArgumentParser()
    stats.add_arguments(parser)
    assert stats.run(parser.parse_args(list(map(str, args)))) == 0
    return capsys.readouterr().out


def test_counts_are_those_of_all_ids_at_once(run, tmp_path, texts, capsys):
    run(write_jsonl(tmp_path / "a.jsonl", [*texts, ""]), keep_empty=True)
    output = run_command(capsys, tmp_path / "out", "--json", tmp_path / "stats.json")
    (found,) = json.loads((tmp_path / "stats.json").read_text())
    documents = read_documents(tmp_path / "out_text_document")
    counts = Counter(sum(documents, []))
    tokens = sum(counts.values())
    assert (found["documents"], found["sequences"]) == (len(documents), len(documents) - 1)
    assert (found["tokens"], found["bin_bytes"]) == (tokens, 2 * tokens)
    assert found["distinct_ids"] == len(counts)
    entropy = -sum(n / tokens * math.log(n / tokens) for n in counts.values())
    assert found["unigram_entropy"] == pytest.approx(entropy)
    lengths = sorted(map(len, documents))
    for name, q in (("min", 0), ("p10", 0.1), ("p50", 0.5), ("p90", 0.9), ("max", 1)):
        assert found["tokens_per_document"][name] == lengths[math.floor(q * (len(lengths) - 1))]
    frequent = [entry["count"] for entry in found["most_frequent"]]
    assert frequent == sorted(counts.values(), reverse=True)[:20]
    tokenizer = load_tokenizer(None)
    for entry in found["most_frequent"]:
        assert entry["count"] == counts[entry["id"]]
        assert entry["text"] == tokenizer.decode([entry["id"]])
    for word in ("most frequent", "unigram entropy", "of the tokens", f"{tokens:,}"):
        assert word in output


def test_several_pairs_and_their_total(run, tmp_path, texts, capsys):
    totals = []
    for name, part in (("a", texts[:20]), ("b", texts[20:])):
        run(write_jsonl(tmp_path / f"{name}.jsonl", part), prefix=name)
        totals.append(sum(map(len, read_documents(tmp_path / f"{name}_text_document"))))
    output = run_command(capsys, tmp_path / "a", tmp_path / "b_text_document")
    assert f"{sum(totals):,}" in output and f"{totals[0] / sum(totals):.1%}" in output
    assert np.diff(totals)[0] != 0
