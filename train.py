"""Entry for every launcher: `python train.py`, `torchrun --nproc-per-node 2 train.py`, `deepspeed --num_gpus 2 train.py`.

The arguments are those of `fst train`: [CONFIG.yaml] --run-dir DIR [--resume] [--dry-run] --dotted.key=value ...
"""

import sys

from fst_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
