"""Small trees as the user's scripts and public systems leave them, each from a drawn scene of its own."""

import json

import cv2
import numpy as np

from amodal_fusion.data.images import write_image
from amodal_fusion.data.toy import draw_scene


class Tree:
    """The parts of one drawn scene, and where they go: `put("a/b", picture)` writes a PNG below `root`."""

    def __init__(self, root, seed, family=None):
        self.root, self.seed = root, seed
        self.family = [] if family is None else family  # all scenes of the tree
        self.family.append(self)
        self.scene = draw_scene(seed)
        self.photo, self.mask = self.scene.original, self.scene.mask.astype(np.uint8) * 255
        self.background = draw_scene(seed, n=0).original
        self.objects = self.scene.completions  # RGBA
        self.alphas = [completion[..., 3] for completion in self.objects]
        alike = [np.abs(c[..., :3].astype(int) - self.photo).max(2) == 0 for c in self.objects]
        self.visible = [np.uint8(255) * (same & (alpha > 0)) for same, alpha in zip(alike, self.alphas)]
        self.layers = sorted(range(3), key=lambda i: self.visible[i].sum() / self.alphas[i].sum())  # bottom first

    def another(self):
        """One more scene for the same folder."""
        return Tree(self.root, self.seed + 1000 * len(self.family), self.family)

    def put(self, name, picture, suffix=".png"):
        path = self.root / (name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".png":
            write_image(path, np.asarray(picture, np.uint8))
        else:
            cv2.imwrite(str(path), picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])

    def blanked(self, colour):
        return np.where(self.scene.mask[..., None], colour, self.photo)

    def on(self, i, background, sample=0):
        """Object i as a picture without alpha, redrawn a little differently in every sample."""
        noise = np.random.default_rng((self.seed, i, sample)).normal(0, 2 + 3 * sample, self.mask.shape)
        whole = np.where(self.alphas[i][..., None] > 0, self.objects[i][..., :3] + noise[..., None], background)
        return np.clip(whole, 0, 255)


def completion_dataset(tree, at="a/abbey/00000001", debug=False):
    tree.put(f"{at}/original", tree.photo)
    tree.put(f"{at}/partial", tree.blanked(0))
    tree.put(f"{at}/mask", 255 - tree.mask)
    for i in range(3):
        tree.put(f"{at}/comp{i + 1}", tree.on(i, 250))
        if debug:
            tree.put(f"{at}/debug/comp_mask_{i + 1}", tree.visible[i])
            tree.put(f"{at}/debug/auto{i}_mask", tree.visible[i])
    if debug:
        for name in ("boundary_mask", "center_mask", "region0_mask", "sparse5_mask", "accepted_masks",
                     "all_detected_masks", "original_with_accepted_masks"):
            tree.put(f"{at}/debug/{name}", tree.visible[0])


def completion_dataset_debug(tree):
    completion_dataset(tree, debug=True)


def flat(tree):
    for name in ("00000007", "00000008"):
        other = tree.another()
        other.put(name, other.photo, ".jpg")
        other.put(f"{name}_partial", other.blanked(0), ".jpg")
        other.put(f"{name}_mask", 255 - other.mask)
        for i in range(3):
            other.put(f"{name}_comp{i + 1}", other.on(i, 250))


def enhanced(tree):
    at = "debug/Places365_test_00000138"
    tree.put(f"{at}/orig", tree.blanked(255))
    tree.put(f"{at}/mask", np.dstack([tree.mask] * 3))
    for i in range(3):
        tree.put(f"{at}/comps/{i + 1}", tree.on(i, 250))
        tree.put(f"{at}/masks/{i + 1}", tree.visible[i])
        tree.put(f"{at}/masks/apply_mask_{i + 1}", tree.mask)
        tree.put(f"{at}/over/{i + 1}", tree.photo)
        tree.put(f"{at}/mask_input/{i + 1}", tree.photo)
        tree.put(f"intermediate/Places365_test_00000138/composite_{i + 1}", tree.photo)
    tree.put("composites/Places365_test_00000138", tree.photo)
    tree.put("filled_masks/Places365_test_00000138_mask", tree.mask)
    tree.put("../photos/Places365_test_00000138", tree.photo)


def auto_process(tree):
    tree.put("00000004/00000004_original", tree.photo)
    tree.put("00000004/00000004_mask", tree.visible[0])
    tree.put("00000004/00000004_overlay", tree.photo)
    other = tree.another()
    other.put("0001_original", other.photo)  # as well without a folder each, beside others
    other.put("0001_mask", other.visible[0])
    other.put("0001_result_0", other.on(0, 250))
    for sample in range(4):
        tree.put(f"00000004/00000004_result_{sample}", tree.on(0, 250, sample))


def single(tree):
    tree.put("138/input", tree.photo)
    tree.put("138/mask", tree.visible[0])
    tree.put("138/result_0", tree.on(0, 250))


