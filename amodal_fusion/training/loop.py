"""The step of training, one epoch of steps, and validation."""

import contextlib
import math
import time

import torch
from tqdm import tqdm

from amodal_fusion.data.datasets import to_batch
from amodal_fusion.data.tensors import inputs_of, to_arrays
from amodal_fusion.evaluation.metrics import compare_methods, gap_closed
from amodal_fusion.evaluation.rules import apply_rules, oracle
from amodal_fusion.precision import training_precision
from amodal_fusion.training.cuda_graph import use_cuda_graphs, uses_cuda_graphs
from amodal_fusion.training.loaders import read_batches
from amodal_fusion.training.optimizers import set_rate
from amodal_fusion.training.shutdown import Stopped


class TrainStep:
    """One step of training: forward, loss, backward, clip, optimizer, EMA.

    Args:
        run: Run; network: run.model, or its DistributedDataParallel.
        criterion: `fusion_loss`; perceptual: PerceptualLoss, or None.
    """

    def __init__(self, run, network, criterion, perceptual):
        self.run, self.network, self.criterion, self.perceptual = run, network, criterion, perceptual
        self.half = training_precision(run.config.amp, run.process.device)
        if uses_cuda_graphs(run.config, run.process):
            use_cuda_graphs(self)

    def __call__(self, batches):
        """Take the next `accumulate` batches from an iterator, and train on them.

        Returns:
            gradient norm; per batch the loss terms; per batch the indices of its scenes.
        """
        run, config, process = self.run, self.run.config, self.run.process
        set_rate(run.optimizer, run.rate)
        pull = {"oracle_weight": torch.full((), run.oracle_weight, device=process.device)} if run.oracle_weight else {}
        terms, scenes = [], []
        for part in range(config.accumulate):
            batch = to_batch(next(batches), process.device)
            last = part == config.accumulate - 1  # its backward pass averages gradients over processes
            with contextlib.nullcontext() if last or not process.distributed else self.network.no_sync():
                terms.append(self.backward(**batch, **pull))
            scenes.append(batch["index"])
        run.scaler.unscale_(run.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(run.parameters, config.grad_clip or math.inf)
        if torch.isfinite(norm):  # a NaN of one rank is now in all gradients, so all ranks decide alike
            run.scaler.step(run.optimizer)
            run.ema.update_parameters(run.model)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=False)
        return norm, terms, scenes

    def backward(self, oracle_weight=None, **batch):
        """Backpropagate the loss of a batch, adding to the gradients; returns the loss terms, scalars by name."""
        config = self.run.config
        coherence = (config.switching_weight, config.hedging_weight)
        coherence = coherence if any(coherence) else None
        with torch.autocast(batch["mask"].device.type, self.half, enabled=self.half is not None):
            out = self.network(**inputs_of(batch))
            loss, terms = self.criterion(out, batch, self.perceptual, config.lpips_weight, oracle_weight,
                                         config.psnr_weight, coherence)
        self.run.scaler.scale(loss / config.accumulate).backward()
        return {name: values.detach().mean() for name, values in terms.items()}


