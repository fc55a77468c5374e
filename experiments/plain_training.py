"""The training script with the plain design in place of our network: same options, data, loss and validation.

    python -m experiments.plain_training --data_dir DATA --checkpoint_dir PLAIN …
    python amodal_fusion_transformer.py --data_dir DATA --checkpoint_dir OURS …
"""

from amodal_fusion_transformer import main
from experiments.plain_design import PlainDesign

if __name__ == "__main__":
    main(build=lambda config: PlainDesign(config["n_max_completions"]))
