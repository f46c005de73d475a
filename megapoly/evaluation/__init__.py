"""Evaluation: the paper's benchmarks by the LM Evaluation Harness, perplexity by domain."""
