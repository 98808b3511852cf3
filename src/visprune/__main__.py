"""Run the command line as `python -m visprune`."""

from visprune.cli import main

if __name__ == "__main__":
    main()
