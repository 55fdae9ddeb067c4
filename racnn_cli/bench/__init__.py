"""The commands that print the figures which README quotes."""
