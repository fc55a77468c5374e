"""What the three scripts make of bad, odd and hostile input: a table of cases, each made on disk.

All cases of one kind lie in one folder and every script runs over it once: so each case also shows that the rest of
the batch is done.
"""

import io
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from amodal_fusion.data.images import read_image, write_image
from amodal_fusion.data.scenes import write_scene
from amodal_fusion.data.toy import draw_scene
from tests.conftest import SMALL
from tests.scripts import ROOT, run

TRAIN, FUSE, PREPARE = ("amodal_fusion_transformer.py", "amodal_fusion_transformer_inference.py", "prepare_dataset.py")


@dataclass
class Case:
    """Change a good scene's folder; `fault` is what every script says about it, None when it is simply read."""

    name: str
    change: object
    fault: str | None = None
    training_fault: str | None = None  # where only training minds
    scene: dict | None = None


def save(name, **options):
    """A change: the picture `name` goes through Pillow into another form."""
    mode = options.pop("mode", None)

    def change(folder):
        with Image.open(folder / name) as image:
            changed = image.convert(mode) if mode else image.copy()
        changed.save(folder / name, **options)

    return change


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def part(name, share):
    return lambda folder: (folder / name).write_bytes(
        (whole := (folder / name).read_bytes())[: int(len(whole) * share)])


def flip(name):
    def change(folder):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 0xFF
        (folder / name).write_bytes(data)

    return change


def mask(function):
    return lambda folder: write_image(folder / "mask.png", function(read_image(folder / "mask.png", "L")))


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def completions(function):
    def change(folder):
        for path in sorted(folder.glob("comp*.png")):
            write_image(path, function(read_image(path, "RGBA")))

    return change


