"""Fuse a folder of scenes: find the scenes to fuse, fuse them, write tables and reports.

In all functions `config` is the InferenceConfig of the inference script.
"""

import json
import math
import re
import sys
from collections import deque
from pathlib import Path

import torch
from tqdm import tqdm

from amodal_fusion.data.names import case_twins, is_utf8, printable
from amodal_fusion.data.scenes import find_scenes, read_list
from amodal_fusion.distributed import local_rank
from amodal_fusion.errors import ConfigError, LpipsUnavailable, SceneError, UserError
from amodal_fusion.evaluation.inpainters import GIVEN, PATCHMATCH, check_command
from amodal_fusion.evaluation.perceptual import PerceptualLoss
from amodal_fusion.evaluation.tables import METHODS
from amodal_fusion.files import check_ours, ignores_case, ours_in, take_output
from amodal_fusion.output.flat_names import remove_flat, write_flat
from amodal_fusion.output.handover import check_handover, write_handover
from amodal_fusion.output.html_report import command_of, rewrite_report, write_report
from amodal_fusion.output.locks import list_locks
from amodal_fusion.output.records import read_record, remove_outputs, state_of
from amodal_fusion.output.results import Results, check_results
from amodal_fusion.output.run_tables import TABLES, remove_stale, write_failures, write_table
from amodal_fusion.output.scene_reader import MOST_CANDIDATE_PIXELS, SceneReader, batches, count_candidates
from amodal_fusion.output.scene_writer import SceneWriter
from amodal_fusion.pools import Failure, Helpers, unforeseen


def run_folder(config, predictor, made_by, process):
    """Fuse the folder of scenes, together with the other processes; returns the exit status.

    Args:
        predictor: FusionPredictor; made_by: weights and options that decide its results; process: Process.

    Raises:
        UserError, OSError: the whole run failed. Single scenes that fail are listed in failed.csv.
    """
    output_dir = Path(config.output_dir)
    command = check_command(config.inpaint_command) if config.inpaint_command else None
    scene_ids, has_originals = on_main(process, list_scenes, config)
    locks = on_main(process, list_locks, config.lock, config.locks, config.data_dir, scene_ids,
                    config.n_max_completions)
    held = []  # the lock, held until the function returns
    on_main(process, lambda: held.append(take_output(output_dir)))
    on_main(process, check_names, config, scene_ids, has_originals)
    perceptual = perceptual_if_available(config, process) if config.metrics and has_originals else None
    if config.evaluate and PATCHMATCH is None and process.is_main:
        print("note: the evaluation is without PatchMatch; pip install gmic adds it", file=sys.stderr)
    writer = SceneWriter(Path(config.data_dir), output_dir, made_by, config.n_max_completions, config.figures,
                         config.metrics, config.evaluate, command, config.seam,
                         predictor.guide_confidence if config.guide_confidence is None else config.guide_confidence,
                         config.min_region, locks, perceptual)
    todo = on_main(process, find_work, config, scene_ids, writer)
    parts = process.gather(fuse_folder(config, predictor, todo, process, writer))
    process.leave()
    failed = {scene_id: fault for part in parts for scene_id, fault in part.items()}
    if not process.is_main:
        return 0
    fused = [scene_id for scene_id in scene_ids if scene_id not in failed]
    try:
        results = Results(config, fused, perceptual) if config.results and has_originals else None
        text = (write_table(output_dir, fused, made_by, config.group_by, results)
                if config.metrics and has_originals else None)
        if todo and not text:
            remove_stale(output_dir)
        print((text or "") + f"{len(todo) - len(failed)} scenes fused into {output_dir}")
        write_folder_outputs(config, fused, todo, results.rows if results else {})
    finally:
        for scene_id in failed:  # outputs of an earlier run are out of date
            remove_outputs(output_dir / scene_id)
        write_failures(output_dir, failed)
    if any("prepare_dataset.py create" in fault for fault in failed.values()):
        print(f"this command turns raw results into scenes: {create_command(config)}", file=sys.stderr)
    return 1 if failed else 0


