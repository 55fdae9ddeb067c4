"""Images in: where they come from (`index`), how they become tensors (`images`), and built-in sets."""
