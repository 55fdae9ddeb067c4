"""The shared core: the paper, in torch and nothing else."""
