"""`python -m visprune` is `visprune`."""

from visprune.cli import main

if __name__ == "__main__":
    main()
