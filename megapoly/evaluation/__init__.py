"""Accuracy on the paper's benchmarks, by the LM Evaluation Harness."""
