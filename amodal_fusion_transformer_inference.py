"""Fuse a folder of scenes with a trained network.

    python amodal_fusion_transformer_inference.py --data_dir examples/scenes --output_dir outputs
    python amodal_fusion_transformer_inference.py --data_dir TEST --output_dir OUT \\
        --checkpoint checkpoints/transformer_run1/best_model.pth --n_max_completions 5 --img_size 256
    torchrun --nproc_per_node 2 amodal_fusion_transformer_inference.py --data_dir TEST --output_dir OUT

The first uses the shipped weights. The last shares the scenes among two processes, as --gpus 2 does. Input: a folder
per scene with partial.png, mask.png (255 = hole), comp1.png …, and optionally original.png. Output, at the size of the
scene:

    OUT/<id>/fused.png            the completions, weighted and blended
    OUT/<id>/residual_mask.png    255 where no completion has the largest weight
    OUT/<id>/guide.png            each pixel of the hole from one completion, the rest filled: for an inpainter
    OUT/<id>/inpaint_mask.png     255 where that inpainter should draw
    OUT/<id>/weight_1.png …       16 bit, 65535 = weight 1
    OUT/<id>/order.json           which completion is in front
    OUT/<id>/figure.png           all of it in one picture
    OUT/<id>/scene.json           weights and options that made it, and its metrics
    OUT/metrics.csv, summary.*    with originals: per scene, and means beside every simple rule and the oracle

The same command resumes an interrupted run. Exit status: 0 all is well, 1 some scenes could not be fused (they are
named, and in OUT/failed.csv), 2 wrong usage, 130 after Ctrl-C.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image

from amodal_fusion.checkpoints import PRETRAINED, check_writable
from amodal_fusion.config import ANY_NUMBER, check_values, option, parse
from amodal_fusion.data.scenes import Scene
from amodal_fusion.data.tensors import INPUTS, as_scene, distinct, to_tensors
from amodal_fusion.distributed import NoMeeting, check_gpus, join_group, launch, under_launcher
from amodal_fusion.errors import ConfigError, SceneError, UserError, is_out_of_memory, message_of
from amodal_fusion.ingest.matting import key_background
from amodal_fusion.model.blending import blend_hole
from amodal_fusion.model.compositing import ABSENT
from amodal_fusion.output.folder import check_options, choose_device, run_folder
from amodal_fusion.output.guide import CONFIDENCE, MIN_REGION
from amodal_fusion.output.hub import find_weights, write_pretrained
from amodal_fusion.output.onnx_export import export_onnx
from amodal_fusion.output.records import weights_digest
from amodal_fusion.output.scene_reader import count_candidates, network_size
from amodal_fusion.output.scene_writer import as_result
from amodal_fusion.pools import usable_cpus
from amodal_fusion.precision import HALF_PRECISION
from amodal_fusion.training.cuda_graph import CudaGraph
from amodal_fusion_transformer import NETWORK_VERSION, load_model

MOST_GRAPHS = 8  # each keeps the memory of a forward pass
SHIPPED = PRETRAINED / "amodal_fusion_transformer.pth"


def checkpoint_decides(name):
    """An option of the training script that has no effect here: its type, and a note."""
    return str, lambda value, _: f"{name} {value} is not used: the checkpoint decides"


CHECKPOINT_DECIDES = {name: checkpoint_decides(name) for name in (
    "config", "d_model", "nhead", "num_encoder_layers", "num_decoder_layers", "dim_feedforward", "dropout",
    "width", "encoder_layers", "decoder_layers", "heads")}


@dataclass
class InferenceConfig:
    """All options of the inference script. Those of the network come from the checkpoint."""

    ALIASES = CHECKPOINT_DECIDES  # a plain attribute, no option

    data_dir: str = option("", "folder of scenes", "data", aliases={"input_dir": ""})
    scene_list: str | None = option(None, "fuse only the scenes of this list, one id per line", "data",
                                    aliases={"list": "", "image_list": "one scene id per line"})
    n_max_completions: int | None = option(None, "use only the first completions of a scene, this many; None: all",
                                           "data", least=1)
    img_size: int | None = option(None, "the network sees each scene at the area of img_size², px; outputs keep "
                                        "their size; None: what the checkpoint recommends", "data", least=16)
    checkpoint: str = option(str(SHIPPED), "checkpoint of the training script; default: the shipped weights", "network")
    device: str = option("auto", "auto takes a GPU if there is one", "network", ("auto", "cuda", "cpu"))
    gpus: int | None = option(None, "processes that share the scenes, one per GPU; 0: the CPU; None: one process",
                              "network", least=0)
    amp: str = option("off", "half precision", "network", tuple(HALF_PRECISION))
    sharpness: float = option(1.0, "factor of the network's logits: above 1 the picture is more decided, less of a "
                              "blend", "network", least=0.01, most=100)
    batch_size: int = option(4, "scenes per forward pass; scenes of different sizes never share one",
                             "network", least=1)
    cuda_graph: bool = option(False, "on a GPU, start the kernels of a forward pass all at once, from the fourth batch "
                                     "of a shape on; takes more of its memory", "network")
    export_onnx: str | None = option(None, "write the network to this ONNX file, and stop", "network")
    output_dir: str = option("", "folder to write", "output")
    overwrite: bool = option(False, "fuse all scenes again", "output")
    figures: bool = option(True, "draw figure.png per scene", "output")
    metrics: bool = option(True, "with originals: metrics.csv, summary.md and summary.png", "output")
    group_by: str | None = option(None, "regular expression for the start of ids; for the intervals, scenes with the "
                                        "same match (or first group) are one photo; None: those with one original",
                                  "output")
    evaluate: bool = option(False, "also measure what inpainters make of the bare hole, visible fit, the fused image "
                                   "and the guide", "output")
    inpaint_command: str | None = option(None, "with --evaluate, also those of this program: "
                                               "'CMD {image} {mask} {output}'", "output")
    handover: tuple | None = option(None, "also write the fused images for an inpainter: lama, iopaint, mat or "
                                          "diffusers, and a folder", "output", choices=("CONSUMER", "DIR"))
    handover_given: tuple = option(("guide",), "what the inpainter is given: guide, hole (the bare hole), visible_fit "
                                               "or ours (the fused image); several go to DIR/guide, DIR/hole …",
                                   "output", choices=("GIVEN", ANY_NUMBER))
    results: tuple | None = option(None, "measure what an inpainter made of a handed-over folder; its pictures are in "
                                         "DIR", "output", choices=("NAME=DIR", ANY_NUMBER))
    clip_weights: str | None = option(None, "with --results, also CLIP similarity in the hole: open_clip checkpoint",
                                      "output")
    clip_net: str = option("ViT-B-32-quickgelu", "its network, by open_clip's name", "output")
    fid_weights: str | None = option(None, "with --results, also FID: pt_inception-2015-12-05-6726825d.pth", "output")
    seam: int = option(3, "pixels by which the inpainting mask grows inside the hole", "output", least=0)
    guide_confidence: float | None = option(None, "the guide takes a completion where its weight is at least this; "
                                                  "None: what the checkpoint recommends", "output", least=0, most=1)
    min_region: int = option(MIN_REGION, "smallest region of the guide and of the inpainting mask, px", "output",
                             least=1)
    locks: str | None = option(None, "YAML file of lines like  scene_7: [1>3, '*>4']  for completion 1 in front of 3, "
                                     "and without 4; 0 is none of them, * all others; the report writes such files",
                               "output")
    lock: str | None = option(None, "the same for a single scene, as in --lock '1>3, 2>4'", "output")
    report: bool = option(False, "write report.html, a page to view all scenes and correct them by clicks", "output")
    flat_names: bool = option(False, "also write <id>_fused.png, <id>_visualization.png, <id>_weight1.png and "
                                     "<id>_comp1_masked.png into output_dir", "output")
    lpips_net: str = option("alex", "backbone of LPIPS in the metrics", "output", ("alex", "vgg", "squeeze"))
    lpips_weights: str | None = option(None, "torchvision checkpoint of that backbone; None: cache, then download",
                                       "output")
    workers: int = option(min(4, usable_cpus()), "processes that read, and as many that write; 0: only this one",
                          "output", least=0, aliases={"num_workers": ""})


# ----------------------------------------------------------------------------
# The network


class FusionPredictor:
    """A trained network, for scenes of any size with any number of completions.

    Args:
        checkpoint: path of a checkpoint; None: the shipped weights.
        device: "auto" (a GPU if there is one), "cuda", "cuda:1" or "cpu".
        img_size: the network sees a scene at the area of img_size², px; None: as the checkpoint recommends.
        amp: "off", "bf16" or "fp16".
        sharpness: factor of the logits, 0.01 to 100; a small one blends all candidates, a large one picks one.

    Raises:
        UserError: the checkpoint cannot be used, the device does not exist, or a value is out of range.
    """

    def __init__(self, checkpoint: str | Path | None = None, device: str | torch.device = "auto",
                 img_size: int | None = None, amp: str = "off", sharpness: float = 1.0,
                 cuda_graph: bool = False):
        given = {"sharpness": str(sharpness), "amp": amp}
        if img_size is not None:
            given["img_size"] = str(img_size)
        options = check_values(given, InferenceConfig, "FusionPredictor")
        self.sharpness, self.amp = options["sharpness"], options["amp"]
        found = torch.cuda.is_available()
        if str(device).startswith("cuda") and not found:
            raise ConfigError(f"device {device}: there is no GPU; use the device cpu", "device")
        with torch.random.fork_rng(devices=[]):  # building the network must not change the caller's random state
            self.model, self.config = load_model(checkpoint or SHIPPED, "checkpoint")
        self.digest = weights_digest(self.model)
        try:
            self.device = torch.device(("cuda" if found else "cpu") if device == "auto" else device)
            self.model.to(self.device)
        except RuntimeError as error:  # the GPU does not exist, or its memory is full
            raise ConfigError(f"device {device}: {str(error).splitlines()[0]}", "device") from None
        self.graphs: dict[torch.Size, CudaGraph] | None = {} if cuda_graph and self.device.type == "cuda" else None
        self.guide_confidence: float = self.config.get("guide_confidence", CONFIDENCE)
        if type(self.guide_confidence) not in (int, float) or not 0 <= self.guide_confidence <= 1:
            raise UserError(f"{checkpoint}: its guide_confidence is {self.guide_confidence!r}, not from 0 to 1; use "
                            "another file")
        self.img_size: int = (options.get("img_size") or self.config.get("inference_size")
                              or self.config["img_size"])

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path | None = None, **options) -> "FusionPredictor":
        """The predictor of a checkpoint, of a folder of `save_pretrained` or of a training run, or of a repository on
        Hugging Face ("owner/name"); None takes the weights that ship. `options` as above.

        Raises:
            UserError: as above; or there is no such thing.
        """
        return cls(None if path_or_name is None else find_weights(path_or_name), **options)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the weights, config.json and a model card (README.md) into `folder`; returns the path of the weights.

        Raises:
            UserError: the folder cannot be written, or has files of these names that are not ours.
        """
        return write_pretrained(folder, self.model, self.config)

    def fuse(self, partial: Image.Image | ArrayLike | torch.Tensor, mask: Image.Image | ArrayLike | torch.Tensor,
             completions, background: str | None = None) -> dict[str, np.ndarray] | dict[str, torch.Tensor]:
        """Weigh and fuse the completions of one scene.

        Args:
            partial: the photo, RGB; mask: white in the hole; completions: list of RGBA pictures of that size. Paths,
                PIL images, numpy arrays or tensors; see `amodal_fusion.data.tensors.as_scene`.
            background: how to cut out completions without alpha, RGB on a flat background: "auto", "white", "black"
                or "opaque", as in `prepare_dataset.py create`; None: completions have alpha.

        Returns:
            dict of weights, residual and fused. As numpy: (N,H,W) and (H,W) float32, together 1 in the hole and 0
            elsewhere, and (H,W,3) uint8. If `partial` is a tensor: (N,H,W), (1,H,W) and (3,H,W), float32 in [0,1].

        Raises:
            SceneError: the pictures do not fit together. ConfigError: no such background.
        """
        if background not in (None, "auto", "white", "black", "opaque"):
            raise ConfigError(f"background {background!r} is not one of auto, white, black, opaque", "background")
        key = None if background is None else lambda rgb: key_background(rgb, background)[0]
        scene = as_scene(partial, mask, completions, key)
        size = network_size(scene.mask.shape, self.img_size, count_candidates(scene, self.img_size))
        blend = blend_hole(scene, self.predict_logits([scene.resized(size)])[0])
        if isinstance(partial, torch.Tensor):
            result = as_result(scene, blend)
            return {name: result[name][0] for name in ("weights", "residual", "fused")}
        return {"weights": blend.on_picture(blend.weights.T).transpose(2, 0, 1),
                "residual": blend.on_picture(blend.residual), "fused": blend.fused(scene.partial)}

    def fuse_scenes(self, scenes: list[Scene]) -> list[dict[str, torch.Tensor]]:
        """Fuse Scenes of one size or one aspect; list of dicts as from `as_result`.

        Raises:
            SceneError: they have several aspects, and the network would see some of them distorted.
        """
        if not scenes:
            return []
        most = max(count_candidates(scene, self.img_size) for scene in scenes)
        size, *others = {network_size(scene.mask.shape, self.img_size, most) for scene in scenes}
        if others:
            raise SceneError("scenes of several aspects; fuse each aspect in a separate call")
        all_logits = self.predict_logits([scene.resized(size) for scene in scenes])
        return [as_result(scene, blend_hole(scene, logits)) for scene, logits in zip(scenes, all_logits)]

    @torch.no_grad()
    def predict_logits(self, scenes: list[Scene]) -> list[torch.Tensor]:
        """The network's logits for scenes that already have its input size.

        Args:
            scenes: list of Scene, all of one size (h,w).

        Returns:
            per scene its logits times sharpness, (M,h,w) float32 on the CPU, M = N + 1, the fill first. Of exact
            copies the first has logits; the others, and transparent completions, have ABSENT and no weight.

        Raises:
            SceneError: there is not enough memory.
        """
        kept = [distinct(scene.completions) for scene in scenes]
        slots = max(map(len, kept))
        tensors = [to_tensors(replace(scene, completions=[scene.completions[i] for i in which]), slots)
                   for scene, which in zip(scenes, kept)]
        try:
            batch = {name: torch.stack([scene[name] for scene in tensors]).to(self.device) for name in INPUTS}
            out = self.network(**batch) if self.graphs is None else self.replay(batch)
            logits = self.sharpness * out["logits"].float().cpu()  # (B,M,h,w)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise SceneError(f"out of memory on {self.device}; use fewer scenes at a time or a smaller img_size",
                             "batch_size", "img_size") from None
        full = [torch.full((len(scene.completions) + 1, *logits.shape[2:]), ABSENT) for scene in scenes]
        for scene_logits, found, which in zip(full, logits, kept):
            scene_logits[[0, *(i + 1 for i in which)]] = found[: len(which) + 1]
        return full

    def network(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """The logits (B,M,h,w) of a batch, in the predictor's precision."""
        half = HALF_PRECISION[self.amp]
        with torch.autocast(self.device.type, half, enabled=half is not None):
            return {"logits": self.model(**batch)["logits"]}

    def replay(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`network` as a CUDA graph, one for each shape; the least recently used one makes room for a new one."""
        assert self.graphs is not None
        shape = batch["completions"].shape
        with torch.cuda.device(self.device):
            graph = self.graphs.pop(shape, None) or CudaGraph(self.network)
            self.graphs[shape] = graph  # now the last
            if len(self.graphs) > MOST_GRAPHS:
                del self.graphs[next(iter(self.graphs))]
            return graph(**batch)


# ----------------------------------------------------------------------------
# The script


def run(config: InferenceConfig) -> int:
    """Fuse the folder, together with the other processes of a launcher; returns the exit status."""
    process = join_group()
    predictor = FusionPredictor(config.checkpoint, choose_device(config, process), config.img_size, config.amp,
                                config.sharpness, config.cuda_graph)
    made_by = {"checkpoint": predictor.digest, "network": NETWORK_VERSION, "img_size": predictor.img_size,
               "n_max_completions": config.n_max_completions, "amp": config.amp, "sharpness": config.sharpness}
    return run_folder(config, predictor, made_by, process)


def export(config: InferenceConfig) -> str:
    """Write the network as ONNX; returns a line about it."""
    if config.sharpness != 1:
        raise ConfigError(f"a sharpness of {config.sharpness:g} is no part of an ONNX file; leave it out", "sharpness")
    check_writable(config.export_onnx)
    print("exporting; this takes minutes …", file=sys.stderr, flush=True)
    return export_onnx(FusionPredictor(config.checkpoint, "cpu").model, config.export_onnx)


def main() -> None:
    config = parse(InferenceConfig, __doc__)
    quiet = os.environ.get("RANK", "0") != "0"  # only one process of a launcher reports
    try:
        if config.export_onnx:
            print(export(config))
            sys.exit(0)
        check_options(config)
        if config.gpus and not under_launcher():
            check_gpus(config.gpus)
            if config.gpus > 1:
                launch(config.gpus)
        status = run(config)
    except KeyboardInterrupt:
        print("stopped; finished scenes stay, the same command resumes", file=sys.stderr)
        status = 130
    except (UserError, OSError) as error:
        if not quiet or isinstance(error, NoMeeting):
            print(f"error: {message_of(error)}", file=sys.stderr)
        status = 2 if isinstance(error, ConfigError) else 1
    sys.exit(status)


if __name__ == "__main__":
    main()
