"""``python -m i2am``."""

import sys

from i2am.cli import main

if __name__ == "__main__":
    sys.exit(main())
