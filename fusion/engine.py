"""One epoch of training, and validation."""

import contextlib
import math
import time

import torch
from tqdm import tqdm

from fusion.data.tensors import to_arrays, training_precision
from fusion.metrics import apply_rules, compare_methods, gap_closed, oracle
from fusion.training import distributed
from fusion.training.loaders import read_batches


def to_device(batch, device):
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def train_one_epoch(run, network, criterion, loader, sampler, perceptual, stop_signal):
    """Train from where `run` stands to the end of its epoch, a signal or max_steps.

    Args:
        network: run.model, or its DistributedDataParallel.
        criterion: `fusion_loss`.
        stop_signal: list that a signal handler appends to.

    Returns:
        True when a signal asked to stop. The caller saves.
    """
    config, process = run.config, run.process
    per_step = process.world_size * config.batch_size * config.accumulate
    sampler.set_epoch(run.epoch)
    sampler.start = run.scenes_done
    steps = (len(sampler) * process.world_size - run.scenes_done) // per_step
    if config.max_steps is not None:
        steps = min(steps, config.max_steps - run.step)
    network.train()
    parameters = list(run.model.parameters())
    half = training_precision(config.amp, process.device)
    autocast = torch.autocast(process.device.type, half, enabled=half is not None)
    batches = read_batches(loader)
    quiet = None if process.is_main else True  # None: a bar only where there is a terminal
    sums, logged_at, skipped = {}, time.monotonic(), 0
    bar = tqdm(range(steps), desc=f"epoch {run.epoch + 1}/{config.epochs}", disable=quiet, leave=False)
    for _ in bar:
        fade = 1 - run.step / max(1, config.oracle_fade * run.total_steps)
        oracle_weight = config.oracle_weight * max(0.0, fade)
        scenes = []
        for part in range(config.accumulate):
            batch = to_device(next(batches), process.device)
            scenes.append(batch["index"])
            last = part == config.accumulate - 1
            with contextlib.nullcontext() if last or not process.distributed else network.no_sync():
                with autocast:
                    out = network(batch["partial"], batch["mask"], batch["completions"], batch["valid"])
                    loss, parts = criterion(out, batch, perceptual, config.lpips_weight, oracle_weight,
                                              config.psnr_weight)
                run.scaler.scale(loss / config.accumulate).backward()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value.detach().mean() / config.accumulate

        run.scaler.unscale_(run.optimizer)
        # A NaN on any rank is in everybody's gradient by now, so all ranks decide alike.
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        if torch.isfinite(norm):
            run.scaler.step(run.optimizer)
            run.ema.update_parameters(run.model)
            run.bad_steps = 0
        else:
            skipped += 1
            run.bad_steps += 1
            run.report_bad_step([str(loader.dataset.scene_ids[index]) for index in torch.cat(scenes).tolist()])
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        run.scheduler.step()
        run.step += 1
        run.scenes_done += per_step

        if run.step % config.log_every == 0:
            names = sorted(sums)
            means = distributed.sum_over_ranks([float(sums[name]) for name in names], process.device)
            record = {name: mean / process.world_size / config.log_every for name, mean in zip(names, means)}
            seconds, logged_at = time.monotonic() - logged_at, time.monotonic()
            record |= {"lr": run.scheduler.get_last_lr()[0], "grad_norm": float(norm), "skipped": skipped,
                       "scenes_per_second": per_step * config.log_every / seconds}
            run.log("train", record)
            bar.set_postfix(loss=f"{record['loss']:.4f}")
            sums = {}
        if distributed.any_rank(bool(stop_signal), process.device):
            return True
        if run.step % config.save_every == 0:
            run.save("last.pth")
    return False


@torch.no_grad()
def evaluate(model, criterion, loader, perceptual, config, process):
    """Validate the bare model on this rank's share of the scenes and add up over the ranks.

    Returns:
        dict of means over all validation scenes (loss, l1, lpips; PSNR in dB in the hole and in the overlap, for
        the model, for visible fit and for the oracle; gap_closed), and the first scenes for a figure.
    """
    model.eval()
    quiet = None if process.is_main else True
    sums, drawn = {}, []
    for loaded in tqdm(read_batches(loader), desc="validation", total=len(loader), disable=quiet, leave=False):
        batch = to_device(loaded, process.device)
        out = model(batch["partial"], batch["mask"], batch["completions"], batch["valid"])
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
    # a rank without a validation scene still has to take part in the sum
    names = sorted(["loss", "l1", *(["lpips"] if perceptual else []), *(
        f"{who}psnr{where}" for who in ("", "visible_fit_", "oracle_") for where in ("", "_overlap"))])
    flat = [number for name in names for number in sums.get(name, (0, 0))]
    flat = distributed.sum_over_ranks(flat, process.device)
    metrics = {name: flat[2 * i] / flat[2 * i + 1] if flat[2 * i + 1] else math.nan for i, name in enumerate(names)}
    metrics["gap_closed"] = gap_closed(metrics["psnr"], metrics["visible_fit_psnr"], metrics["oracle_psnr"])
    return metrics, drawn


def describe(metrics):
    """One console line of validation metrics."""
    return (f"validation loss {metrics['loss']:.4f}, PSNR {metrics['psnr']:.2f} dB (visible fit "
            f"{metrics['visible_fit_psnr']:.2f}, oracle {metrics['oracle_psnr']:.2f}, gap closed "
            f"{metrics['gap_closed']:.2f}), in the overlap {metrics['psnr_overlap']:.2f} dB "
            f"({metrics['visible_fit_psnr_overlap']:.2f}, {metrics['oracle_psnr_overlap']:.2f})")
