#!/usr/bin/env python
"""`genkit train` for a launcher: accelerate launch --num_processes 8 scripts/train.py configs/toy/vq-fashion.yaml"""

import sys

from genkit.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
