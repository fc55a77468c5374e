"""Fuse a folder of scenes with a trained network.

    python amodal_fusion_transformer_inference.py --data_dir examples/scenes --output_dir outputs
    python amodal_fusion_transformer_inference.py --data_dir TEST --output_dir OUT \\
        --checkpoint checkpoints/transformer_run1/best_model.pth --n_max_completions 5 --img_size 256
    torchrun --nproc_per_node 2 amodal_fusion_transformer_inference.py --data_dir TEST --output_dir OUT

The first takes the weights that ship; the last shares the scenes among two processes, as --gpus 2 does. Read is a
folder per scene: partial.png, mask.png (255 = hole), comp1.png …, and original.png where there is one. Written per
scene, at its own size:

    OUT/<id>/fused.png            the completions, weighted and blended
    OUT/<id>/residual_mask.png    255 where none of them won: what an inpainter should still draw
    OUT/<id>/weight_1.png …       16 bit, 65535 = the pixel is this completion's alone
    OUT/<id>/order.json           who is in front of whom
    OUT/<id>/figure.png           all of it in one picture
    OUT/<id>/scene.json           what made it, and its metrics
    OUT/metrics.csv, summary.*    with originals: per scene, and means beside every simple rule and the oracle

An interrupted run goes on where it was. Exit status: 0 all is well, 1 some scenes could not be fused (they are named,
and in OUT/failed.csv), 2 wrong usage, 130 after Ctrl-C.
"""

import hashlib
import json
import math
import os
import re
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from amodal_fusion.checkpoints import PRETRAINED, check_writable
from amodal_fusion.config import check_values, option, parse
from amodal_fusion.data.names import is_utf8, printable
from amodal_fusion.data.scenes import find_scenes, read_list
from amodal_fusion.data.tensors import INPUTS, as_scene, to_tensors
from amodal_fusion.distributed import Sharing, check_gpus, launch, under_launcher
from amodal_fusion.errors import ConfigError, LpipsUnavailable, SceneError, UserError, is_out_of_memory
from amodal_fusion.evaluation.inpainters import check_command
from amodal_fusion.evaluation.perceptual import PerceptualLoss
from amodal_fusion.files import take_output
from amodal_fusion.model.blending import blend_hole
from amodal_fusion.output.handover import check_handover, write_handover
from amodal_fusion.output.html_report import write_report
from amodal_fusion.output.onnx_export import export_onnx
from amodal_fusion.output.order import list_locks
from amodal_fusion.output.records import read_record, remove_outputs, state_of
from amodal_fusion.output.run_tables import TABLES, remove_stale, write_failures, write_table
from amodal_fusion.output.scene_reader import MOST_CANDIDATE_PIXELS, SceneReader, batches, network_size
from amodal_fusion.output.scene_writer import SceneWriter, as_result
from amodal_fusion.pools import Failure, Helpers
from amodal_fusion.precision import HALF_PRECISION
from amodal_fusion_transformer import load_model

SHIPPED = PRETRAINED / "amodal_fusion_transformer.pth"


def checkpoint_decides(name):
    """An option of the training script that has no say here: its type, and what to tell who gives it."""
    return str, lambda value, _: f"{name} {value} is not used: the checkpoint decides"


CHECKPOINT_DECIDES = {name: checkpoint_decides(name) for name in (
    "config", "d_model", "nhead", "num_encoder_layers", "num_decoder_layers", "dim_feedforward", "dropout",
    "width", "encoder_layers", "decoder_layers", "heads")}


