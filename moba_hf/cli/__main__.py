"""`python -m moba_hf.cli`."""

from moba_hf.cli.app import main

if __name__ == "__main__":
    main()
