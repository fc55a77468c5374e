"""TensorBoard log of a run. The package is optional: metrics.jsonl and curves.png hold the same numbers."""

import dataclasses

import yaml

from amodal_fusion.data.images import read_image


def open_board(config, step):
    """A SummaryWriter for `config.log_dir` with the config as text; None, with a note, if TensorBoard fails.

    Args:
        step: current step; later entries of an earlier run are hidden.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(config.log_dir, purge_step=step + 1 if step else None)
        text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
        board.add_text("config", "```\n" + text + "```", step)
        return board
    except Exception as error:  # an optional part must never stop training
        print(f"note: log_dir is not written, TensorBoard does not work here ({error!r}; pip install tensorboard); "
              "metrics.jsonl and curves.png hold the same numbers", flush=True)
        return None


def add_record(board, kind, record, step):
    """The numbers of a line of metrics.jsonl as train/loss, train/lr, val/psnr …

    Returns:
        the board, None if it fails.
    """
    def add():
        for name, value in record.items():
            board.add_scalar(f"{kind}/{name}", value, step)
    return _written(board, add)


def add_figure(board, path, step):
    """Log the picture of validation scenes at `path`; returns the board, None if it fails."""
    return _written(board, lambda: board.add_image("val/scenes", read_image(path, "RGB"), step, dataformats="HWC"))


def _written(board, add):
    try:
        add()
        board.flush()
    except Exception as error:  # as in `open_board`
        print(f"note: log_dir is not written any more, TensorBoard fails ({error!r})", flush=True)
        return None
    return board
