"""The state of a training run: where it stands, what is saved, what is resumed, and how fast it learns."""

import dataclasses
import json
import math
import subprocess
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from amodal_fusion import distributed
from amodal_fusion.checkpoints import export_weights, load_checkpoint, rng_state, save_checkpoint, set_rng_state
from amodal_fusion.errors import UserError
from amodal_fusion.evaluation.figures import draw_curves, draw_scenes
from amodal_fusion.files import atomic_file
from amodal_fusion.training.cuda_graph import uses_cuda_graphs
from amodal_fusion.training.optimizers import average, learning_rate, make_optimizer
from amodal_fusion.training.tensorboard import add_figure, add_record, open_board


def is_current(line, scenes, validated_at):
    """Whether a line of metrics.jsonl, bytes, belongs to a run at `scenes`, validated last at `validated_at`."""
    try:
        record = json.loads(line)
        return record["scenes"] <= (validated_at if record["kind"] == "val" else scenes)
    except UnicodeDecodeError:
        return False
    except (ValueError, KeyError, TypeError):
        return True  # written by another program


def check_same_model(path, stored, config, model_options):
    """Raise UserError when the network, or optimizer, of checkpoint `path` is not the one that `config` describes."""
    for name in model_options:
        wanted = getattr(config, name)
        if stored[name] != wanted:
            raise UserError(f"{path} was trained with {name}={stored[name]}, not {wanted}; set it to {stored[name]}",
                            name)


