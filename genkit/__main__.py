"""`python -m genkit`: what a launcher starts, and the command where the entry point is not on the PATH."""

import sys

from genkit.cli import main

sys.exit(main())
