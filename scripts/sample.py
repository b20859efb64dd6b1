#!/usr/bin/env python
"""`genkit sample` for a launcher: accelerate launch scripts/sample.py runs/NAME -n 1000 --labels 0-9 -o out/"""

import sys

from genkit.cli import main

sys.exit(main(["sample", *sys.argv[1:]]))
