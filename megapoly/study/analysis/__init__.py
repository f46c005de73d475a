"""What a trained model is like inside: ranks, similarity of layers, activations as learned."""
