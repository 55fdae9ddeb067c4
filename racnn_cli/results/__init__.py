"""What comes out of a run: evaluate, export, predict, report."""
