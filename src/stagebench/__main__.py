"""`python -m stagebench`."""

from stagebench.cli import main

if __name__ == "__main__":
    main()