def git_state():
    """Commit of this program, '+' when there are changes."""
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
    """What a checkpoint holds: the weights, their optimizer, and where training stands.

    A run counts the scenes that it has seen, so that batch size and number of processes may change on the way.
    What options mean by a step is `nominal_batch` scenes, those of a step when the run was begun.

    Args:
        training_scenes: in the data set; validation: digest of the validation scenes' names.

    Raises:
        UserError: they are fewer than one step takes.
    """

    PARTS = ("model", "ema", "optimizer", "scaler")
    JUDGED_BY = ("validation scenes", "data_dir", "val_list", "val_dir", "img_size", "n_max_completions",
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
        self.epoch = self.step = self.scenes_done = self.bad_steps = 0  # scenes_done: of this epoch, over all ranks
        self.earlier_scenes = self.previous_scenes = 0  # of the epochs before this one, some of which may have had more
        self.validated_at = 0  # scenes
        self.best = math.inf
        self.metrics = {}
        self.board = None  # TensorBoard's writer, on rank 0, if there is one
        self.check_batch()

    def check_batch(self):
        """Raise UserError when an epoch has no step."""
        if self.epoch_scenes < self.batch:
            scenes = f"{self.training_scenes} training scenes"
            if 0 < self.epoch_scenes < self.training_scenes:
                scenes += f" ({self.epoch_scenes} an epoch, by the {self.nominal_batch} a step of the run's beginning)"
            raise UserError(f"{scenes} are fewer than one step takes ({self.process.world_size} processes × batch_size "
                            f"{self.config.batch_size} × accumulate {self.config.accumulate} = {self.batch}); lower "
                            "one of these", "batch_size", "accumulate")

    @property
    def epoch_scenes(self):
        """Scenes of an epoch: those that fill whole nominal batches."""
        return self.training_scenes // self.nominal_batch * self.nominal_batch

    @property
    def scenes(self):
        """Scenes seen so far, over all ranks and epochs."""
        return self.earlier_scenes + self.scenes_done

    @property
    def scheduled(self):
        """Scenes that lie behind, if all epochs are of as many as this one."""
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
        """Whether the last step completed a multiple of this number of nominal steps."""
        scenes = steps * self.nominal_batch
        return self.scenes // scenes > self.previous_scenes // scenes

    def announce(self):
        """Print what runs here, and open its TensorBoard."""
        if self.process.is_main:
            self.board = open_board(self.config, self.step) if self.config.log_dir else None
            count = sum(p.numel() for p in self.model.parameters())
            if self.config.figure_every > self.config.epochs and self.config.figure_scenes:
                print(f"note: figure_every {self.config.figure_every} is in epochs, and the run has "
                      f"{self.config.epochs}: the only figure comes at the end; figure_every 1 draws one per epoch")
            print(json.dumps(dataclasses.asdict(self.config)))
            graphs = uses_cuda_graphs(self.config, self.process)
            print(f"{git_state()}, torch {torch.__version__}, {self.process.world_size} × {self.process.device.type}, "
                  f"{count / 1e6:.2f} M parameters, {self.training_scenes} training scenes, {self.batch} a step, "
                  f"{self.epoch_scenes // self.batch} steps an epoch, starting at step {self.step}"
                  + ", as CUDA graphs" * graphs, flush=True)
            if self.config.cuda_graph and not graphs:
                print("note: cuda_graph has no effect here: it needs one GPU, and bf16 or fp32")

    def begin_epoch(self):
        """Go on from the last scene of an epoch to the first of the next."""
        self.earlier_scenes += max(self.epoch_scenes, self.scenes_done)  # there may be fewer than when it was begun
        self.epoch, self.scenes_done = self.epoch + 1, 0

    def finish_epoch(self, metrics, drawn, scene_ids):
        """Log, save and draw after validation, which may also come in the middle of an epoch, at max_steps.

        Args:
            drawn: the first validation scenes as `evaluation.figures.draw_scenes` takes them, with their `scene_ids`.

        Raises:
            UserError: the validation loss is not finite.
        """
        epoch, self.metrics = self.epoch + 1, metrics
        self.log("val", metrics)
        if self.epoch_scenes - self.scenes_done < self.batch:  # a larger batch than before may leave some
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
            draw_curves(self.folder / "curves.png", self.folder / "metrics.jsonl")
            if drawn and (epoch % self.config.figure_every == 0 or epoch == self.config.epochs):
                figures = Path(self.config.figure_dir or self.folder)
                figures.mkdir(parents=True, exist_ok=True)
                path = figures / f"val_epoch_{epoch:03d}.png"
                draw_scenes(path, drawn, scene_ids[: len(drawn)])
                if self.board:
                    add_figure(self.board, path, self.step)

    def export(self):
        """Write the weights that `export` asks for, when the run has ended, also if that was long ago."""
        if self.process.is_main and self.config.export:
            best = self.folder / "best_model.pth"  # a run from elsewhere that had ended has none here
            export_weights(best if best.exists() else self.folder / "last.pth", self.config.export,
                           self.config.init_from, self.config.init_share, inference_size=self.config.inference_size)
            print(f"exported to {self.config.export}")

    def save(self, name):
        """Write CHECKPOINT_DIR/name from rank 0; all ranks must call it, for their random states."""
        states = self.process.gather(rng_state(self.process.device))
        if self.process.is_main:
            parts = {part: getattr(self, part).state_dict() for part in self.PARTS}
            counts = {count: getattr(self, count) for count in self.COUNTS}
            config = dataclasses.asdict(self.config)
            data = {"training_scenes": self.training_scenes, "validation": self.validation,
                    "launch": distributed.launch_name()}
            save_checkpoint(self.folder / name, {**parts, **counts, **data, "rng": states, "config": config})

    def log(self, kind, record):
        """Append one line to metrics.jsonl, and to TensorBoard, from rank 0."""
        if self.process.is_main:
            line = {"kind": kind, "epoch": self.epoch + 1, "step": self.step, "scenes": self.scenes, **record}
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if self.board:
                add_record(self.board, kind, record, self.step)

    def report_bad_step(self, scene_ids):
        """Write down which scenes gave a gradient that is not finite. Raises UserError when that does not end."""
        self.bad_steps += 1
        with open(self.folder / f"bad_steps_rank{self.process.rank}.txt", "a", encoding="utf-8") as file:
            file.write(f"step {self.step}: {' '.join(scene_ids)}\n")
        if self.bad_steps >= self.config.max_bad_steps:
            raise UserError(f"no finite gradient for {self.bad_steps} steps in a row; the scenes are listed in "
                            f"{self.folder}/bad_steps_rank*.txt; look at them, or lower the learning rate", "lr")

    def resume(self, path, model_options):
        """Go on from a checkpoint, with the options given now; those that differ are printed.

        Another number of processes, another batch size or length of training are fine: the epoch is finished from the
        scene where it stood, at the learning rate that an unbroken run has there.

        Raises:
            UserError: the file is not a whole checkpoint of a training run.
            UserError: one of `model_options` differs.
        """
        if path is not None:
            self._restore(path, model_options)
        if self.process.is_main:
            self.cut_log()
        if path is not None and Path(path).resolve() != (self.folder / "last.pth").resolve():
            self.save("last.pth")  # what a restart goes on from

    def cut_log(self):
        """Remove from metrics.jsonl half and damaged lines, and those newer than the checkpoint."""
        log = self.folder / "metrics.jsonl"
        if log.exists() and not log.is_file():
            raise UserError(f"{log}: is not a regular file; move it elsewhere")
        if log.exists():
            lines = log.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines
                    if line.endswith(b"\n") and is_current(line, self.scenes, self.validated_at)]
            if len(kept) < len(lines):
                with atomic_file(log) as temporary:
                    temporary.write_bytes(b"".join(kept))

    def _restore(self, path, model_options):
        state = load_checkpoint(path)
        if "optimizer" not in state:
            raise UserError(f"{path}: weights alone, no training run to resume; start a new run from them", "init_from")
        try:
            stored = {"optimizer": "adamw", **state["config"]}  # files from before there was a choice
            check_same_model(path, stored, self.config, (*model_options, "optimizer"))
            self._load_parts(state)
            self._load_counts(state)
            changed = self._changes(self._circumstances(state))
            if len(state["rng"]) == self.process.world_size:
                set_rng_state(state["rng"][self.process.rank], self.process.device)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise UserError(f"{path}: training cannot resume from this state ({error!r}); use another file") from None
        if changed and self.process.is_main:
            print(f"resumed from {path} with other options: {', '.join(changed.values())}", flush=True)
        self._keep_best(changed)
        self.previous_scenes = self.scenes
        self.check_batch()

    def _load_parts(self, state):
        """Weights, EMA, optimizer and scaler."""
        groups = state["optimizer"]["param_groups"]
        if "betas" not in groups[0]:
            raise ValueError("Muon's of an earlier commit")
        for group, own in zip(groups, self.optimizer.param_groups):
            group |= {name: own[name] for name in ("lr", "weight_decay", "capturable")}
        for part in self.PARTS:
            if state[part] or part != "scaler":  # empty after any precision but fp16
                getattr(self, part).load_state_dict(state[part])
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if not torch.is_tensor(value) or value.shape not in (parameter.shape, ()):
                    raise ValueError(f"{name} of the optimizer does not fit a parameter of shape "
                                     f"{tuple(parameter.shape)}")

    def _load_counts(self, state):
        if "earlier_scenes" not in state:  # of an earlier commit
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

    def _circumstances(self, state):
        """The options and circumstances of a checkpoint's run."""
        then = {**state["config"], "processes": len(state["rng"]), "training_scenes": state["training_scenes"]}
        then["validation scenes"] = state.get("validation", self.validation)  # not in older files
        then["scenes per step"] = then["processes"] * then["batch_size"] * then["accumulate"]
        return then

    def _changes(self, then):
        """What is different now: name → text."""
        now = {**dataclasses.asdict(self.config), "processes": self.process.world_size,
               "training_scenes": self.training_scenes, "validation scenes": self.validation,
               "scenes per step": self.batch}
        changed = {name: f"{name} {then[name]} → {value}" for name, value in now.items()
                   if name in then and then[name] != value and name not in ("resume", "max_steps")}
        if "validation scenes" in changed:  # two digests say nothing
            changed["validation scenes"] = "other validation scenes"
        return changed

    def _keep_best(self, changed):
        """Forget the best loss where it cannot be compared, and keep its weights under another name."""
        best, judged = self.folder / "best_model.pth", not changed.keys().isdisjoint(self.JUDGED_BY)
        if judged or not best.exists():
            self.best = math.inf  # the loss has another meaning now, or the weights are in another folder
        if judged and best.exists() and self.process.is_main:
            kept = best.rename(self.folder / f"best_model_until_step_{self.step}.pth")
            print(f"the validation loss has another meaning now: the best weights so far are kept as {kept}")
