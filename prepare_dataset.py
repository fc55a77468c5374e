"""Turn amodal completion results into a data set, split it, check it, or compose one from cut-outs.

    python prepare_dataset.py create --input_dir AMODAL_RESULTS --output_dir DATA --n_max_completions 5 \\
        --img_size 256 --resize --split
    python prepare_dataset.py split --data_dir DATA --val_fraction 0.1 --test_fraction 0.1
    python prepare_dataset.py check --data_dir DATA
    python prepare_dataset.py pack --data_dir DATA --output_dir PACK --img_size 256
    python prepare_dataset.py synthesize --objects CUTOUTS --backgrounds PHOTOS --output_dir DATA --n_scenes 1000

Exit status: 0 success, 1 too many bad scenes (create) or faults (check), 2 wrong usage.
"""

from amodal_fusion.prepare import main

if __name__ == "__main__":
    main(__doc__)
