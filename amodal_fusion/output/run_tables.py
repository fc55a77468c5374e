"""Tables of a run: metrics of all scenes, and failed scenes."""

import csv
import re
import sys

from amodal_fusion.data.names import photo_of
from amodal_fusion.evaluation.tables import write_metrics
from amodal_fusion.files import atomic_file, ours_in, plain_cell, remove_ours
from amodal_fusion.output.records import made_alike, read_record

MOST_PRINTED = 20
TABLES = ("metrics.csv", "summary.md", "summary.png")


def write_table(output_dir, scene_ids, made_by, group_by=None, results=None):
    """Collect the metrics of all scenes of a run into one table; returns its summary, None without originals.

    Args:
        made_by: as in `write_record`; outputs of other weights or options are ignored.
        group_by: regular expression for the start of ids; scenes with the same match (or first group) are one photo.
        results: Results, pictures of inpainters to measure beside; None: there are none.
    """
    pattern = re.compile(group_by) if group_by else None

    def rows():
        for scene_id in scene_ids:
            record = read_record(output_dir / scene_id)
            if record and record["metrics"] and made_alike(record["made_by"], made_by):
                photo = photo_of(scene_id, pattern)
                more = results.measure(scene_id) if results else {}
                yield record["metrics"] | ({"photo": photo} if photo else {}) | more

    return write_metrics(output_dir, rows(), *([results.of_sets] if results else []))


def remove_stale(output_dir):
    """Remove the tables of earlier runs, about scenes that were recomputed."""
    stale = [name for name in ours_in(output_dir) if name in TABLES]
    for name in stale:
        remove_ours(output_dir / name)
    if stale:
        print(f"{', '.join(stale)} removed, because scenes were recomputed; --metrics writes them")


def write_failures(output_dir, failed):
    """Print the first twenty faults and write all to failed.csv; without faults the file is removed.

    Args:
        failed: scene id → fault.
    """
    path = output_dir / "failed.csv"
    for scene_id, fault in list(failed.items())[:MOST_PRINTED]:
        print(f"error: {scene_id}: {fault}", file=sys.stderr)
    if len(failed) > MOST_PRINTED:
        print(f"error: … and {len(failed) - MOST_PRINTED} more, see {path}", file=sys.stderr)
    remove_ours(path)
    if failed:
        with atomic_file(path, owned=True) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            cells = ([plain_cell(cell) for cell in pair] for pair in failed.items())
            csv.writer(file).writerows([("scene", "fault"), *cells])
