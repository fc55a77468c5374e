"""The state of a training run: counts, schedule, log, checkpoints and resume."""

import dataclasses
import json
import math
import subprocess
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from amodal_fusion import distributed
from amodal_fusion.checkpoints import export_weights, load_checkpoint, rng_state, save_checkpoint, set_rng_state
from amodal_fusion.data.packed import source_of
from amodal_fusion.errors import UserError, message_of
from amodal_fusion.evaluation.figures import draw_curves, draw_scenes
from amodal_fusion.files import atomic_file, record_written, write_text
from amodal_fusion.training.cuda_graph import uses_cuda_graphs
from amodal_fusion.training.optimizers import average, learning_rate, make_optimizer
from amodal_fusion.training.tensorboard import add_figure, add_record, open_board


def is_current(line, scenes, validated_at):
    """Whether a line of metrics.jsonl (bytes) is not newer than `scenes`, for validation `validated_at`."""
    try:
        record = json.loads(line)
        return record["scenes"] <= (validated_at if record["kind"] == "val" else scenes)
    except UnicodeDecodeError:
        return False
    except (ValueError, KeyError, TypeError):
        return True  # written by another program


def check_same_model(path, stored, config, model_options):
    """Raise UserError if `config` describes another network or optimizer than that of checkpoint `path`."""
    for name in model_options:
        wanted = getattr(config, name)
        if stored[name] != wanted:
            raise UserError(f"{path} was trained with {name}={stored[name]}, not {wanted}; set it to {stored[name]}",
                            name)