def png(width, height):
    """A PNG that says it is width × height and holds next to nothing."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 99)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def on_white(rgba):
    return np.where(rgba[..., 3:] > 0, rgba[..., :3], 255).astype(np.uint8)


def two_frames(folder):
    with Image.open(folder / "comp1.png") as image:
        image.save(folder / "comp1.png", save_all=True, append_images=[image.rotate(90)])


def many(folder):
    for number in range(4, 13):
        shutil.copy(folder / "comp1.png", folder / f"comp{number}.png")


def directory(folder):
    (folder / "comp1.png").unlink()
    (folder / "comp1.png").mkdir()


def dangling(folder):
    (folder / "comp1.png").unlink()
    (folder / "comp1.png").symlink_to("nowhere.png")


def grey16(folder):
    Image.fromarray(read_image(folder / "mask.png", "L").astype(np.uint16) * 257).save(folder / "mask.png")


def full(folder):
    for name in ("mask.png", "partial.png"):
        write_image(folder / name, np.full_like(read_image(folder / name, "L"), 255 * (name == "mask.png")))


def floats(folder):
    Image.fromarray(np.zeros((64, 64), np.float32)).save(folder / "comp1.png", format="TIFF")


def transparent_one(folder):
    write_image(folder / "comp1.png", np.zeros((64, 64, 4), np.uint8))


def nothing(folder):
    """The good scene."""


CASES = [
    Case("good", nothing),
    Case("spaces in the name ", nothing),
    Case("한국어 이름", nothing),
    Case("emoji 🦊🌵", nothing),
    Case("partial missing", remove("partial.png"), "partial.png: no such file"),
    Case("mask missing", remove("mask.png"), "mask.png: no such file"),
    Case("original missing", remove("original.png"), None, "original.png: no such file"),
    Case("no completions", remove("comp1.png", "comp2.png", "comp3.png"), "no completion (comp1.png …)"),
    Case("zero bytes", content("comp2.png", b""), "comp2.png: empty file; write it again"),
    Case("text", content("partial.png", b"hello"), "partial.png: not a picture"),
    Case("truncated", part("comp1.png", 0.5), "comp1.png: damaged or truncated"),
    Case("header only", part("mask.png", 0.2), "mask.png: damaged or truncated"),
    Case("flipped byte", flip("comp1.png"), "comp1.png: damaged or truncated"),
    Case("bomb", content("comp1.png", png(60000, 60000)), "comp1.png: Image size (3600000000 pixels) exceeds limit"),
    Case("lies about its size", content("comp1.png", png(64, 64)), "comp1.png: damaged or truncated"),
    Case("animated", two_frames, "comp1.png: has 2 frames"),
    Case("floating point", floats, "comp1.png: damaged or truncated picture (floating-point"),
    Case("directory in place of a file", directory, "comp1.png: damaged or truncated picture ([Errno 21]"),
    Case("dangling link", dangling, "comp1.png: no such file"),
    Case("JPEG called PNG", save("original.png", format="JPEG", quality=95)),
    Case("CMYK", save("original.png", mode="CMYK", format="TIFF")),
    Case("palette with transparency", save("comp1.png", mode="P", format="PNG", transparency=0)),
    Case("grey with alpha", save("comp1.png", mode="LA", format="PNG")),
    Case("16 bit mask", grey16),
    Case("one bit mask", save("mask.png", mode="1", format="PNG")),
    Case("RGB mask", save("mask.png", mode="RGB", format="PNG")),
    Case("soft mask", mask(lambda m: np.clip(m, 3, 250))),
    Case("empty mask", mask(np.zeros_like), "mask.png: no hole in it"),
    Case("full mask", full),
    Case("inverted mask", mask(lambda m: 255 - m), "mask.png: inverted"),
    Case("other sizes", lambda f: write_image(f / "comp2.png", np.zeros((50, 64, 4), np.uint8)),
         "comp2.png: 64×50, but partial.png is 64×64"),
    Case("turned original", lambda f: write_image(f / "original.png", np.zeros((64, 50, 3), np.uint8)),
         "original.png: 50×64, but partial.png is 64×64"),
    Case("all transparent", completions(np.zeros_like), "every completion is fully transparent"),
    Case("one transparent", transparent_one),
    Case("white background", completions(on_white), "no alpha, on a flat background"),
    Case("opaque photo as completion", lambda f: shutil.copy(f / "original.png", f / "comp1.png")),
    Case("twelve completions", many),
    Case("one pixel", nothing, scene={"size": 1, "n": 1}),
    Case("thin", nothing, scene={"size": (5, 301)}),
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    data = tmp_path_factory.mktemp("cases")
    for seed, case in enumerate(CASES):
        folder = data / case.name
        folder.mkdir()
        scene = draw_scene(seed, **(case.scene or {}), scene_id=case.name)
        if case.name == "one pixel":
            scene.mask[:], scene.completions[0][:] = True, (128, 128, 128, 255)
        write_scene(folder, scene)
        case.change(folder)
    return data


@pytest.fixture(scope="module")
def checked(cases):
    return run(PREPARE, "check", "--data_dir", cases, "--workers", 2)


@pytest.fixture(scope="module")
def fused(cases, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    process = run(FUSE, "--data_dir", cases, "--output_dir", output, "--no-metrics", "--img_size", 64, "--workers", 1)
    return process, output


@pytest.fixture(scope="module")
def trained(cases, tmp_path_factory):
    """Training names the first twenty faults: over the list and over the list backwards, that is all of them."""
    lists = tmp_path_factory.mktemp("lists")
    names = [case.name for case in CASES[1:] if case.name == case.name.strip()]
    (lists / "val").write_text("good\n")

    def train(order):
        (lists / "train").write_text("\n".join(order), encoding="utf-8")
        return run(TRAIN, "--data_dir", cases, "--train_list", lists / "train", "--val_list", lists / "val",
                   "--checkpoint_dir", lists / "run", *SMALL, "--lpips_weight", 0)

    return train(names), train(names[::-1])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prepared_scenes(case, cases, checked, fused, trained):
    place = f"{cases / case.name}"
    process, output = fused
    for result in (checked, process, *trained):
        assert result.returncode == 1 and "Traceback" not in result.stdout + result.stderr
    training_text = "".join(result.stderr for result in trained)
    for text, fault in ((checked.stdout, case.fault), (process.stderr, case.fault),
                        (training_text, case.fault or case.training_fault)):
        about = [line for line in text.splitlines() if place + "/" in line or place + ":" in line]
        assert fault in "\n".join(about) if fault else not about, about
    assert (output / case.name / "fused.png").exists() == (case.fault is None)


def test_number_of_cases_and_of_faults(checked, trained):
    faults = sum(case.fault is not None for case in CASES)
    assert f"{len(CASES)} scenes read, {faults} faults" in checked.stdout
    for process in trained:
        assert "list all of them with: python prepare_dataset.py check" in process.stderr
        assert f"… and {faults + 1 - 20} more" in process.stderr


LISTS = [
    ("CRLF and BOM", "\ufeffgood\r\n한국어 이름\r\n\r\n".encode(), None),
    ("decomposed Hangul", "한국어 이름\n".encode(), None),
    ("twice", b"good\ngood\n", "line 2: 'good' is listed twice"),
    ("path up", b"good\n../cases/good\n", "line 2: '../cases/good' is a path"),
    ("absolute path", b"/etc/passwd\n", "line 1: '/etc/passwd' is a path"),
    ("backslashes", b"..\\good\n", "is a path"),
    ("dots", b"..\n", "'..' is a path"),
    ("missing scene", b"good\nnowhere\nneither\n", "line 3: there is no folder"),
    ("null byte", b"go\0od\n", "there is no folder"),
    ("empty", b"\n \n", "names no scene"),
    ("binary", b"\xff\xfe\x00g\x00o", "not a readable UTF-8 list"),
    ("no such file", None, "no such list"),
]


@pytest.mark.parametrize(("name", "data", "fault"), LISTS, ids=[row[0] for row in LISTS])
def test_lists(name, data, fault, cases, tmp_path):
    path = tmp_path / f"{name}.txt"
    if data is not None:
        path.write_bytes(data)
    process = run(FUSE, "--data_dir", cases, "--list", path, "--output_dir", tmp_path / "out", "--no-metrics",
                  "--no-figures", "--img_size", 64, "--workers", 0)
    assert "Traceback" not in process.stderr
    if fault is None:
        assert process.returncode == 0, process.stderr
    else:
        assert process.returncode == 1 and fault in process.stderr and str(path) in process.stderr
        assert not any((tmp_path / "out").glob("*/fused.png"))


def raw_scene(folder, seed=0, suffix="png", **options):
    """A scene as the user's pipeline leaves it."""
    scene = draw_scene(seed, **options)
    folder.mkdir(parents=True)
    for name, picture in (("original", scene.original), ("partial", scene.partial),
                          ("mask", np.where(scene.mask, 0, 255).astype(np.uint8))):
        Image.fromarray(picture).save(folder / f"{name}.{suffix}", quality=95)
    for number, picture in enumerate(scene.completions, 1):
        write_image(folder / f"comp{number}.png", on_white(picture))
    return scene


