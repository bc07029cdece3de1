"""Lets `python -m planner` do what `planner` does."""

from planner.cli import main

if __name__ == "__main__":
    main()
