"""Prepared scenes in a few large files, read from a memory map: few files, and no PNG to decode.

    PACK/packed.json            options, the folder that was packed, its shards
    PACK/train_list.txt …       copies of the folder's lists
    PACK/00000.npy, 00001.npy … shards: numpy arrays of bytes, scene after scene
    PACK/00000.json …           per scene: id, position of its bytes, their CRC-32, and the state of its files

Other formats for many small samples (tar files, Arrow, LMDB, safetensors) need more packages, and would still hold
PNGs, whose decoding takes the time. A memory map needs neither, and all processes of a machine share its pages.

A picture is stored raw, but without its zeros, since completions are mostly transparent black. That is lossless and as
fast to read as a copy. The partial image is stored as its difference from the original outside the hole.
"""

import io
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from amodal_fusion.data.checks import check_scene, files_state
from amodal_fusion.data.scenes import Scene, read_scene
from amodal_fusion.data.splits import LISTS
from amodal_fusion.errors import ConfigError, SceneError, UserError
from amodal_fusion.files import atomic_file, is_ours, remove_ours, take_output, write_text
from amodal_fusion.pools import Failure, Helpers

INDEX = "packed.json"
FORMAT = 1
SHARD_SCENES = 1024  # scenes per shard: half a gigabyte at 256² with five completions
HEAD = 5  # numbers before a stored picture: first row, first column, rows, columns, pixels


def is_packed(folder):
    return (Path(folder) / INDEX).is_file()


def source_of(folder):
    """The data set that a packed set was made from; of another folder the folder itself. A resolved Path."""
    index = read_json(Path(folder) / INDEX) or {}
    return Path(index.get("folder", folder)).resolve()


def to_record(scene):
    """Scene with an original → 1-D uint8: the pictures without their zeros.

    Every picture (H,W,4) is stored as the box of its pixels that are not zero, one bit for each pixel of the box, and
    those pixels.
    """
    visible = np.where(scene.mask[..., None], 0, scene.original)
    difference = np.dstack([scene.partial ^ visible, np.zeros_like(scene.partial[..., 0])])
    heads, pixels, bits = [], [], []
    for picture in (difference, *scene.completions):
        values = np.ascontiguousarray(picture).view(np.uint32)[..., 0]  # (H,W)
        rows, columns = (np.flatnonzero((values != 0).any(axis)) for axis in (1, 0))
        box = slice(rows[0], rows[-1] + 1) if len(rows) else slice(0, 0), \
            slice(columns[0], columns[-1] + 1) if len(columns) else slice(0, 0)
        inside = values[box] != 0
        heads.append((box[0].start, box[1].start, *inside.shape, np.count_nonzero(inside)))
        pixels.append(values[box][inside])
        bits.append(np.packbits(inside))
    head = np.array([*scene.mask.shape, len(heads), *np.ravel(heads)], np.int32)
    parts = [head, *pixels, scene.original, np.packbits(scene.mask), *bits]
    record = np.concatenate([np.ascontiguousarray(part).view(np.uint8).ravel() for part in parts])
    return np.pad(record, (0, -len(record) % 4))  # pixels start at multiples of four bytes