def git_state():
    """Commit of this program, with '+' if files are changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # slim containers have no git
        return "no git"
    return result.stdout.strip() or "no git"


def describe(metrics):
    """One console line of validation metrics."""
    return (f"validation loss {metrics['loss']:.4f}, PSNR {metrics['psnr']:.2f} dB (visible fit "
            f"{metrics['visible_fit_psnr']:.2f}, oracle {metrics['oracle_psnr']:.2f}, gap closed "
            f"{metrics['gap_closed']:.2f}), in the overlap {metrics['psnr_overlap']:.2f} dB "
            f"({metrics['visible_fit_psnr_overlap']:.2f}, {metrics['oracle_psnr_overlap']:.2f})")


class Run:
    """The state in a checkpoint: weights, EMA, optimizer and counts.

    A run counts scenes, so that batch size and number of processes may change on resume. In options a step means
    `nominal_batch` scenes: those of a step at the start of the run.

    Args:
        training_scenes: number in the data set; validation: digest of the validation scenes' names.

    Raises:
        UserError: there are fewer training scenes than one step takes.
    """

    PARTS = ("model", "ema", "optimizer", "scaler")
    LOSS_DEPENDS_ON = ("validation scenes", "data_dir", "val_list", "val_dir", "img_size", "n_max_completions",
                 "lpips_weight", "lpips_net")
    COUNTS = ("epoch", "step", "scenes_done", "nominal_batch", "bad_steps", "best", "metrics", "earlier_scenes",
              "validated_at")

    def __init__(self, model, config, process, training_scenes, validation):
        self.model, self.config, self.process = model, config, process
        self.folder = Path(config.checkpoint_dir)
        self.ema = AveragedModel(self.model, multi_avg_fn=average(config.ema_decay), use_buffers=True)
        self.optimizer = make_optimizer(model, config, process)
        self.scaler = torch.amp.GradScaler(enabled=config.amp == "fp16" and process.device.type == "cuda")
        self.parameters = list(model.parameters())
        self.training_scenes, self.validation = training_scenes, validation
        self.batch = self.nominal_batch = process.world_size * config.batch_size * config.accumulate
        self.epoch = self.step = self.scenes_done = self.bad_steps = 0  # scenes_done: in this epoch, over all ranks
        self.earlier_scenes = self.previous_scenes = 0  # of all earlier epochs
        self.validated_at = 0  # scenes
        self.best = math.inf
        self.metrics = {}
        self.board = None  # TensorBoard's writer, on rank 0, if there is one
        self.check_batch()

    def check_batch(self):
        """Raise UserError if an epoch has no step."""
        if self.epoch_scenes < self.batch:
            scenes = f"{self.training_scenes} training scenes"
            if 0 < self.epoch_scenes < self.training_scenes:
                scenes += f" ({self.epoch_scenes} an epoch: a multiple of {self.nominal_batch}, the first batch)"
            raise UserError(f"{scenes} are fewer than one step takes ({self.process.world_size} processes × batch_size "
                            f"{self.config.batch_size} × accumulate {self.config.accumulate} = {self.batch}); lower "
                            "one of these", "batch_size", "accumulate")

    @property
    def epoch_scenes(self):
        """Scenes of an epoch: a multiple of the nominal batch."""
        return self.training_scenes // self.nominal_batch * self.nominal_batch

    @property
    def scenes(self):
        """Scenes seen so far, over all ranks and epochs."""
        return self.earlier_scenes + self.scenes_done

    @property
    def scheduled(self):
        """Scenes seen so far if all epochs have as many as this one; decides the schedule."""
        return self.epoch * self.epoch_scenes + self.scenes_done

    @property
    def steps_left(self):
        """Steps until the end of the epoch or max_steps."""
        steps = (self.epoch_scenes - self.scenes_done) // self.batch
        if self.config.max_steps is not None:
            steps = min(steps, math.ceil((self.config.max_steps * self.nominal_batch - self.scenes) / self.batch))
        return max(0, steps)

    @property
    def finished(self):
        most = self.config.max_steps
        stops = most is not None and self.scenes >= most * self.nominal_batch
        return self.epoch >= self.config.epochs or (stops and self.validated_at == self.scenes)

    @property
    def progress(self):
        """Share of the whole run that is done, in [0,1]."""
        return self.scheduled / (self.config.epochs * self.epoch_scenes)

    @property
    def rate(self):
        """Learning rate of the next step."""
        total = self.config.epochs * self.epoch_scenes // self.nominal_batch
        warmup = min(self.config.warmup_steps, total // 10 + 1)
        return self.config.lr * learning_rate(self.scheduled / self.nominal_batch, total, warmup)

    @property
    def oracle_weight(self):
        """Factor of the oracle term in the next step."""
        return self.config.oracle_weight * max(0.0, 1 - self.progress / max(1e-9, self.config.oracle_fade))

    def advance(self):
        """Count a step."""
        self.previous_scenes = self.scenes
        self.step += 1
        self.scenes_done += self.batch

    def is_due(self, steps):
        """Whether the last step completed a multiple of `steps` nominal steps."""
        scenes = steps * self.nominal_batch
        return self.scenes // scenes > self.previous_scenes // scenes

    def announce(self):
        """Print config, commit and sizes of the run, and open TensorBoard."""
        if self.process.is_main:
            self.board = open_board(self.config, self.step) if self.config.log_dir else None
            count = sum(p.numel() for p in self.model.parameters())
            if self.config.figure_every > self.config.epochs and self.config.figure_scenes:
                print(f"note: figure_every {self.config.figure_every} is in epochs, but the run has "
                      f"{self.config.epochs}: the only figure is drawn at the end; figure_every 1 draws one per epoch")
            print(json.dumps(dataclasses.asdict(self.config)))
            graphs = uses_cuda_graphs(self.config, self.process)
            print(f"{git_state()}, torch {torch.__version__}, {self.process.world_size} × {self.process.device.type}, "
                  f"{count / 1e6:.2f} M parameters, {self.training_scenes} training scenes, {self.batch} a step, "
                  f"{self.epoch_scenes // self.batch} steps an epoch, starting at step {self.step}"
                  + ", as CUDA graphs" * graphs, flush=True)
            if self.config.cuda_graph and not graphs:
                print("note: cuda_graph has no effect here: it needs one GPU, and bf16 or fp32")
            if self.finished:
                print(f"finished at step {self.step}; raise --epochs or --max_steps to go on")

    def begin_epoch(self):
        """Start the next epoch."""
        self.earlier_scenes += max(self.epoch_scenes, self.scenes_done)
        self.epoch, self.scenes_done = self.epoch + 1, 0

    def finish_epoch(self, metrics, drawn, scene_ids):
        """Log, save and draw after a validation, at the end of an epoch or at max_steps.

        Args:
            drawn: the first validation scenes for `evaluation.figures.draw_scenes`; scene_ids: all ids.

        Raises:
            UserError: the validation loss is not finite.
        """
        epoch, self.metrics = self.epoch + 1, metrics
        self.log("val", metrics)
        if self.epoch_scenes - self.scenes_done < self.batch:  # a batch size that grew on resume may leave some
            self.begin_epoch()
        self.validated_at = self.scenes
        if metrics["loss"] < self.best:
            self.best = metrics["loss"]
            self.save("best_model.pth")
        self.save("last.pth")
        if self.process.is_main:
            print(f"epoch {epoch}, step {self.step}: " + describe(metrics), flush=True)
        if not math.isfinite(metrics["loss"]):
            raise UserError(f"{self.folder}: training has diverged, its validation loss is {metrics['loss']}; start a "
                            "run with a lower learning rate in another folder, from best_model.pth if there is one",
                            "lr", "checkpoint_dir", "init_from")
        if self.process.is_main:
            try:
                self.draw(epoch, drawn, scene_ids)
            except (UserError, OSError) as error:
                print(f"note: a figure is missing: {message_of(error)}", flush=True)

    def draw(self, epoch, drawn, scene_ids):
        """Write curves.png and, where one is due, the figure of validation scenes; see `finish_epoch`."""
        draw_curves(self.folder / "curves.png", self.folder / "metrics.jsonl")
        if drawn and (epoch % self.config.figure_every == 0 or epoch == self.config.epochs):
            figures = Path(self.config.figure_dir or self.folder)
            figures.mkdir(parents=True, exist_ok=True)
            path = figures / f"val_epoch_{epoch:03d}.png"
            draw_scenes(path, drawn, scene_ids[: len(drawn)])
            if self.board:
                self.board = add_figure(self.board, path, self.step)

    def export(self):
        """Print where the best weights are and write those for `export`, at the end of the run or if it had ended."""
        best = self.folder / "best_model.pth"  # missing if a finished run of another folder was resumed
        if self.process.is_main and best.exists():
            print(f"best weights: {best}")
        if self.process.is_main and self.config.export:
            export_weights(best if best.exists() else self.folder / "last.pth", self.config.export,
                           self.config.init_from, self.config.init_share, inference_size=self.config.inference_size)
            print(f"exported to {self.config.export}")

    def save(self, name):
        """Write CHECKPOINT_DIR/name from rank 0. All ranks must call it, for their random states."""
        states = self.process.gather(rng_state(self.process.device))
        if self.process.is_main:
            parts = {part: getattr(self, part).state_dict() for part in self.PARTS}
            counts = {count: getattr(self, count) for count in self.COUNTS}
            config = dataclasses.asdict(self.config)
            data = {"training_scenes": self.training_scenes, "validation": self.validation,
                    "launch": distributed.launch_name()}
            save_checkpoint(self.folder / name, {**parts, **counts, **data, "rng": states, "config": config},
                            owned=name == "best_model.pth")

    def log(self, kind, record):
        """Append one line to metrics.jsonl, and to TensorBoard, from rank 0."""
        if self.process.is_main:
            line = {"kind": kind, "epoch": self.epoch + 1, "step": self.step, "scenes": self.scenes, **record}
            path, text = self.folder / "metrics.jsonl", json.dumps(line) + "\n"
            if not path.exists() or not path.stat().st_size:
                write_text(path, text, owned=True)
            else:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(text)
            if self.board:
                self.board = add_record(self.board, kind, record, self.step)

    def report_bad_step(self, scene_ids):
        """Record the scenes of a gradient that is not finite. Raises UserError after `max_bad_steps` in a row."""
        self.bad_steps += 1
        with open(self.folder / f"bad_steps_rank{self.process.rank}.txt", "a", encoding="utf-8") as file:
            file.write(f"step {self.step}: {' '.join(scene_ids)}\n")
        if self.bad_steps >= self.config.max_bad_steps:
            raise UserError(f"no finite gradient for {self.bad_steps} steps in a row; the scenes are listed in "
                            f"{self.folder}/bad_steps_rank*.txt; look at them, or lower the learning rate", "lr")

    def resume(self, path, model_options):
        """Resume from a checkpoint with the current options; differences are printed.

        Number of processes, batch size and length may differ: the epoch continues at its next scene, with the learning
        rate of an uninterrupted run there.

        Raises:
            UserError: the file is no complete training checkpoint, or one of `model_options` differs.
        """
        if path is not None:
            self._restore(path, model_options)
        if self.process.is_main:
            self.cut_log()
        if path is not None and Path(path).resolve() != (self.folder / "last.pth").resolve():
            self.save("last.pth")  # a restart resumes from it

    def cut_log(self):
        """Remove incomplete lines of metrics.jsonl, and those newer than the checkpoint."""
        log = self.folder / "metrics.jsonl"
        if log.exists() and not log.is_file():
            raise UserError(f"{log}: is not a regular file; move it elsewhere")
        if log.exists():
            lines = log.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines
                    if line.endswith(b"\n") and is_current(line, self.scenes, self.validated_at)]
            if len(kept) < len(lines):
                record_written(self.folder, {log.name: log})  # as it has grown
                with atomic_file(log, owned=True) as temporary:
                    temporary.write_bytes(b"".join(kept))

    def _restore(self, path, model_options):
        state = load_checkpoint(path, "resume")
        if "optimizer" not in state:
            raise UserError(f"{path}: weights alone, no training run to resume; start a new run from them", "init_from")
        try:
            stored = {"optimizer": "adamw", **state["config"]}  # older files do not name it
            check_same_model(path, stored, self.config, (*model_options, "optimizer"))
            self._load_parts(state)
            self._load_counts(state)
            changed = self._changes(self._settings(state))
            if len(state["rng"]) == self.process.world_size:
                set_rng_state(state["rng"][self.process.rank], self.process.device)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise UserError(f"{path}: training cannot resume from this state ({error!r}); use another file") from None
        if changed and self.process.is_main:
            print(f"resumed from {path} with other options: {', '.join(changed.values())}", flush=True)
        self._keep_best(changed, state["config"])
        self.previous_scenes = self.scenes
        self.check_batch()

    def _load_parts(self, state):
        """Weights, EMA, optimizer and scaler."""
        groups = state["optimizer"]["param_groups"]
        if "betas" not in groups[0]:
            raise ValueError("the optimizer is the Muon of an earlier commit")
        for group, own in zip(groups, self.optimizer.param_groups):
            group |= {name: own[name] for name in ("lr", "weight_decay", "capturable")}
        for part in self.PARTS:
            if state[part] or part != "scaler":  # empty except with fp16
                getattr(self, part).load_state_dict(state[part])
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if not torch.is_tensor(value) or value.shape not in (parameter.shape, ()):
                    raise ValueError(f"{name} of the optimizer does not fit a parameter of shape "
                                     f"{tuple(parameter.shape)}")

    def _load_counts(self, state):
        if "earlier_scenes" not in state:  # checkpoints of earlier commits
            of_an_epoch = state["training_scenes"] // state["nominal_batch"] * state["nominal_batch"]
            earlier = state["epoch"] * of_an_epoch
            state |= {"earlier_scenes": earlier, "validated_at": earlier + state["scenes_done"]}
        for name in self.COUNTS:
            value = state[name]
            if name == "metrics":
                right = isinstance(value, dict)
            elif name == "best":
                right = type(value) in (int, float) and not math.isnan(value)
            else:
                right = type(value) is int and value >= (name == "nominal_batch")
            if not right:
                raise ValueError(f"{name} is {str(value)[:50]}")
            setattr(self, name, value)

    def _settings(self, state):
        """Options and settings of a checkpoint's run."""
        then = {**state["config"], "processes": len(state["rng"]), "training_scenes": state["training_scenes"]}
        then["validation scenes"] = state.get("validation", self.validation)  # not in older files
        then["scenes per step"] = then["processes"] * then["batch_size"] * then["accumulate"]
        return then

    def _changes(self, then):
        """Settings that differ now: name → text."""
        now = {**dataclasses.asdict(self.config), "processes": self.process.world_size,
               "training_scenes": self.training_scenes, "validation scenes": self.validation,
               "scenes per step": self.batch}
        changed = {name: f"{name} {then[name]} → {value}" for name, value in now.items()
                   if name in then and then[name] != value and name not in ("resume", "max_steps")}
        if "validation scenes" in changed:  # digests mean nothing to the user
            changed["validation scenes"] = "other validation scenes"
        return changed

    def _keep_best(self, changed, then):
        """Reset the best loss if it is no longer comparable; its weights are kept under another name."""
        differs = set(changed).intersection(self.LOSS_DEPENDS_ON)
        for name in differs & {"data_dir", "val_dir"}:  # a folder and its packed set have the same scenes
            before, now = then[name], getattr(self.config, name)
            if isinstance(before, str) and now and source_of(before) == source_of(now):
                differs.remove(name)
        best, judged = self.folder / "best_model.pth", bool(differs)
        if judged or not best.exists():
            self.best = math.inf  # not comparable, or the weights are in another folder
        if judged and best.exists() and self.process.is_main:
            kept = best.rename(self.folder / f"best_model_until_step_{self.step}.pth")
            print("the validation loss cannot be compared with the earlier one: the best weights so far are kept as "
                  f"{kept}")
