"""`python -m fishjax`."""

import sys

from fishjax.cli import main

sys.exit(main())
