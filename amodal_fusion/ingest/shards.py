"""Several processes or machines share one run of `create`: each makes its shard of the scenes.

All write scene folders into one data set. The tables of a shard lie in its own folder until all shards have ended:

    DATA/.shard_2_of_6/made_from.csv, report.csv   as in DATA
    DATA/.shard_2_of_6/ended.json                  the bad scenes; exists if the shard came to its end
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass

from amodal_fusion.data.dataset_folder import append_table
from amodal_fusion.errors import ConfigError
from amodal_fusion.files import clear_folder, remove_ours, write_text

FOLDER = re.compile(r"\.shard_(\d+)_of_(\d+)")
ENDED = "ended.json"
LAUNCHERS = (  # number of this process, how many there are, and what shows that a launcher started this process
    ("RANK", "WORLD_SIZE", "MASTER_ADDR"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"),  # outside of srun there is no step
)


@dataclass(frozen=True)
class Shard:
    """One of `count` shards, numbered from 1. A scene belongs to one by its id alone."""

    number: int
    count: int

    def __str__(self):
        return f"shard {self.number}/{self.count}"

    def folder(self, output):
        return output / f".shard_{self.number}_of_{self.count}"

    def has(self, name):
        """Whether a scene id, or the folder of a fault, belongs to this shard."""
        # Ids that differ only in case stay together, since a disk that ignores case has one folder for them.
        digest = hashlib.blake2b(name.casefold().encode(errors="surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.count == self.number - 1


def shard_of(text):
    """The Shard of the option "2/6", else of the launcher that started this process; None without both.

    Raises:
        ConfigError: the option or a variable of the launcher is wrong.
    """
    where, options = f"{text}", ("shard",)
    if text is None:
        for rank, count, sign in LAUNCHERS:
            if {rank, count, sign} <= set(os.environ):
                where, options = f"{rank}={os.environ[rank]}, {count}={os.environ[count]}", ()
                numbers = os.environ[rank].strip(), os.environ[count].strip()
                text = f"{int(numbers[0]) + 1}/{numbers[1]}" if numbers[0].isdecimal() else where
                break
        else:
            return None
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    shard = Shard(*map(int, match.groups())) if match else None
    if shard is None or not 1 <= shard.number <= shard.count:
        raise ConfigError(f"{where}: no shard; write 1/6 for the first of six, up to 6/6", *options)
    return shard if shard.count > 1 else None


def shards_in(output):
    """All shards of a data set with a folder there: {Shard: whether it came to its end}, by number."""
    found = [FOLDER.fullmatch(path.name) for path in output.iterdir() if path.name.startswith(".shard_")]
    shards = sorted((Shard(*map(int, match.groups())) for match in found if match), key=lambda shard: shard.number)
    return {shard: (shard.folder(output) / ENDED).exists() for shard in shards}


def check_count(output, shard):
    """Raise ConfigError if the data set has folders of another number of shards."""
    others = [other for other in shards_in(output) if other.count != shard.count]
    if others:
        raise ConfigError(f"{output} was begun with {others[0].count} shards, not {shard.count}; use that number, or "
                          "run once without shards, which takes over what they made", "shard")


def unfinished(output, count):
    """Numbers of the shards that did not come to their end, of `count`."""
    ended = shards_in(output)
    return [number for number in range(1, count + 1) if not ended.get(Shard(number, count))]


def write_ended(output, shard, skipped, made_from):
    """Mark a shard as ended. `skipped`: {scene id: fault}; with what the bad scenes were made from."""
    bad = {scene_id: [made_from[scene_id], fault] for scene_id, fault in skipped.items() if scene_id in made_from}
    write_text(shard.folder(output) / ENDED, json.dumps(bad), owned=True)


def take_over_tables(output, tables):
    """Append the shards' `tables`, {name: columns}, to those of the data set. A table may come twice.

    Returns:
        {scene id: [digest of its files, fault]} of the bad scenes.
    """
    bad = {}
    for shard, ended in shards_in(output).items():
        for name, columns in tables.items():
            append_table(output / name, columns, shard.folder(output) / name)
        if ended:
            bad |= json.loads((shard.folder(output) / ENDED).read_text(encoding="utf-8"))
    return bad


def remove_shards(output, tables):
    """Remove the shards' folders, whose `tables` the data set has now."""
    for shard in shards_in(output):
        folder = shard.folder(output)
        for name in tables:  # have grown
            remove_ours(folder / name, grown=True)
        if (folder / ".lock").is_file():
            (folder / ".lock").unlink()
        clear_folder(folder)
