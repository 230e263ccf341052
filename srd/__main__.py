"""`python -m srd` is the `srd` command."""

from srd.cli.main import main

if __name__ == "__main__":
    main()