def on_main(process, function, *arguments):
    """Call the function in the main process; all processes get its result, or raise its error."""
    result = None
    if process.is_main:
        try:
            result = function(*arguments)
        except (UserError, OSError) as error:
            result = error
    result = process.from_main(result)
    if isinstance(result, Exception):
        raise result
    return result


def check_options(config):
    """Raise ConfigError if the options contradict each other."""
    for name in ("data_dir", "output_dir"):
        if not getattr(config, name):
            raise ConfigError("give a folder", name)
    if Path(config.data_dir).resolve() == Path(config.output_dir).resolve():
        raise ConfigError(f"{config.output_dir} is the folder of the scenes; choose another one", "output_dir")
    for _, folder in handover_folders(config):
        check_handover(config.handover[0], folder, config.data_dir, config.output_dir)
    wrong = sorted(set(config.handover_given) - set(GIVEN))
    if wrong or not config.handover_given:
        raise ConfigError(f"{', '.join(wrong) or 'nothing'}: expected some of {', '.join(GIVEN)}", "handover_given")
    if config.handover_given != ("guide",) and not config.handover:
        raise ConfigError("what is given is only used by a handover; ask for one", "handover")
    check_results(config.results or ())
    if (config.clip_weights or config.fid_weights) and not config.results:
        raise ConfigError("CLIP similarity and FID are only measured of results; name some", "results")
    if config.results and not config.metrics:
        raise ConfigError("results are measured in the metrics, which are off", "results", "metrics")
    if config.inpaint_command and not config.evaluate:
        raise ConfigError("the inpainting command is only run by an evaluation; ask for one", "evaluate")
    if config.flat_names and not config.figures:
        raise ConfigError("the flat names include the figure; do not leave it out", "flat_names", "no-figures")
    try:
        re.compile(config.group_by or "")
    except re.error as error:
        raise ConfigError(f"{config.group_by}: not a regular expression ({error})", "group_by") from None


def list_scenes(config):
    """Ids of the scenes to fuse, and whether any of them has an original.

    Raises:
        SceneError: there is no scene, or a name is not UTF-8; and as in `read_list`.
    """
    data_dir = Path(config.data_dir)
    try:
        scene_ids = read_list(config.scene_list, data_dir) if config.scene_list else find_scenes(data_dir)
    except SceneError as error:
        if config.scene_list or not data_dir.is_dir():
            raise
        raise SceneError(str(error), terminal=f"{error}\n  {create_command(config)}") from None
    for scene_id in scene_ids:
        if not is_utf8(scene_id):
            raise SceneError(f"{data_dir}: the name of the folder {printable(scene_id)} is not UTF-8, but lists and "
                             "reports are; rename it, or set a UTF-8 locale (export LC_ALL=C.UTF-8)")
    return scene_ids, any((data_dir / scene_id / "original.png").exists() for scene_id in scene_ids)


def check_names(config, scene_ids, has_originals):
    """Raise ConfigError if a table would overwrite a file that this program did not write, or a scene another scene."""
    twins = case_twins(scene_ids) if ignores_case(Path(config.output_dir)) else {}
    if twins:
        pair = " and ".join(next(iter(twins.items())))
        raise ConfigError(f"{config.output_dir}: its disk ignores case, and {pair} would be one folder; rename one, or "
                          "choose a folder on another disk", "output_dir")
    names = ["failed.csv", *(TABLES if config.metrics and has_originals else ()),
             *(["report.html"] if config.report else ())]
    try:
        check_ours([Path(config.output_dir) / name for name in names])
    except UserError as error:
        raise ConfigError(str(error), "output_dir") from None


def create_command(config):
    """The command that turns raw results into scenes."""
    data_dir = config.data_dir.rstrip("/")
    return f"python prepare_dataset.py create --input_dir {data_dir} --output_dir {data_dir}_scenes"


def perceptual_if_available(config, process):
    """LPIPS for the metrics; None, with a message, without a backbone. One process goes first to download it."""
    def load():
        try:
            return PerceptualLoss(config.lpips_net, config.lpips_weights)
        except LpipsUnavailable as error:
            print(f"no LPIPS in the metrics: {error.for_terminal()}", file=sys.stderr)
            return None

    perceptual = load() if process.is_main else None
    available = process.from_main(perceptual is not None)
    return load() if available and not process.is_main else perceptual


