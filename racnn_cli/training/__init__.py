"""How a run learns: stages as data, one loop, checkpoints."""