def segment_all(tree):
    tree.put("img1/img1_original", tree.blanked(255))
    tree.put("all_amodal/combined_masks/img1", tree.mask)
    tree.put("all_amodal/combined/img1", tree.photo)
    tree.put("../photos/img1", tree.photo)
    other = tree.another()  # its photo lies elsewhere and is whole, the mask is that of all objects
    other.put("../photos/img2", other.photo)
    other.put("all_amodal/combined_masks/img2", np.max(other.visible, 0))
    for name, of in (("img1", tree), ("img2", other)):
        for i in range(3):
            of.put(f"{name}/object_{i:03}/mask", of.visible[i])
            of.put(f"{name}/object_{i:03}/masked_input", np.where(of.visible[i][..., None] > 0, of.photo, 255))
            of.put(f"{name}/object_{i:03}/amodal_result_0", of.on(i, 250))
            of.put(f"{name}/object_{i:03}/amodal_result_1", of.on(i, 250, 1))


def deocclusion(tree):
    tree.put("image_0703", tree.photo)
    tree.put("image_0703/bkg", tree.background)
    for i in range(3):
        tree.put(f"image_0703/obj_{i:03}", tree.objects[i])


def k8xu(tree):
    tree.put("street", tree.photo)
    offsets = {}
    for i, name in enumerate(("person_0", "dog_2", "bed_3")):
        def on_canvas(picture):
            return cv2.copyMakeBorder(picture, 12, 8, 10, 10, cv2.BORDER_CONSTANT)

        tree.put(f"street/amodal_completions/{name}", on_canvas(tree.on(i, 0).astype(np.uint8)), ".jpg")
        tree.put(f"street/amodal_segmentations/{name}", on_canvas(tree.alphas[i]))
        offsets[name] = [-12, -10]
    (tree.root / "street" / "offsets.json").write_text(json.dumps(offsets))


def saraao(tree):
    tree.put("kitchen", tree.photo, ".jpg")
    for i, name in enumerate(("cup", "plate", "spoon")):
        tree.put(f"kitchen/{name}/amodal_completion", tree.objects[i])
        tree.put(f"kitchen/{name}/amodal_segmentation", tree.alphas[i])
        tree.put(f"kitchen/{name}/visible_seg", tree.visible[i])
        (tree.root / "kitchen" / name / "offsets.json").write_text("{}")


def saraao_one_object(tree):
    tree.put("../photos/hall", tree.photo)
    tree.put("hall/amodal_completion", tree.objects[0])
    tree.put("hall/amodal_segmentation", tree.alphas[0])
    tree.put("hall/visible_seg", tree.photo)  # some versions save the photo by that name


def _layers(tree, name, first):
    opaque = np.full(tree.mask.shape, 255, np.uint8)
    for number, layer in enumerate([np.dstack([tree.background, opaque]), *(tree.objects[i] for i in tree.layers)]):
        tree.put(name.format(number + first), layer)


def qwen(tree):
    tree.put("poster", tree.photo)
    _layers(tree, "poster/{}", 0)
    other = tree.another()
    other.put("card/image", other.photo)
    _layers(other, "card/layer_{}", 1)


def layerd(tree):
    tree.put("../photos/banner", tree.photo)
    _layers(tree, "banner/{:04}", 0)


def art(tree):
    opaque = np.full(tree.mask.shape, 255, np.uint8)
    tree.put("0/layer_0_rgba", np.dstack([tree.photo, opaque]))
    tree.put("0/merged", tree.photo)
    _layers(tree, "0/layer_{}_rgba", 1)
    for number in range(5):
        tree.put(f"0/layer_{number}", tree.photo)


def see_through(tree):
    tree.put("girl/src_img", np.dstack([tree.photo, np.full(tree.mask.shape, 255, np.uint8)]))
    tree.put("girl/reconstruction", tree.photo)
    for i, name in enumerate(("face", "front hair", "topwear")):
        tree.put(f"girl/{name}", tree.objects[i])
        tree.put(f"girl/{name}_depth", tree.alphas[i])


def layer_diffuse(tree):
    tree.put("desk", tree.photo)
    for i, name in enumerate(("lamp", "book", "mug")):
        tree.put(f"desk/{name}_transparent", tree.objects[i])


def agentic(tree):
    tree.put("0/00_input", tree.photo)
    tree.put("0/05_M_occ", tree.mask)
    tree.put("0/09_I_input", tree.photo)
    tree.put("0/12_M_inpaint", tree.mask)
    tree.put("0/14_I_comp", tree.photo)
    tree.put("0/16_I_comp_target_mask", tree.alphas[0])
    tree.put("0/16_I_comp_target_rgba", tree.objects[0])


WRITERS = (completion_dataset, completion_dataset_debug, flat, enhanced, auto_process, single, segment_all,
           deocclusion, k8xu, saraao, saraao_one_object, qwen, layerd, art, see_through, layer_diffuse, agentic)


def write_tree(root, writers=WRITERS):
    """A folder below `root` per layout, named after its writer, and `root`/photos; returns the scenes drawn."""
    family = []
    for seed, writer in enumerate(writers):
        writer(Tree(root / writer.__name__, 100 + seed, family))
    return family
