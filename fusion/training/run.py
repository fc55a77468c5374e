"""The state of a training run: what is saved, what is resumed, and how fast it learns."""

import dataclasses
import json
import math
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from fusion.errors import UserError
from fusion.training.checkpoints import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from fusion.training.distributed import gather
from fusion.training.tensorboard import add_record


def learning_rate(step, total_steps, warmup_steps):
    """Factor of the peak rate: linear warm-up, then a cosine down to 0.01; a pure function of the step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def average(decay):
    """EMA whose decay grows from 0.1 to `decay`, so that short runs do not drag their initial weights along."""

    def update(averaged, current, count):
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + int(count)) / (10 + int(count))))

    return update


def check_same_model(path, stored, config, model_options):
    """Raise UserError when the network of checkpoint `path` is not the one that `config` describes."""
    for name in model_options:
        wanted = getattr(config, name)
        if stored[name] != wanted:
            raise UserError(
                f"{path} was trained with {name}={stored[name]}, not {wanted}; set --{name} {stored[name]}"
            )


class Run:
    """What a checkpoint holds: the weights, their optimizer, and where training stands."""

    PARTS = ("model", "ema", "optimizer", "scheduler", "scaler")
    COUNTS = ("epoch", "step", "scenes_done", "bad_steps", "best", "metrics")

    def __init__(self, model, config, process):
        self.model, self.config, self.process = model, config, process
        self.folder = Path(config.checkpoint_dir)
        self.ema = AveragedModel(self.model, multi_avg_fn=average(config.ema_decay))
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr)
        self.scheduler, self.total_steps = None, 0  # need the length of an epoch
        self.scaler = torch.amp.GradScaler(enabled=config.amp == "fp16" and process.device.type == "cuda")
        self.epoch = self.step = self.scenes_done = self.bad_steps = 0  # scenes_done: of this epoch, over all ranks
        self.best = math.inf
        self.metrics = {}
        self.board = None  # TensorBoard's writer, on rank 0, if there is one

    def schedule(self, total_steps):
        """Set the learning rate for a run of so many steps."""
        self.total_steps = total_steps
        warmup = min(self.config.warmup_steps, total_steps // 10 + 1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate(step, total_steps, warmup)
        )

    def save(self, name):
        """Write CHECKPOINT_DIR/name from rank 0; all ranks must call it, for their random states."""
        states = gather([rng_state()])
        if self.process.is_main:
            parts = {part: getattr(self, part).state_dict() for part in self.PARTS}
            counts = {count: getattr(self, count) for count in self.COUNTS}
            config = dataclasses.asdict(self.config)
            save_checkpoint(self.folder / name, {**parts, **counts, "rng": states, "config": config})

    def log(self, kind, record):
        """Append one line to metrics.jsonl, and to TensorBoard, from rank 0."""
        if self.process.is_main:
            line = {"kind": kind, "epoch": self.epoch + 1, "step": self.step, **record}
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if self.board:
                add_record(self.board, kind, record, self.step)

    def report_bad_step(self, scene_ids):
        """Write down which scenes gave a gradient that is not finite. Raises UserError when that does not end."""
        with open(self.folder / f"bad_steps_rank{self.process.rank}.txt", "a", encoding="utf-8") as file:
            file.write(f"step {self.step}: {' '.join(scene_ids)}\n")
        if self.bad_steps >= self.config.max_bad_steps:
            raise UserError(f"no finite gradient for {self.bad_steps} steps in a row; the scenes are listed in "
                                f"{self.folder}/bad_steps_rank*.txt; look at them, or lower --lr")

    def resume(self, path, model_options):
        """Go on from a checkpoint, with the options given now; those that differ are printed.

        Another number of processes, another batch size or length of training are fine: the epoch is finished from the
        scene where it stood.

        Raises:
            UserError: the file is not a whole checkpoint of a training run.
            UserError: one of `model_options` differs.
        """
        state = load_checkpoint(path)
        if "optimizer" not in state:
            raise UserError(f"{path}: weights alone, no training run to go on with; start from them by "
                                  f"--init_from {path}")
        check_same_model(path, state["config"], self.config, model_options)
        config = dataclasses.asdict(self.config)
        changed = [f"{name} {stored} → {config[name]}" for name, stored in state["config"].items()
                   if name in config and config[name] != stored and name not in ("resume", "max_steps")]
        if changed and self.process.is_main:
            print(f"resumed from {path} with other options: {', '.join(changed)}", flush=True)
        for part in self.PARTS:
            getattr(self, part).load_state_dict(state[part])
        for count in self.COUNTS:
            setattr(self, count, state[count])
        # optimizer and scheduler came with the learning rate and weight decay of then
        rate = self.config.lr * self.scheduler.lr_lambdas[0](self.step)
        for group, decay in zip(self.optimizer.param_groups, (self.config.weight_decay, 0.0)):
            group.update(lr=rate, initial_lr=self.config.lr, weight_decay=decay)
        self.scheduler.base_lrs = [self.config.lr] * len(self.optimizer.param_groups)
        if len(state["rng"]) == self.process.world_size:
            set_rng_state(state["rng"][self.process.rank])
