"""``python -m convlstm_fish`` is the command line."""

from convlstm_fish.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
