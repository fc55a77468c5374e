"""One epoch of training, and validation."""

import contextlib
import math
import time

import torch
from tqdm import tqdm

from amodal_fusion.data.tensors import inputs_of, to_arrays
from amodal_fusion.evaluation.metrics import compare_methods, gap_closed
from amodal_fusion.evaluation.rules import apply_rules, oracle
from amodal_fusion.precision import training_precision
from amodal_fusion.training.loaders import read_batches
from amodal_fusion.training.optimizers import set_rate
from amodal_fusion.training.shutdown import Stopped


def to_device(batch, device):
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def gradients_by(run, network, criterion, perceptual):
    """A function that adds the gradients of a batch's loss to those of the weights.

    Args:
        network: run.model, or its DistributedDataParallel.
        criterion: `fusion_loss`.

    Returns:
        function of a batch, on the device, and oracle_weight, a tensor or None → the loss and its parts, scalars.
    """
    config, device = run.config, run.process.device
    half = training_precision(config.amp, device)
    coherence = config.switching_weight, config.hedging_weight
    coherence = coherence if any(coherence) else None

    def gradients(oracle_weight=None, **batch):
        with torch.autocast(device.type, half, enabled=half is not None):
            out = network(**inputs_of(batch))
            loss, parts = criterion(out, batch, perceptual, config.lpips_weight, oracle_weight, config.psnr_weight,
                                    coherence)
        run.scaler.scale(loss / config.accumulate).backward()
        return loss.detach(), {name: values.detach().mean() for name, values in parts.items()}

    return gradients


def train_one_epoch(run, network, gradients, loader, sampler, stop_signal):
    """Train from where `run` stands to the end of its epoch, a signal or max_steps.

    Args:
        network: run.model, or its DistributedDataParallel; gradients: see `gradients_by`.
        stop_signal: StopSignal.

    Returns:
        True when a signal asked to stop. The caller saves.
    """
    config, process = run.config, run.process
    steps = run.steps_left
    if not steps:  # stopped during validation, or fewer scenes are left than one step takes now
        return False
    sampler.epoch, sampler.start, sampler.stop = run.epoch, run.scenes_done, run.scenes_done + steps * run.batch
    network.train()
    parameters = list(run.model.parameters())
    batches = read_batches(loader)
    quiet = None if process.is_main else True  # None: a bar only where there is a terminal
    sums, summed, skipped, logged_at = {}, 0, 0, time.monotonic()  # sums: of each term, and over how many batches
    bar = tqdm(range(steps), desc=f"epoch {run.epoch + 1}/{config.epochs}", disable=quiet, leave=False)
    for number in bar:
        rate, oracle_weight = run.rate, run.oracle_weight
        set_rate(run.optimizer, rate)
        terms = {"oracle_weight": torch.full((), oracle_weight, device=process.device)} if oracle_weight else {}
        scenes, losses = [], []
        for part in range(config.accumulate):
            batch = to_device(next(batches), process.device)
            scenes.append(batch["index"])
            last = part == config.accumulate - 1
            with contextlib.nullcontext() if last or not process.distributed else network.no_sync():
                loss, parts = gradients(**terms, **batch)
            losses.append(loss.clone())
            for name, value in parts.items():
                total, count = sums.get(name, (0, 0))
                sums[name] = total + value, count + 1

        run.scaler.unscale_(run.optimizer)
        summed += 1
        # A NaN on any rank is in everybody's gradient by now, so all ranks decide alike.
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
        if torch.isfinite(norm):
            run.move()
            run.ema.update_parameters(run.model)
            run.bad_steps = 0
        else:
            skipped += 1
            # fp16 begins with a factor on the loss that is too large, on purpose: an overflow is nobody's fault
            if run.scaler.get_scale() <= 1 or process.any(not all(map(math.isfinite, losses))):
                run.report_bad_step([str(loader.dataset.scene_ids[index]) for index in torch.cat(scenes).tolist()])
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=not run.recorded)
        run.advance()

        stopped = stop_signal.agreed(process)
        if run.is_due(config.log_every) or number == steps - 1 or stopped:  # every step stands in a line
            names = sorted(sums)
            means = process.sum([float(sums[name][0]) / sums[name][1] for name in names])
            record = {name: mean / process.world_size for name, mean in zip(names, means)}
            seconds, logged_at = time.monotonic() - logged_at, time.monotonic()
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


@torch.no_grad()
def evaluate(model, criterion, loader, perceptual, config, process, stop_signal):
    """Validate the bare model on this rank's share of the scenes and add up over the ranks.

    Returns:
        dict of means over all validation scenes (loss, l1, lpips; PSNR in dB in the hole and in the overlap, for
        the model, for visible fit and for the oracle; gap_closed), and the first scenes for a figure.

    Raises:
        Stopped: a signal asked to, on this rank or another.
    """
    model.eval()
    quiet = None if process.is_main else True
    sums, drawn = {}, []
    for loaded in tqdm(read_batches(loader), desc="validation", total=len(loader), disable=quiet, leave=False):
        if stop_signal.number is not None:
            break
        batch = to_device(loaded, process.device)
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
    # a rank without a validation scene still has to take part in the sum
    names = sorted(["loss", "l1", *(["lpips"] if perceptual else []), *(
        f"{who}psnr{where}" for who in ("", "visible_fit_", "oracle_") for where in ("", "_overlap"))])
    flat = [number for name in names for number in sums.get(name, (0, 0))]
    flat = process.sum(flat)
    metrics = {name: flat[2 * i] / flat[2 * i + 1] if flat[2 * i + 1] else math.nan for i, name in enumerate(names)}
    metrics["gap_closed"] = gap_closed(metrics["psnr"], metrics["visible_fit_psnr"], metrics["oracle_psnr"])
    return metrics, drawn
