r"""Supervised finetuning of LLaDA.

    accelerate launch --config_file accelerate_configs/1_node_8_gpus_deepspeed_zero3.yaml \
        train/sft_llada.py config=configs/sft_llada.yaml
    python train/sft_llada.py config=configs/sft_llada.yaml
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: the repo's root, not this folder

from train.sft import main  # noqa: E402

if __name__ == "__main__":
    main(model_base="llada")