@dataclass
class InferenceConfig:
    """Every option of the inference script. The network's own come from the checkpoint."""

    ALIASES = CHECKPOINT_DECIDES  # without a type: no option

    data_dir: str = option("", "folder of scenes", "data", aliases={"input_dir": ""})
    scene_list: str | None = option(None, "fuse only the scenes of this list, one id per line", "data",
                                    aliases={"list": "", "image_list": "one scene id per line"})
    n_max_completions: int | None = option(None, "use the first so many completions of a scene; None: all",
                                           "data", least=1)
    img_size: int | None = option(None, "the network sees each scene at the area of img_size², px; outputs keep "
                                        "their size; None: what the checkpoint recommends", "data", least=16)
    checkpoint: str = option(str(SHIPPED), "checkpoint of the training script, or the weights that ship", "network")
    device: str = option("auto", "auto takes a GPU if there is one", "network", ("auto", "cuda", "cpu"))
    gpus: int | None = option(None, "processes that share the scenes, one per GPU; 0: the CPU; None: one, by --device",
                              "network", least=0)
    amp: str = option("off", "half precision", "network", tuple(HALF_PRECISION))
    sharpness: float = option(1.0, "factor of the network's logits: above 1 the picture is more decided, less of a "
                              "blend", "network", least=0, most=100)
    batch_size: int = option(4, "scenes per forward pass; scenes of different sizes never share one",
                             "network", least=1)
    export_onnx: str | None = option(None, "write the network to this ONNX file, and stop", "network")
    output_dir: str = option("", "folder to write", "output")
    overwrite: bool = option(False, "fuse scenes again whose outputs are there", "output")
    figures: bool = option(True, "draw figure.png per scene", "output")
    metrics: bool = option(True, "with originals: metrics.csv, summary.md and summary.png", "output")
    group_by: str | None = option(None, "regular expression; scenes whose ids share what it matches at their start "
                                        "(its first group, if it has one) are of one photo, for the intervals; None: "
                                        "those with the same original", "output")
    evaluate: bool = option(False, "in the metrics, also what two inpainters make of the fused images", "output")
    inpaint_command: str | None = option(None, "with --evaluate, also what this program makes of them: "
                                               "'CMD {image} {mask} {output}'", "output")
    handover: tuple | None = option(None, "also write the fused images for an inpainter: lama, iopaint, mat or "
                                          "diffusers, and a folder", "output", choices=("CONSUMER", "DIR"))
    seam: int = option(0, "what an inpainter shall draw is grown by so many pixels, inside the hole", "output", least=0)
    locks: str | None = option(None, "YAML file of lines like  scene_7: [1>3, 2>4]  for completion 1 in front of 3 and "
                                     "2 of 4, whatever the network says; 0 is none of them", "output")
    lock: str | None = option(None, "the same for a single scene, as in --lock '1>3, 2>4'", "output")
    report: bool = option(False, "write report.html, a page to look through all scenes", "output")
    lpips_net: str = option("alex", "backbone of LPIPS in the metrics", "output", ("alex", "vgg", "squeeze"))
    lpips_weights: str | None = option(None, "torchvision checkpoint of that backbone; None: cache, then download",
                                       "output")
    workers: int = option(min(4, os.cpu_count() or 1), "processes that read, and as many that write; 0: none but this",
                          "output", least=0, aliases={"num_workers": ""})


# ----------------------------------------------------------------------------
# The network


class FusionPredictor:
    """A trained network, for scenes of any size with any number of completions.

    Args:
        checkpoint: path of a checkpoint; None takes the weights that ship.
        device: "auto" (a GPU if there is one), "cuda", "cuda:1" or "cpu".
        img_size: the network sees a scene at the area of img_size², px; None takes what the checkpoint recommends.
        amp: "off", "bf16" or "fp16".
        sharpness: factor of the logits; 0 weighs alike all that covers a pixel, a large one picks a single candidate.

    Raises:
        UserError: the checkpoint cannot be used, there is no such device, or sharpness is not from 0 to 100.
    """

    def __init__(self, checkpoint=None, device="auto", img_size=None, amp="off", sharpness=1.0):
        options = check_values({"sharpness": str(sharpness), "amp": amp}, InferenceConfig, "FusionPredictor")
        self.sharpness, self.amp = options["sharpness"], options["amp"]
        found = torch.cuda.is_available()
        if str(device).startswith("cuda") and not found:
            raise ConfigError(f"--device {device}, but there is no GPU; use --device cpu")
        self.model, config = load_model(checkpoint or SHIPPED)
        self.digest = digest_of(self.model)
        try:
            self.device = torch.device(("cuda" if found else "cpu") if device == "auto" else device)
            self.model.to(self.device)
        except RuntimeError as error:  # no such GPU, or another program has filled it
            raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from None
        self.img_size = img_size or config.get("inference_size") or config["img_size"]

    def fuse(self, partial, mask, completions):
        """Weigh and fuse the completions of one scene.

        Args:
            partial: the photo, RGB; mask: white in the hole; completions: list of RGBA pictures of that size. PIL
                images, numpy arrays or tensors; see `amodal_fusion.data.tensors.as_scene`.

        Returns:
            dict of weights, residual and fused. As numpy: (N,H,W) and (H,W) float32, together 1 in the hole and 0
            elsewhere, and (H,W,3) uint8. When `partial` is a tensor: (N,H,W), (1,H,W) and (3,H,W), float32 in [0,1].

        Raises:
            SceneError: the pictures do not fit together.
        """
        scene = as_scene(partial, mask, completions)
        size = network_size(scene.mask.shape, self.img_size, len(scene.completions))
        blend = blend_hole(scene, self.look([scene.resized(size)])[0])
        if isinstance(partial, torch.Tensor):
            result = as_result(scene, blend)
            return {name: result[name][0] for name in ("weights", "residual", "fused")}
        return {"weights": blend.on_picture(blend.weights.T).transpose(2, 0, 1),
                "residual": blend.on_picture(blend.residual), "fused": blend.fused(scene.partial)}

    def fuse_scenes(self, scenes):
        """Fuse Scenes of one size, or of one aspect; list of dicts as of `as_result`.

        Raises:
            SceneError: they are of several aspects, so that the network would see some of them distorted.
        """
        if not scenes:
            return []
        most = max(len(scene.completions) for scene in scenes)
        size, *others = {network_size(scene.mask.shape, self.img_size, most) for scene in scenes}
        if others:
            raise SceneError("scenes of several aspects; fuse those of each by themselves")
        looks = self.look([scene.resized(size) for scene in scenes])
        return [as_result(scene, blend_hole(scene, logits)) for scene, logits in zip(scenes, looks)]

    @torch.no_grad()
    def look(self, scenes):
        """What the network says of scenes that are already at its size.

        Args:
            scenes: list of Scene, all of one size (h,w).

        Returns:
            per scene its logits times sharpness, (M,h,w) float32 on the CPU, M = N + 1, the fill first.

        Raises:
            SceneError: there is not memory enough.
        """
        slots = max(len(scene.completions) for scene in scenes)
        tensors = [to_tensors(scene, slots) for scene in scenes]
        half = HALF_PRECISION[self.amp]
        try:
            batch = {name: torch.stack([scene[name] for scene in tensors]).to(self.device) for name in INPUTS}
            with torch.autocast(self.device.type, half, enabled=half is not None):
                out = self.model(**batch)
            logits = self.sharpness * out["logits"].float().cpu()  # (B,M,h,w)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise SceneError(f"out of memory on {self.device}; lower --batch_size or --img_size") from None
        return [logits[i, : len(scene.completions) + 1] for i, scene in enumerate(scenes)]


