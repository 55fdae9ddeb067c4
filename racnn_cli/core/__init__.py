"""The network itself: attention, model, losses and metrics, in plain torch."""