def test_raw_results(tmp_path):
    tree, data = tmp_path / "results", tmp_path / "data"
    good = ["plain", "a/b", "한국어/이름 😀", "turned", "webp", "one odd completion", "unequal sizes"]
    for seed, name in enumerate(good):
        raw_scene(tree / name, seed, "webp" if name == "webp" else "png")
    for name in ("original", "partial", "mask"):  # a phone held upright stores the photo lying, and says so
        with Image.open(tree / "turned" / f"{name}.png") as image:
            exif = Image.Exif()
            exif[0x0112] = 6
            image.rotate(90).save(tree / "turned" / f"{name}.png", exif=exif)
    shutil.copy(tree / "plain" / "comp1.png", tree / "plain" / "comp1 (copy).txt")
    small = Image.open(tree / "unequal sizes" / "comp1.png").resize((32, 32))
    small.save(tree / "unequal sizes" / "comp1.png")
    write_image(tree / "one odd completion" / "comp2.png", np.full((64, 64, 3), 255, np.uint8))
    (tree / "plain" / "up").symlink_to(tree)

    faults = {"zero": "original.png: empty file", "no photo": "neither a photo nor a partial image",
              "no hole": "mask.png: all white", "grey mask": "say which side it is (--mask_hole)",
              "two photos": "another photo?", "blank": "no completion shows anything in the hole",
              "bomb": "exceeds limit", "cropped": "comp1.png: 32×64, but the scene is 64×64",
              "broken": "comp3.png: damaged or truncated"}
    for seed, name in enumerate(faults):
        raw_scene(tree / name, seed + 50)
    (tree / "zero" / "original.png").write_bytes(b"")
    (tree / "no photo" / "original.png").unlink()
    (tree / "no photo" / "partial.png").unlink()
    write_image(tree / "no hole" / "mask.png", np.full((64, 64), 255, np.uint8))
    write_image(tree / "grey mask" / "mask.png", np.tile(np.uint8([0, 255]), (64, 32)))
    write_image(tree / "two photos" / "partial.png", (255 - draw_scene(3).original) * ~draw_scene(3).mask[..., None])
    for path in (tree / "blank").glob("comp*.png"):
        write_image(path, np.full((64, 64, 3), 255, np.uint8))
    (tree / "bomb" / "comp1.png").write_bytes(png(60000, 60000))
    Image.open(tree / "cropped" / "comp1.png").crop((0, 0, 32, 64)).save(tree / "cropped" / "comp1.png")
    part("comp3.png", 0.6)(tree / "broken")
    raw_scene(tree / "a__b", 99)  # the id of a/b

    process = run(PREPARE, "create", "--input_dir", tree, "--output_dir", data, "--workers", 2)
    assert process.returncode == 1 and "Traceback" not in process.stdout + process.stderr
    written = {path.name for path in data.iterdir() if path.is_dir()}
    assert written == {"plain", "a__b", "한국어__이름 😀", "turned", "webp", "one odd completion", "unequal sizes"}
    for name, fault in faults.items():
        # "bad: the scene: first fault" and, indented, its other ones
        about = re.search(rf"^bad: {name}: .*(\n     .*)*", process.stdout, re.MULTILINE)
        assert about and fault in about[0], (name, fault)
    assert "its id a__b belongs to" in process.stdout
    assert f"bad {len(faults) + 1}" in process.stdout
    assert np.abs(read_image(data / "turned" / "original.png", "RGB").astype(int)
                  - draw_scene(good.index("turned")).original).max() == 0
    assert run(PREPARE, "check", "--data_dir", data, "--workers", 1).returncode == 0