def choose_device(config, process):
    """Name of this process's device: one GPU for each of several processes."""
    if config.gpus == 0:
        return "cpu"
    if process.world_size > 1 and config.device != "cpu" and torch.cuda.is_available():
        return f"cuda:{local_rank() % torch.cuda.device_count()}"
    return config.device


def find_work(config, scene_ids, writer):
    """Ids of the scenes to fuse, in order; prints how many are skipped or recomputed.

    Raises:
        ConfigError: existing outputs were made by other weights, another network version or other options.
    """
    data_dir, output_dir = Path(config.data_dir), Path(config.output_dir)
    states = {scene_id: state_of(output_dir / scene_id, data_dir / scene_id, writer.made_by,
                                 lambda record, scene_id=scene_id: is_complete(config, writer, scene_id, record))
              for scene_id in tqdm(scene_ids, "look", disable=None, leave=False)}
    if config.overwrite:
        return scene_ids
    other = [scene_id for scene_id, state in states.items() if state == "other"]
    if other:
        record = read_record(output_dir / other[0])
        before = json.dumps(record["made_by"]) if record else "unknown"
        raise ConfigError(f"{len(other)} of the scenes in {output_dir} were made by other weights, by another version "
                          f"of the network or with other options ({other[0]}: {before}; now "
                          f"{json.dumps(writer.made_by)}); choose another output folder or recompute all",
                          "output_dir", "overwrite")
    todo = [scene_id for scene_id in scene_ids if states[scene_id] != "done"]
    if len(todo) < len(scene_ids):
        print(f"{len(scene_ids) - len(todo)} of {len(scene_ids)} scenes are done (--overwrite recomputes them)")
    changed = [scene_id for scene_id in todo if states[scene_id] == "changed"]
    relocked = sum(read_record(output_dir / scene_id)["asked"].get("locks") != writer.asked(scene_id)["locks"]
                   for scene_id in changed)
    for count, reason in ((relocked, "their locks changed"),
                          (len(changed) - relocked, "their files or options changed, or outputs are missing")):
        if count:
            print(f"{count} scenes are recomputed: {reason}")
    return todo


def is_complete(config, writer, scene_id, record):
    """Whether a scene has all outputs that this run would write, with the same locks and guide options."""
    metrics, asked, now = record["metrics"], record["asked"], writer.asked(scene_id)
    named = ["locks", "guide", *(["lpips"] if writer.perceptual else []),
             *(["inpaint_command", "seam"] if config.evaluate else [])]
    if any(asked.get(name) != now[name] for name in named):
        return False
    if config.figures and "figure.png" not in record["files"]:
        return False
    if not config.metrics or not (Path(config.data_dir) / scene_id / "original.png").exists():
        return True
    wanted = [*METHODS, *(["telea_guide"] if config.evaluate else []),
              *(["patchmatch_guide"] if config.evaluate and PATCHMATCH else [])]
    return metrics is not None and all(f"{name}_psnr" in metrics for name in wanted)


class Progress:
    """Counts finished scenes of all processes on one progress bar, and keeps the faults."""

    def __init__(self, total, process):
        self.failed = {}  # scene id → fault
        self.process = process
        self.bar = tqdm(total=total, desc="fuse", disable=None if process.is_main else True)

    def record(self, scene_id, outcome):
        if isinstance(outcome, Failure):
            self.failed[scene_id] = str(outcome)
        self.bar.update(self.process.finish(1) - self.bar.n)


