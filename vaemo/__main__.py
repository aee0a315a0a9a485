"""`python -m vaemo NAME ...`: the command `vaemo`, where its script is not on the path."""

from vaemo.commands import main

if __name__ == "__main__":
    main()
