"""Cosines by hand, token by token."""

import numpy as np
import pytest
import torch
from analysis_jobs import NUM_TOKENS, analysed, similarity_by_recording

from megapoly.conversion.checkpoint_reader import find_checkpoint
from megapoly.study.analysis.similarity import LayerSimilarity
from megapoly.testing import run_on_ranks


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_means_over_all_tokens_and_over_those_of_an_expert():
    rng = np.random.default_rng(0)
    states = rng.standard_normal((3, 10, 6)).astype(np.float32) + 0.5
    routing = rng.random((2, 10, 4)) < 0.5
    routing[:, :, 3] = False  # an expert without tokens
    similarity = LayerSimilarity(2, 4)
    for part in (slice(0, 7), slice(7, 10)):
        similarity.add(torch.from_numpy(states[:, part]), torch.from_numpy(routing[:, part]))
    result = similarity.result()
    assert result["tokens"] == 10
    assert result["states"] == ["embedding", "layer 1", "layer 2"]
    by_hand = [[np.mean([cosine(a[t], b[t]) for t in range(10)]) for b in states] for a in states]
    np.testing.assert_allclose(result["matrix"], by_hand, atol=1e-6)
    for layer, entry in enumerate(result["experts"]["per_layer"]):
        rows = []
        for expert in range(3):
            tokens = np.flatnonzero(routing[layer, :, expert])
            assert entry["tokens"][expert] == len(tokens)
            behind = states[layer + 1]
            row = [np.mean([cosine(behind[t], h[t]) for t in tokens]) for h in states]
            np.testing.assert_allclose(entry["matrix"][expert], row, atol=1e-6)
            rows.append(row)
        assert entry["matrix"][3] is None and entry["tokens"][3] == 0
        np.testing.assert_allclose(result["experts"]["mean"][layer], np.mean(rows, 0), atol=1e-6)


def test_states_are_those_that_another_reader_of_the_checkpoint_computes(trained, text):
    run = trained("tp2-ep2-etp1")
    arguments = ["--parts", "similarity", "--tokens", 32]  # the text's first sample
    (found,) = run_on_ranks(analysed, 1, run, run / "first", *arguments)
    (recorded,) = run_on_ranks(similarity_by_recording, 1, find_checkpoint(run), text, 32)
    np.testing.assert_allclose(found["similarity"]["matrix"], recorded, atol=1e-5)
    assert found["effective_rank"] is None and found["coefficients"] is None
    assert found["curves"] == found["power_shares"] == found["activations"] == []


def test_weighed_by_tokens_the_experts_make_the_matrix(analysis):
    found = analysis("tp2-ep2-etp1")["similarity"]
    for entry in found["experts"]["per_layer"]:
        reached = [e for e, row in enumerate(entry["matrix"]) if row is not None]
        tokens = np.array([entry["tokens"][e] for e in reached])
        assert tokens.sum() == 2 * NUM_TOKENS  # two experts a token
        rows = np.array([entry["matrix"][e] for e in reached])
        expected = found["matrix"][entry["layer"] + 1]
        np.testing.assert_allclose(tokens @ rows / tokens.sum(), expected, atol=1e-6)


def test_two_processes_trained_the_model_of_one(analysis):
    one, two = analysis("1"), analysis("tp2-ep2-etp1")
    np.testing.assert_allclose(one["similarity"]["matrix"], two["similarity"]["matrix"], atol=1e-4)
    ranks = [[w["effective_rank"] for w in a["effective_rank"]["weights"]] for a in (one, two)]
    assert ranks[0] == pytest.approx(ranks[1], rel=1e-4)
    shares = [[s for e in a["power_shares"] for s in e["shares"]] for a in (one, two)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-4)
    kurtosis = [[e["after"]["kurtosis"] for e in a["activations"]] for a in (one, two)]
    assert kurtosis[0] == pytest.approx(kurtosis[1], rel=1e-2)
