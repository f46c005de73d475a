"""Checkpoints to Hugging Face folders and back, and the proof that nothing changed on the way."""
