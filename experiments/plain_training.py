"""The training script with the plain design instead of our network. Options, data, loss and validation are the same.

    python -m experiments.plain_training --data_dir DATA --checkpoint_dir PLAIN …
    python amodal_fusion_transformer.py --data_dir DATA --checkpoint_dir OURS …
"""

from amodal_fusion_transformer import main
from experiments.plain_design import PlainDesign

if __name__ == "__main__":
    main(build=lambda config: PlainDesign(config["n_max_completions"]))
