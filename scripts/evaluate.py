#!/usr/bin/env python
"""`genkit eval` for a launcher: accelerate launch scripts/evaluate.py runs/NAME"""

import sys

from genkit.cli import main

sys.exit(main(["eval", *sys.argv[1:]]))
