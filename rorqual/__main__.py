"""`python -m rorqual …` is `rorqual …`."""

from rorqual.cli import main

if __name__ == "__main__":
    main()