def train_one_epoch(step, loader, sampler, stop_signal):
    """Train until the end of the epoch, a signal or max_steps.

    Args:
        step: TrainStep; stop_signal: StopSignal.

    Returns:
        True if a signal asked to stop. The caller saves.
    """
    run, config, process = step.run, step.run.config, step.run.process
    steps = run.steps_left
    if not steps:  # stopped during validation, or fewer scenes are left than a step needs
        return False
    sampler.epoch, sampler.start, sampler.stop = run.epoch, run.scenes_done, run.scenes_done + steps * run.batch
    step.network.train()
    batches = read_batches(loader)
    quiet = None if process.is_main else True  # None: a bar only where there is a terminal
    sums, summed, skipped, logged_at = {}, 0, 0, time.monotonic()  # sums: term → (sum, number of batches)
    bar = tqdm(range(steps), desc=f"epoch {run.epoch + 1}/{config.epochs}", disable=quiet, leave=False)
    for number in bar:
        rate, oracle_weight = run.rate, run.oracle_weight
        norm, terms, scenes = step(batches)
        summed += 1
        add_up(sums, terms)
        if torch.isfinite(norm):
            run.bad_steps = 0
        else:
            skipped += 1
            # fp16 loss scaling starts too large on purpose: its overflow is no bad scene
            finite = all(math.isfinite(part["objective"]) for part in terms)
            if run.scaler.get_scale() <= 1 or process.any(not finite):
                run.report_bad_step([str(loader.dataset.scene_ids[index]) for index in torch.cat(scenes).tolist()])
        run.advance()

        stopped = stop_signal.agreed(process)
        if run.is_due(config.log_every) or number == steps - 1 or stopped:  # every step is counted in one log line
            seconds, logged_at = time.monotonic() - logged_at, time.monotonic()
            record = means_over_processes(sums, process)
            record |= {"lr": rate, "oracle_weight": oracle_weight, "grad_norm": float(norm), "skipped": skipped,
                       "scenes_per_second": run.batch * summed / seconds}
            run.log("train", record)
            bar.set_postfix(loss=f"{record['loss']:.4f}")
            sums, summed, skipped = {}, 0, 0
        if stopped:
            return True
        if run.is_due(config.save_every):
            run.save("last.pth")
    return False


def add_up(sums, terms):
    """Add dicts of terms, one per batch, to `sums`: name → (sum, number of batches)."""
    for name, value in ((name, value) for part in terms for name, value in part.items()):
        total, count = sums.get(name, (0, 0))
        sums[name] = total + value, count + 1


def means_over_processes(sums, process):
    """name → mean over the batches of all processes, which have the same number."""
    names = sorted(sums)
    means = process.sum([float(sums[name][0]) / sums[name][1] for name in names])
    return {name: mean / process.world_size for name, mean in zip(names, means)}


@torch.no_grad()
def evaluate(model, criterion, loader, perceptual, config, process, stop_signal):
    """Validate the bare model on this rank's share of the scenes, and reduce over the ranks.

    Returns:
        dict of means over all validation scenes (loss, l1, lpips; PSNR in dB in the hole and in the overlap, of
        the network, visible fit and the oracle; gap_closed), and the first scenes for a figure.

    Raises:
        Stopped: a signal asked to stop, on this rank or another.
    """
    model.eval()
    quiet = None if process.is_main else True
    sums, drawn = {}, []
    for loaded in tqdm(read_batches(loader), desc="validation", total=len(loader), disable=quiet, leave=False):
        if stop_signal.number is not None:
            break
        batch = to_batch(loaded, process.device)
        out = model(**inputs_of(batch))
        _, parts = criterion(out, batch, perceptual, config.lpips_weight)
        scenes = {**batch, **out}
        images = {"ours": out["fused"], **apply_rules(scenes, rules=("visible_fit",)), "oracle": oracle(scenes)[0]}
        for name, values in compare_methods(scenes, images).items():
            parts[name.removeprefix("ours_")] = values
        for name, values in parts.items():
            known = values[~values.isnan()].double()
            total, count = sums.get(name, (0, 0))
            sums[name] = (total + known.sum().item(), count + len(known))
        if process.is_main and len(drawn) < config.figure_scenes:
            drawn += to_arrays(scenes)[: config.figure_scenes - len(drawn)]
    if process.any(stop_signal.number is not None):
        raise Stopped
    # a rank without validation scenes takes part, too
    names = sorted(["loss", "l1", *(["lpips"] if perceptual else []), *(
        f"{who}psnr{where}" for who in ("", "visible_fit_", "oracle_") for where in ("", "_overlap"))])
    flat = [number for name in names for number in sums.get(name, (0, 0))]
    flat = process.sum(flat)
    metrics = {name: flat[2 * i] / flat[2 * i + 1] if flat[2 * i + 1] else math.nan for i, name in enumerate(names)}
    metrics["gap_closed"] = gap_closed(metrics["psnr"], metrics["visible_fit_psnr"], metrics["oracle_psnr"])
    return metrics, drawn