def test_folders_that_cannot_be_read_or_written(cases, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", "/proc/nothing"):  # /proc is read-only for everybody
        for script, arguments in ((FUSE, ("--data_dir", cases, "--output_dir", output)),
                                  (PREPARE, ("create", "--input_dir", cases, "--output_dir", output)),
                                  (PREPARE, ("synthesize", "--objects", cases, "--backgrounds", cases,
                                             "--output_dir", output)),
                                  (TRAIN, ("--data_dir", cases, "--checkpoint_dir", output, "--gpus", 0))):
            process = run(script, *arguments)
            assert process.returncode == 1 and "Traceback" not in process.stderr
            assert process.stderr.startswith("error: ") and str(output) in process.stderr, process.stderr
    for script, arguments in ((FUSE, ("--data_dir", tmp_path / "no", "--output_dir", tmp_path / "out")),
                              (PREPARE, ("check", "--data_dir", tmp_path / "no")),
                              (TRAIN, ("--data_dir", tmp_path / "no", "--checkpoint_dir", tmp_path / "run",
                                       "--gpus", 0))):
        process = run(script, *arguments)
        assert process.returncode == 2 and f"{tmp_path / 'no'}: no such folder (--data_dir)" in process.stderr
        assert process.stderr.startswith("error: ")


def as_nobody(*arguments):
    """`run` of prepare_dataset.py for whom permissions count, also where tests run as root."""
    command = [sys.executable, ROOT / PREPARE, *arguments]
    if os.geteuid() == 0:
        less = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={less}", f"--inh-caps={less}", *command]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def no_permissions():
    try:
        return as_nobody("--help").returncode != 0
    except OSError:  # no setpriv
        return True


def test_unreadable_folder_is_named_and_the_rest_done(tmp_path):
    if no_permissions():
        pytest.skip("root may read everything")
    results, data, closed = tmp_path / "results", tmp_path / "data", tmp_path / "results" / "closed"
    for seed, name in enumerate(("open", "closed")):
        raw_scene(results / name, seed)
    options = ("create", "--input_dir", results, "--output_dir", data, "--workers", 1, "--max_bad", 1)
    try:
        for overwrite in ((), ("--overwrite",)):
            closed.chmod(0)
            process = as_nobody(*options, *overwrite)
            assert process.returncode == 0 and "closed: Permission denied" in process.stdout
            assert "written 1, bad 1" in process.stdout and (data / "open").is_dir()
            if not overwrite:
                closed.chmod(0o755)
                assert as_nobody(*options).returncode == 0
        assert "stay because some inputs could not be read" in process.stdout
        assert (data / "closed" / "comp1.png").exists()
    finally:
        closed.chmod(0o755)
    (data / "closed").chmod(0)
    process = as_nobody("check", "--data_dir", data, "--workers", 1)
    (data / "closed").chmod(0o755)
    assert process.returncode == 1 and f"{data / 'closed'}" in process.stdout
    assert "2 scenes read, 1 faults" in process.stdout


def test_create_overwrites_only_its_own_files(tmp_path):
    for seed, name in enumerate(("car", "cat")):
        raw_scene(tmp_path / "results" / name, seed)
    data = tmp_path / "work"
    raw_scene(data / "cat", 5)
    options = ("create", "--input_dir", tmp_path / "results", "--output_dir", data, "--workers", 1)
    for overwrite in ((), ("--overwrite",)):
        process = run(PREPARE, *options, *overwrite)
        assert process.returncode == 2 and "no dataset.yaml beside it" in process.stderr
    assert (data / "cat" / "comp3.png").exists() and not (data / "car").exists()
    shutil.rmtree(data)
    assert run(PREPARE, *options).returncode == 0
    (data / "cat" / "notes.txt").write_text("mine")
    assert run(PREPARE, *options).returncode == 0  # nothing to be done
    process = run(PREPARE, *options, "--overwrite")
    assert process.returncode == 2 and "notes.txt: was not written by this program" in process.stderr
    assert (data / "cat" / "notes.txt").exists()


def test_scene_with_newly_bad_names_leaves_data_set(tmp_path):
    results, photos, data = tmp_path / "results", tmp_path / "photos", tmp_path / "data"
    for seed, name in enumerate(("x", "y")):
        scene = raw_scene(results / name, seed)
        (results / name / "original.png").unlink()
        (photos / "first").mkdir(parents=True, exist_ok=True)
        write_image(photos / "first" / f"{name}.png", scene.original)
    options = ("create", "--input_dir", results, "--output_dir", data, "--photos", photos, "--workers", 1, "--max_bad",
               1, "--split")
    assert "written 2" in run(PREPARE, *options).stdout
    (photos / "second").mkdir()
    shutil.copyfile(photos / "first" / "x.png", photos / "second" / "x.png")
    process = run(PREPARE, *options)
    assert "bad: x: " in process.stdout and "could both be its photo" in process.stdout
    assert not (data / "x").exists() and (data / "train_list.txt").read_text() == "y\n"


def test_strip_as_completion_fails_one_scene(tmp_path):
    for seed, name in enumerate(("good", "strip")):
        raw_scene(tmp_path / "results" / name, seed)
    strip = tmp_path / "results" / "strip"
    (strip / "partial.png").unlink()
    for path in strip.glob("comp*.png"):
        write_image(path, np.full((1, 300, 3), 90, np.uint8))
    process = run(PREPARE, "create", "--input_dir", tmp_path / "results", "--output_dir", tmp_path / "data",
                  "--workers", 1, "--max_bad", 1)
    assert process.returncode == 0 and "written 1, bad 1" in process.stdout and "strip" in process.stdout


USAGE = [
    (TRAIN, ("--epochs", -1), "epochs: expected 1 or more, got -1"),
    (TRAIN, ("--batch_size", 0), "error: --batch_size: expected 1 or more"),
    (TRAIN, ("--decoder_layers", 0), "decoder_layers: expected from 1 to 200"),  # 0: nothing would use the encoder
    (TRAIN, ("--ema_decay", 1.5), "ema_decay: expected from 0 to 1"),
    (TRAIN, ("--lr", "nan"), "lr: expected a finite number, got nan"),
    (TRAIN, (), "no data set: name its folder (--data_dir)"),
    (TRAIN, ("--lr", "fast"), "lr: expected a number, got 'fast'"),
    (TRAIN, ("--epoch", 3), "unrecognized arguments: --epoch 3; did you mean epochs?"),
    (FUSE, ("--workers", -1), "workers: expected 0 or more"),
    (FUSE, ("--amp", "fp8"), "invalid choice: 'fp8'"),
    (FUSE, (), "give a folder (--data_dir)"),
    (PREPARE, ("create", "--val_fraction", 2), "val_fraction: expected from 0 to 1"),
    (PREPARE, ("check",), "check needs a folder (--data_dir)"),
    (PREPARE, ("destroy",), "invalid choice: 'destroy'"),
]


@pytest.mark.parametrize(("script", "arguments", "fault"), USAGE, ids=[row[2][:30] for row in USAGE])
def test_wrong_usage_exits_with_2(script, arguments, fault):
    process = run(script, *arguments)
    assert process.returncode == 2 and fault in process.stderr and "Traceback" not in process.stderr


class Malice:
    """A pickle that runs code when somebody loads it."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("option", ["--checkpoint", "--init_from", "--resume", "--lpips_weights"])
def test_code_in_a_pickle_is_never_run(option, cases, tmp_path):
    canary = tmp_path / "ran"
    torch.save({"kind": "amodal_fusion_transformer", "model": Malice(canary)}, tmp_path / "model.pth")
    (tmp_path / "good").mkdir()
    shutil.copytree(cases / "good", tmp_path / "data" / "good")
    shutil.copytree(cases / "good", tmp_path / "data" / "other")
    for name, scene in (("train", "good"), ("val", "other")):
        (tmp_path / "data" / f"{name}_list.txt").write_text(scene)
    common = ("--data_dir", tmp_path / "data", option, tmp_path / "model.pth")
    if option == "--checkpoint":
        process = run(FUSE, *common, "--output_dir", tmp_path / "out")
    else:
        process = run(TRAIN, *common, "--checkpoint_dir", tmp_path / "run", *SMALL, "--batch_size", 1, "--lpips_weight",
                      int(option == "--lpips_weights"))
    assert process.returncode == 1 and "model.pth" in process.stderr
    assert process.stderr.startswith("error: ") and not canary.exists()
    torch.load(io.BytesIO((tmp_path / "model.pth").read_bytes()), weights_only=False)
    assert canary.exists()  # it would have


@pytest.mark.parametrize("change", [
    {"version": 99}, {"version": 1}, {"version": None}, {"config": {}}, {"model": {}}, {"ema": 3}])
def test_checkpoints_of_another_version_or_shape(change, cases, checkpoint, tmp_path):
    state = {**torch.load(checkpoint, weights_only=True), **change}
    torch.save(state, tmp_path / "model.pth")
    (tmp_path / "list").write_text("good")
    process = run(FUSE, "--data_dir", cases, "--list", tmp_path / "list", "--output_dir", tmp_path / "out",
                  "--no-metrics", "--checkpoint", tmp_path / "model.pth", "--workers", 0)
    if "model" in change:  # the averaged weights are what counts
        assert process.returncode == 0, process.stderr
    else:
        assert process.returncode == 1 and process.stderr.startswith("error: ") and "model.pth" in process.stderr
        assert ("an earlier version (up to commit f5cd88e)" in process.stderr) == (change == {"version": 1})
