"""`python -m limbeck` is the command `limbeck`."""

from .cli.main import main

if __name__ == "__main__":
    main()
