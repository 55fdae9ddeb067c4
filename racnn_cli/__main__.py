"""Entry point of the command `racnn`, of `python -m racnn_cli` and of torchrun.

The command line is imported inside `main`, so that Ctrl-C during the imports prints one line instead of a traceback.
"""

import sys


def main() -> None:
    """Import the command line and run it."""
    try:
        from racnn_cli.cli import main as run

        run()
    except KeyboardInterrupt:
        print("error: stopped by SIGINT", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
