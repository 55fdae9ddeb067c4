"""Data sets: listing and splitting, decoding and augmentation, and the built-in sets."""
