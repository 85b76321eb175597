import sys

from fedimaging.cli import main

if __name__ == "__main__":
    sys.exit(main())
