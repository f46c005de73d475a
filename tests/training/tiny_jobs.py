"""What the smallest jobs of the tests have in common: steps of milliseconds on CPU."""

TINY = {
    "model.num_layers": 2,
    "model.hidden_size": 16,
    "model.num_attention_heads": 2,
    "model.ffn_hidden_size": 24,
    "model.activation_backend": "reference",  # nothing to compile
    "training.seq_length": 16,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 4,
    "training.eval_interval": 0,
    "training.device": "cpu",
    "optimizer.lr_warmup_iters": 2,
    "logging.tensorboard": False,
}