def digest_of(model):
    """A name for the network's weights: alike for a checkpoint and what was exported from it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def digest_of_code():
    """A text that changes with the code that the network and its blend are made of, comments included."""
    root = Path(__file__).parent
    files = [root / "amodal_fusion_transformer.py", *sorted((root / "fusion" / "model").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


# ----------------------------------------------------------------------------
# A folder of scenes


def fuse_folder(config, predictor, todo, sharing, writer):
    """Fuse and write this process's share of the scenes `todo`. Returns {scene id: what went wrong}."""
    reader = SceneReader(Path(config.data_dir), config.n_max_completions, predictor.img_size)
    failed, pending, crowded = {}, deque(), []
    most = max(0, MOST_CANDIDATE_PIXELS // predictor.img_size**2 - 1)
    way_out = (f"--n_max_completions {most} keeps that size" if most else
               f"with one completion --img_size {math.isqrt(MOST_CANDIDATE_PIXELS // 2)} is the largest")
    bar = tqdm(total=len(todo), desc="fuse", disable=None if sharing.is_main else True)

    def finish(writers, at_most):
        while len(pending) > at_most:  # bounds the memory that waiting scenes take
            scene_id, job = pending.popleft()
            record(scene_id, writers.outcome(job))

    def record(scene_id, outcome):
        if isinstance(outcome, Failure):
            failed[scene_id] = str(outcome)
        bar.update(sharing.finish(1) - bar.n)

    def read(readers):
        batch = config.batch_size
        items = ((chunk, scene_id) for chunk in sharing.take(math.ceil(len(todo) / batch))
                 for scene_id in todo[chunk * batch : (chunk + 1) * batch])
        for (chunk, scene_id), outcome in readers.map(items, 2 * max(1, config.workers)):
            if isinstance(outcome, Failure):
                record(scene_id, outcome)
                continue
            if len(outcome[0].completions) > most and not crowded:
                crowded.append(scene_id)
                print(f"note: {scene_id} has {len(outcome[0].completions)} completions; the network sees scenes with "
                      f"more than {most} smaller than --img_size {predictor.img_size}, to bound the memory "
                      f"({way_out})", file=sys.stderr)
            yield chunk, scene_id, *outcome

    with bar, Helpers(reader, config.workers) as readers, Helpers(writer, config.workers) as writers:
        for group in batches(read(readers)):
            try:
                looks = predictor.look([small for _, small, *_ in group])
            except SceneError as error:
                for scene_id, *_ in group:
                    record(scene_id, Failure(str(error)))
                continue
            for (scene_id, _, scene, digest), logits in zip(group, looks):
                pending.append((scene_id, writers.submit(scene_id, scene, logits.numpy(), digest)))
                finish(writers, 2 * max(1, config.workers))
        finish(writers, 0)
    return failed


def find_work(config, scene_ids, writer):
    """The scenes that are still to be fused, in order.

    Raises:
        ConfigError: other weights, code or options made outputs that are there.
    """
    made_by = writer.made_by

    def has_all(scene_id, record):
        metrics, asked, now = record["metrics"], record["asked"], writer.asked(scene_id)
        named = ["locks", *(["lpips"] if writer.perceptual else []),
                 *(["inpaint_command", "seam"] if config.evaluate else [])]
        if any(asked.get(name) != now[name] for name in named):
            return False
        if config.figures and "figure.png" not in record["files"]:
            return False
        if not config.metrics or not (data_dir / scene_id / "original.png").exists():
            return True
        return metrics is not None and (not config.evaluate or "telea_ours_psnr" in metrics)

    data_dir, output_dir = Path(config.data_dir), Path(config.output_dir)
    states = {scene_id: state_of(output_dir / scene_id, data_dir / scene_id, made_by,
                                 lambda record, scene_id=scene_id: has_all(scene_id, record))
              for scene_id in tqdm(scene_ids, "look", disable=None, leave=False)}
    other = [scene_id for scene_id, state in states.items() if state == "other"]
    if other and not config.overwrite:
        record = read_record(output_dir / other[0])
        before = json.dumps(record["made_by"]) if record else "an earlier version of this program"
        raise ConfigError(f"{len(other)} of the scenes in {output_dir} were made by other weights, by other code "
                          f"of the network or with other options ({other[0]}: {before}; now {json.dumps(made_by)}); "
                          "choose another --output_dir, or make them anew with --overwrite")
    todo = scene_ids if config.overwrite else [scene_id for scene_id in scene_ids if states[scene_id] != "done"]
    if len(todo) < len(scene_ids):
        print(f"{len(scene_ids) - len(todo)} of {len(scene_ids)} scenes are done already (anew with --overwrite)")
    changed = sum(states[scene_id] == "changed" for scene_id in todo)
    if changed and not config.overwrite:
        print(f"{changed} scenes are fused anew: their files have changed since, or outputs are missing")
    return todo


def hand_out(config, scene_ids):
    """What is made of all fused scenes together: a folder for an inpainter, and the report."""
    if config.handover:
        consumer, folder = config.handover
        count, whole = write_handover(consumer, folder, config.data_dir, config.output_dir, scene_ids, config.seam,
                                      config.workers)
        print(f"{count} scenes handed over in {folder}, {whole} with nothing left to draw; see its README.txt")
    if config.report:
        print(f"report: {write_report(config.data_dir, config.output_dir, scene_ids, config.workers)}")


# ----------------------------------------------------------------------------
# The script


def check_options(config):
    """Raise ConfigError for what can be told from the options alone."""
    for name in ("data_dir", "output_dir"):
        if not getattr(config, name):
            raise ConfigError(f"--{name} is missing")
    if Path(config.data_dir).resolve() == Path(config.output_dir).resolve():
        raise ConfigError(f"--output_dir {config.output_dir} is --data_dir itself; choose another folder")
    if config.handover:
        check_handover(*config.handover, config.data_dir, config.output_dir)
    if config.inpaint_command and not config.evaluate:
        raise ConfigError("--inpaint_command is measured by --evaluate; add that")
    try:
        re.compile(config.group_by or "")
    except re.error as error:
        raise ConfigError(f"--group_by {config.group_by}: not a regular expression ({error})") from None


def list_scenes(config):
    """Ids of the scenes to fuse, and whether any of them has an original."""
    data_dir = Path(config.data_dir)
    try:
        scene_ids = read_list(config.scene_list, data_dir) if config.scene_list else find_scenes(data_dir)
    except SceneError as error:
        if config.scene_list or not data_dir.is_dir():
            raise
        raise SceneError(f"{error}\n  {create_command(config)}") from None
    for scene_id in scene_ids:
        if not is_utf8(scene_id):
            raise SceneError(f"{data_dir}: a folder with the name {printable(scene_id)}, which is not UTF-8, as lists "
                             "and reports are; rename it, or if it looks right to you, set a UTF-8 locale "
                             "(export LC_ALL=C.UTF-8)")
    return scene_ids, any((data_dir / scene_id / "original.png").exists() for scene_id in scene_ids)


def create_command(config):
    data_dir = config.data_dir.rstrip("/")
    return f"python prepare_dataset.py create --input_dir {data_dir} --output_dir {data_dir}_scenes"


def perceptual_if_available(config, sharing):
    """LPIPS for the metrics; None, and a line, without a backbone. One process goes first: it may have to download."""
    def load():
        try:
            return PerceptualLoss(config.lpips_net, config.lpips_weights)
        except LpipsUnavailable as error:
            print(f"no LPIPS in the metrics: {error}", file=sys.stderr)
            return None

    perceptual = load() if sharing.is_main else None
    available = sharing.from_main(perceptual is not None)
    return load() if available and not sharing.is_main else perceptual


def choose_device(config, sharing):
    if config.gpus == 0:
        return "cpu"
    if sharing.world_size > 1 and config.device != "cpu" and torch.cuda.is_available():
        return f"cuda:{sharing.local_rank % torch.cuda.device_count()}"
    return config.device


def run(config):
    """Fuse the folder, together with the other processes of a launcher; returns the exit status."""
    sharing = Sharing()
    predictor = FusionPredictor(config.checkpoint, choose_device(config, sharing), config.img_size, config.amp,
                                config.sharpness)
    made_by = {"checkpoint": predictor.digest, "code": digest_of_code(), "img_size": predictor.img_size,
               "n_max_completions": config.n_max_completions, "amp": config.amp, "sharpness": config.sharpness}
    output_dir = Path(config.output_dir)
    command = check_command(config.inpaint_command) if config.inpaint_command else None

    def on_main(function, *arguments):  # what one process finds out for all, errors included
        result = None
        if sharing.is_main:
            try:
                result = function(*arguments)
            except (UserError, OSError) as error:
                result = error
        result = sharing.from_main(result)
        if isinstance(result, Exception):
            raise result
        return result

    scene_ids, has_originals = on_main(list_scenes, config)
    locks = on_main(list_locks, config.lock, config.locks, config.data_dir, scene_ids)
    held = []  # until the process ends
    on_main(lambda: held.append(take_output(output_dir)))
    perceptual = perceptual_if_available(config, sharing) if config.metrics and has_originals else None
    writer = SceneWriter(Path(config.data_dir), output_dir, made_by, config.n_max_completions, config.figures,
                         config.metrics, config.evaluate, command, config.seam, locks, perceptual)
    todo = on_main(find_work, config, scene_ids, writer)
    failed = sharing.gather(fuse_folder(config, predictor, todo, sharing, writer))
    if not sharing.is_main:
        return 0
    fused = [scene_id for scene_id in scene_ids if scene_id not in failed]
    try:
        text = write_table(output_dir, fused, made_by, config.group_by) if config.metrics and has_originals else None
        if todo:  # what earlier runs say of these scenes holds no longer
            remove_stale(output_dir, (() if text else TABLES) + (() if config.report else ("report.html",)))
        print((text or "") + f"{len(todo) - len(failed)} scenes fused into {output_dir}")
        hand_out(config, fused)
    finally:
        for scene_id in failed:  # what an earlier run made of it is not true any more
            remove_outputs(output_dir / scene_id)
        write_failures(output_dir, failed)
    if any("prepare_dataset.py create" in fault for fault in failed.values()):
        print(f"raw results become scenes by: {create_command(config)}", file=sys.stderr)
    return 1 if failed else 0


def main():
    config = parse(InferenceConfig, __doc__)
    quiet = int(os.environ.get("RANK", "0")) > 0  # one process of a launcher speaks
    try:
        if config.export_onnx:
            if config.sharpness != 1:
                raise ConfigError(f"--sharpness {config.sharpness} is not part of an ONNX file: leave it out")
            check_writable(config.export_onnx)
            print(export_onnx(FusionPredictor(config.checkpoint, "cpu").model, config.export_onnx))
            sys.exit(0)
        check_options(config)
        if config.gpus and not under_launcher():
            check_gpus(config.gpus)
            if config.gpus > 1:
                launch(config.gpus)
        status = run(config)
    except KeyboardInterrupt:
        print("stopped; what is done stays, the same command goes on", file=sys.stderr)
        status = 130
    except (UserError, OSError) as error:
        if not quiet:
            print(f"error: {error}", file=sys.stderr)
        status = 2 if isinstance(error, ConfigError) else 1
    sys.exit(status)


if __name__ == "__main__":
    main()
