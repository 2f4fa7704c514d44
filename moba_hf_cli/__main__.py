"""`python -m moba_hf_cli`."""

from moba_hf_cli.app import main

if __name__ == "__main__":
    main()
