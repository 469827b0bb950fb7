"""`python -m mmsae`."""

from mmsae.cli.main import main

if __name__ == "__main__":
    main()
