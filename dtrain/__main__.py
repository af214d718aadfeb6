"""`python -m dtrain` is the command `dtrain`."""

from dtrain.cli import main

if __name__ == "__main__":
    main()
