"""One short file per stage, called by `python -m`: read, call, write."""

import gc
import sys

if sys.argv[0] == "-m":  # so it is while this package is imported on the way to a stage that is called
    gc.disable()  # what PyTorch and transformers import stays: no need to look through it again and again; `run` enables it
