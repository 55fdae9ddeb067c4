"""`python -m racnn_cli`, and the entry that torchrun starts: the same as the command `racnn`."""

from racnn_cli.cli import main

if __name__ == "__main__":
    main()
