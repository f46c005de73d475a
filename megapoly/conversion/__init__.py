"""Convert checkpoints to Hugging Face folders and back, and prove that the model is the same."""
