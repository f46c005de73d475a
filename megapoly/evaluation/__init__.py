"""Evaluate the paper's benchmarks with the LM Evaluation Harness, and perplexity by domain."""
