"""`python -m moba_hf_cli`."""

from moba_hf_cli import main

if __name__ == "__main__":
    main()
