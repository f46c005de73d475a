"""Analyses of a trained model: effective ranks, similarity of layers, learned activations."""
