"""The table of layouts: the folders and files that completion scripts and public systems write.

To add one, add an entry here, a few lines to `tests/layout_trees.py` that write such a folder, and a row to
`docs/formats.md`.

A pattern is a path below the scene's folder, without suffix: any picture format fits. `{id}` is the name of the folder,
`{d}` a number, `{n}` any name, `{object}` an object with one or more completions; `..` is the folder above.
"""

from dataclasses import dataclass

# where decompositions keep their photo: in the scene's folder or beside it
BESIDE = ("../{id}", "image", "original", "photo", "input")


@dataclass(frozen=True)
class Layout:
    """One layout. It fits a folder if `completion` finds files there and one of `marks`, if any, exists."""

    name: str
    completion: str
    marks: tuple = ()  # patterns; a name that ends with "/" is a folder
    never: str = ""  # regular expression of names that are no completions
    original: tuple = ()  # the first that exists; else the folder of photos is searched
    partial: tuple = ("partial", "masked", "{id}_partial", "{id}_masked")
    mask: tuple = ("mask", "hole")  # of the hole
    background: str = ""  # completed background: an additional candidate
    alpha: str = ""  # a completion's alpha
    visible: str = ""  # a completion's modal mask
    offsets: str = ""  # JSON: name of a completion → [row, column] of its upper left pixel in the photo
    with_alpha: bool = False  # completions have alpha, and it is right
    same_object: bool = False  # all completions are samples of one object
    wants_photo: bool = False  # fits only if its photo is found
    masked_photo: bool = False  # the hole may be blank in its photo already
    inner: str = ""  # name of the folder around the scenes, not part of ids
    leftovers: tuple = ()  # folders of by-products beside the scenes (or their `inner`)
    no_hole: str = ""  # why it has no hole


MADE_BY_DEBUG = ("debug/comp_mask_1", "debug/original_with_accepted_masks")  # other layouts have a folder "debug", too
OF_ONE_OBJECT = "its mask is the modal mask of the one object that was completed"
DECOMPOSED = "a photo split into layers has none"

LAYOUTS = (
    Layout("amodal_completion_dataset --debug", "comp{d}", marks=MADE_BY_DEBUG, original=("original",),
           partial=("partial",), mask=("mask",), visible="debug/comp_mask_{d}"),
    Layout("amodal_enhanced_dataset", "comps/{d}", marks=("orig",), partial=("orig",), mask=("mask",),
           visible="masks/{d}", inner="debug", leftovers=("composites", "intermediate", "filled_masks")),
    Layout("auto_process, batch_process", "{id}_result_{d}", original=("{id}_original",), mask=(),
           visible="{id}_mask", same_object=True, masked_photo=True, no_hole=OF_ONE_OBJECT),
    Layout("test", "result_{d}", marks=("input",), original=("input",), mask=(), visible="mask", same_object=True,
           masked_photo=True, no_hole=OF_ONE_OBJECT),
    Layout("segment_all_objects", "object_{object}/amodal_result_{d}", original=("{id}_original",),
           mask=("../all_amodal/combined_masks/{id}",), visible="object_{object}/mask", masked_photo=True,
           leftovers=("all_amodal",)),
    Layout("deocclusion demo", "obj_{d}", marks=("bkg", "../{id}"), original=(*BESIDE, "{id}"), background="bkg",
           with_alpha=True, no_hole=DECOMPOSED),
    Layout("k8xu/amodal", "amodal_completions/{n}", original=BESIDE, alpha="amodal_segmentations/{n}",
           offsets="offsets.json", no_hole="it completes objects of a whole photo"),
    Layout("saraao/amodal", "{object}/amodal_completion", original=BESIDE, wants_photo=True,
           alpha="{object}/amodal_segmentation", visible="{object}/visible_seg", offsets="{object}/offsets.json",
           no_hole="it completes objects of a whole photo"),
    Layout("saraao/amodal, one object", "amodal_completion", original=BESIDE, alpha="amodal_segmentation",
           visible="visible_seg", offsets="offsets.json", no_hole="it completes an object of a whole photo"),
    Layout("ART", "layer_{d}_rgba", original=("layer_0_rgba", "merged_rgba", "merged"), with_alpha=True,
           no_hole=DECOMPOSED),
    Layout("Qwen-Image-Layered", "layer_{d}", original=BESIDE, with_alpha=True, no_hole=DECOMPOSED),
    Layout("LayerD", "{dddd}", original=BESIDE, with_alpha=True, no_hole=DECOMPOSED),
    Layout("Qwen-Image-Layered", "{d}", original=BESIDE, with_alpha=True, no_hole=DECOMPOSED),
    Layout("see-through", "{n}", marks=("reconstruction",), never=".*_depth|reconstruction|src_img|src_head",
           original=("src_img", *BESIDE), with_alpha=True, no_hole=DECOMPOSED),
    Layout("agentic", "{d}_I_comp_target_rgba", marks=("00_input",), original=("00_input",), mask=(), with_alpha=True,
           no_hole="its masks show what hides the object"),
    Layout("LayerDiffuse", "{n}_transparent", original=BESIDE, with_alpha=True, no_hole="it draws layers, no holes"),
)
BY_ROLES = "original, partial, mask, comp1 …"  # no entry: amodal_fusion.ingest.roles reads such names
