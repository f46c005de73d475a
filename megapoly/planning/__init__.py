"""What a run will take, before it is launched: parameters, memory, messages, time; a dry run."""
