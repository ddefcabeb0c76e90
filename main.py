"""``python main.py`` is the command line of convlstm_fish, without installing a console script."""

from convlstm_fish.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
