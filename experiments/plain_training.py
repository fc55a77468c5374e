"""The training script with the plain design in place of our network: same options, data, loss and validation.

    python -m experiments.plain_training --data_dir DATA --checkpoint_dir PLAIN …
    python amodal_fusion_transformer.py --data_dir DATA --checkpoint_dir OURS …
"""

import amodal_fusion_transformer as trainer
from experiments.plain_design import PlainDesign


def main():
    trainer.build_model = lambda config: PlainDesign(config["n_max_completions"])
    trainer.main()


if __name__ == "__main__":
    main()