def from_record(record, scene_id, most):
    """Record of `to_record` → Scene with at most `most` completions."""
    def take(count, kind):
        nonlocal start
        start += count * np.dtype(kind).itemsize
        return record[start - count * np.dtype(kind).itemsize : start].view(kind)

    start = 0
    height, width, count = take(3, np.int32).tolist()
    heads = take(count * HEAD, np.int32).reshape(count, HEAD).tolist()
    pixels = [take(head[-1], np.uint32) for head in heads]
    original = take(height * width * 3, np.uint8).reshape(height, width, 3)
    mask = bits_to_bool(take(-(-height * width // 8), np.uint8), (height, width))
    pictures = []
    for (top, left, rows, columns, _), values in zip(heads[: most + 1], pixels):
        picture = np.zeros((height, width), np.uint32)
        inside = bits_to_bool(take(-(-rows * columns // 8), np.uint8), (rows, columns))
        picture[top : top + rows, left : left + columns][inside] = values
        pictures.append(picture.view(np.uint8).reshape(height, width, 4))
    partial = np.where(mask[..., None], 0, original)
    if heads[0][-1]:
        partial ^= pictures[0][..., :3]
    return Scene(scene_id, partial, mask, pictures[1:], original)


def bits_to_bool(bits, shape):
    return np.unpackbits(bits, count=shape[0] * shape[1]).view(bool).reshape(shape)


class PackedScenes:
    """The scenes of a packed set, by id.

    Attributes:
        img_size, n_max_completions: of the packed scenes; folder: Path of the data set that was packed.
        places: scene id → (shard's file name, first byte, bytes, CRC-32, state of the scene's files).

    Raises:
        UserError: the packed set is incomplete, or has another version.
    """

    def __init__(self, pack):
        self.pack, self.shards, self.places = Path(pack), {}, {}
        index = read_json(self.pack / INDEX)
        if index is None or index.get("format") != FORMAT:
            raise UserError(f"{self.pack / INDEX}: damaged, or from another version; pack again into an empty folder")
        if not index["shards"]:
            raise UserError(f"{self.pack}: its packing was interrupted; the same command resumes it")
        self.img_size, self.n_max_completions = index["img_size"], index["n_max_completions"]
        self.folder = Path(index["folder"])
        for name, size in index["shards"].items():
            shard, path = read_json((self.pack / name).with_suffix(".json")), self.pack / name
            if shard is None or not path.is_file() or path.stat().st_size != size:
                raise UserError(f"{path}: missing or truncated, or its .json is; pack again, complete shards stay")
            self.places |= {scene_id: (name, *place) for scene_id, *place in shard["scenes"]}

    def __getstate__(self):
        return {**self.__dict__, "shards": {}}  # pickling would copy a memory map; each process opens its own

    def read(self, scene_id, max_completions=None):
        """The scene as `read_scene` reads it, at the size of the packed set.

        Raises:
            SceneError: its bytes changed since they were written.
        """
        name, start, size, check_sum, _ = self.places[scene_id]
        if name not in self.shards:
            self.shards[name] = np.load(self.pack / name, mmap_mode="r").view(np.ndarray)
        record = self.shards[name][start : start + size]
        if zlib.crc32(record) != check_sum:
            raise SceneError(f"{self.pack / name}: damaged at scene {scene_id}; remove this file and pack again")
        most = self.n_max_completions if max_completions is None else max_completions
        return from_record(record, scene_id, most)

    def check_fits(self, img_size, n_max_completions):
        """Raise UserError if these values differ from those of the packed set, so that scenes would differ, too."""
        if img_size != self.img_size or n_max_completions > self.n_max_completions:
            raise UserError(f"{self.pack}: packed at {self.img_size} px with at most {self.n_max_completions} "
                            f"completions, not at {img_size} with {n_max_completions}; pack {self.folder} again for "
                            "these, into another folder", "img_size", "n_max_completions")

    def changes(self, scene_ids):
        """Lines about changes in the data set since it was packed; none if its folder is missing.

        Args:
            scene_ids: the scenes whose files are compared by size and time, not read.
        """
        if not self.folder.is_dir():
            return []
        lists = [name for name in LISTS if bytes_of(self.folder / name) != bytes_of(self.pack / name)]
        changed = [f"{self.folder / name}: changed since {self.pack} was packed" for name in lists]
        return changed + [f"{self.folder / scene_id}: changed since {self.pack} was packed" for scene_id in scene_ids
                          if files_state(self.folder / scene_id, self.n_max_completions) != self.places[scene_id][-1]]


def read_json(path):
    """The content of a JSON file; None if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def bytes_of(path):
    return path.read_bytes() if path.is_file() else b""


class ShardWriter:
    """Packs one shard per call, unless it exists and its scenes have not changed.

    Args:
        data_dir: the data set; pack: Path of the folder to write; img_size, n_max_completions: of the packed scenes.
    """

    def __init__(self, data_dir, pack, img_size, n_max_completions):
        self.data_dir, self.pack = Path(data_dir), pack
        self.img_size, self.n_max_completions = img_size, n_max_completions

    def options(self):
        return {"format": FORMAT, "img_size": self.img_size, "n_max_completions": self.n_max_completions,
                "folder": str(self.data_dir.resolve())}

    def __call__(self, shard):
        """shard: (number, scene ids). Raises SceneError with all faults of the scenes; nothing is written then."""
        number, scene_ids = shard
        path = self.pack / shard_name(number)
        states = [files_state(self.data_dir / scene_id, self.n_max_completions) for scene_id in scene_ids]
        if self.is_done(path, scene_ids, states):
            return
        entries, faults, end = [], [], 0
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            file.seek(len(npy_header(0)))
            for scene_id, state in zip(scene_ids, states):
                folder = self.data_dir / scene_id
                fault = check_scene(folder, need_original=True, max_completions=self.n_max_completions)
                if fault:
                    faults.append(fault)
                if faults:
                    continue
                scene = read_scene(folder, self.n_max_completions, need_original=True)
                record = to_record(scene.resized((self.img_size, self.img_size)))
                file.write(record)
                entries.append([scene_id, end, len(record), zlib.crc32(record), state])
                end += len(record)
            if faults:
                raise SceneError("\n".join(faults))
            file.seek(0)
            file.write(npy_header(end))
            file.flush()
            os.fsync(file.fileno())
            path.with_suffix(".json").unlink(missing_ok=True)  # it describes the old shard
        content = {**self.options(), "bytes": path.stat().st_size, "scenes": entries}
        write_text(path.with_suffix(".json"), json.dumps(content))

    def is_done(self, path, scene_ids, states):
        shard = read_json(path.with_suffix(".json"))
        if shard is None or not path.is_file() or path.stat().st_size != shard["bytes"]:
            return False
        return ({name: shard[name] for name in self.options()} == self.options()
                and [(entry[0], entry[-1]) for entry in shard["scenes"]] == list(zip(scene_ids, states)))


def shard_name(number):
    return f"{number:05d}.npy"


def npy_header(size):
    """The header of a .npy file of `size` bytes; numpy gives it the same length for every size."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
    return header.getvalue()


def pack_scenes(writer, scene_ids, workers, process=None):
    """Pack scenes of a folder. Running again resumes, and repeats shards whose scenes changed.

    Args:
        writer: ShardWriter; scene_ids: scenes with originals; workers: processes, 0: only this one.
        process: Process of a launcher's group, whose members share the shards; None: alone.

    Raises:
        ConfigError: the folder has other files. UserError: with the first twenty faults.
    """
    rank, world_size, gather = (process.rank, process.world_size, process.gather) if process else (0, 1, lambda x: [x])
    shards = [(number, scene_ids[start : start + SHARD_SCENES])
              for number, start in enumerate(range(0, len(scene_ids), SHARD_SCENES))]
    lock, refusal = begin(writer) if rank == 0 else (None, None)
    refusal = gather(refusal)[0]
    if refusal:
        raise ConfigError(refusal, "cache" if process else "output_dir")
    mine = shards[rank::world_size]
    with Helpers(writer, workers) as helpers:
        outcomes = [outcome for _, outcome in tqdm(helpers.map(mine, 2 * workers), "pack", len(mine),
                                                   disable=None if rank == 0 else True)]
    faults = [fault for share in gather([str(outcome) for outcome in outcomes if isinstance(outcome, Failure)])
              for failure in share for fault in failure.splitlines()]
    if faults:
        more = f"\n  … and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise UserError(f"{writer.data_dir}: the data set has faults; mend or remove these scenes, then pack again\n  "
                        + "\n  ".join(faults[:20]) + more)
    if rank == 0:
        finish(writer, [shard_name(number) for number, _ in shards])
        lock.close()
    gather(None)  # the others read the index next


def begin(writer):
    """Lock the folder for a packed set.

    Returns:
        the lock, and why the folder cannot be used, or None.
    """
    pack = writer.pack
    try:
        lock = take_output(pack)
    except ConfigError as error:
        return None, str(error)
    index = read_json(pack / INDEX)
    if index is None and any(not path.name.startswith(".") for path in pack.iterdir()):
        return lock, f"{pack}: neither empty nor a packed data set; choose another folder"
    if index is not None and ({name: index.get(name) for name in writer.options()} != writer.options()
                              or not is_ours(pack / INDEX)):
        return lock, (f"{pack}: packed from {index.get('folder')} at {index.get('img_size')} px with "
                      f"{index.get('n_max_completions')} completions; choose another folder, or remove this one")
    write_text(pack / INDEX, json.dumps({**writer.options(), "shards": {}}, indent=1) + "\n", owned=True)
    return lock, None


def finish(writer, names):
    """Remove shards of an earlier, larger set, copy the lists, and write the index, which completes the set."""
    pack = writer.pack
    for path in pack.iterdir():
        if re.fullmatch(r"\d{5,}\.npy", path.name) and path.name not in names:
            path.unlink()
            path.with_suffix(".json").unlink(missing_ok=True)
    for name in LISTS:
        if (writer.data_dir / name).is_file():
            with atomic_file(pack / name, owned=True) as temporary:
                temporary.write_bytes((writer.data_dir / name).read_bytes())
        else:
            remove_ours(pack / name)
    sizes = {name: (pack / name).stat().st_size for name in names}
    write_text(pack / INDEX, json.dumps({**writer.options(), "shards": sizes}, indent=1) + "\n", owned=True)


def check_packed(pack):
    """Read every scene of a packed set; returns their number and a list of faults."""
    scenes, faults = PackedScenes(pack), []
    for scene_id in tqdm(scenes.places, "check", disable=None):
        try:
            scenes.read(scene_id)
        except SceneError as error:
            faults.append(str(error))
    return len(scenes.places), faults + scenes.changes(list(scenes.places))