def fuse_folder(config, predictor, todo, process, writer):
    """Fuse and write this process's share of the scenes `todo`.

    Args:
        predictor: FusionPredictor; writer: SceneWriter.

    Returns:
        dict scene id → fault.
    """
    reader = SceneReader(Path(config.data_dir), config.n_max_completions, predictor.img_size)
    progress, ahead, pending = Progress(len(todo), process), 2 * max(1, config.workers), deque()

    def finish(writers, at_most):
        while len(pending) > at_most:  # bounds the memory of waiting scenes
            scene_id, job = pending.popleft()
            progress.record(scene_id, writers.outcome(job))

    with progress.bar, Helpers(reader, config.workers) as readers, Helpers(writer, config.workers) as writers:
        outcomes = readers.map(share_of(todo, config.batch_size, process), ahead)
        for group in batches(readable_scenes(outcomes, predictor.img_size, progress)):
            for scene_id, scene, logits, digest in predict_group(predictor, group, progress):
                pending.append((scene_id, writers.submit(scene_id, scene, logits, digest)))
                finish(writers, ahead)
        finish(writers, 0)
    return progress.failed


def share_of(todo, batch_size, process):
    """(chunk number, scene id), … of this process: whenever it is ready it takes the next chunk of the list."""
    for chunk in process.take(math.ceil(len(todo) / batch_size)):
        for scene_id in todo[chunk * batch_size : (chunk + 1) * batch_size]:
            yield chunk, scene_id


def readable_scenes(outcomes, img_size, progress):
    """(chunk, scene id, *result of SceneReader); scenes that cannot be read are recorded as failed and skipped."""
    most, noted = max(0, MOST_CANDIDATE_PIXELS // img_size**2 - 1), False
    for (chunk, scene_id), outcome in outcomes:
        if isinstance(outcome, Failure):
            progress.record(scene_id, outcome)
            continue
        count = count_candidates(outcome[0], img_size)
        if count > most and not noted:
            noted = True
            remedy = (f"--n_max_completions {most} keeps that size" if most else
                       f"with one completion --img_size {math.isqrt(MOST_CANDIDATE_PIXELS // 2)} is the largest")
            print(f"note: {scene_id} has {count} completions; to bound memory the network sees scenes with more than "
                  f"{most} at less than --img_size {img_size} ({remedy})", file=sys.stderr)
        yield chunk, scene_id, *outcome


def predict_group(predictor, group, progress):
    """(scene id, scene, logits, digest) of the scenes of one forward pass; if it fails, that is recorded."""
    try:
        logits = predictor.predict_logits([small for _, small, *_ in group])
    except Exception as error:  # also an unforeseen one: other scenes continue
        fault = error.for_terminal() if isinstance(error, UserError) else unforeseen(error)
        for scene_id, *_ in group:
            progress.record(scene_id, Failure(fault))
        return
    for (scene_id, _, scene, digest), scene_logits in zip(group, logits):
        yield scene_id, scene, scene_logits.numpy(), digest


def handover_folders(config):
    """(what the inpainter is given, folder for it), … of --handover."""
    if not config.handover:
        return []
    place, several = Path(config.handover[1]), len(config.handover_given) > 1
    return [(given, place / given if several else place) for given in dict.fromkeys(config.handover_given)]


def write_folder_outputs(config, scene_ids, todo, results):
    """Write the handover folders, flat files and the report of all fused scenes.

    Without the options for them, those of earlier runs are kept, but for what the scenes `todo` made out of date.

    Args:
        results: scene id → metrics of inpainters.
    """
    for given, folder in handover_folders(config):
        count, whole = write_handover(config.handover[0], folder, config.data_dir, config.output_dir, scene_ids,
                                      config.seam, given)
        print(f"{count} scenes written to {folder}, {whole} with nothing left to draw; see its README.txt")
    if config.flat_names:
        print(f"{write_flat(config.data_dir, config.output_dir, scene_ids, config.workers)} files with flat names")
    else:
        removed = remove_flat(config.output_dir, scene_ids=todo)
        if removed:
            print(f"{removed} files with flat names removed, of scenes that were recomputed; --flat_names writes them")
    page = None
    if config.report:
        page = write_report(config.data_dir, config.output_dir, scene_ids, config.workers, command_of(config), results)
    elif todo and "report.html" in ours_in(Path(config.output_dir)):
        page = rewrite_report(config.data_dir, config.output_dir, scene_ids, config.workers)
    if page:
        print(f"report: {page}")
