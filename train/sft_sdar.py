r"""Supervised finetuning of SDAR.

    accelerate launch --config_file accelerate_configs/1_node_8_gpus_deepspeed_zero3.yaml \
        train/sft_sdar.py config=configs/sft_sdar.yaml
    python train/sft_sdar.py config=configs/sft_sdar.yaml
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: the repo's root, not this folder

from train.sft import main  # noqa: E402

if __name__ == "__main__":
    main(model_base="sdar")
