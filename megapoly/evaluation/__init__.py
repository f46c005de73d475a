"""Evaluation of checkpoints: perplexity on validation sets, benchmark tasks."""
